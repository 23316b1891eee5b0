"""Names of the OpenTelemetry conventions for generative AI that the server uses.

Source: open-telemetry/semantic-conventions-genai, status "Development": the names may change, so they stand in this one
file. (The constants in `opentelemetry-semantic-conventions` are marked deprecated since the move; `gen_ai.system` is the
old name of the provider.) Message content has attributes too; the server never sets them.
"""

from __future__ import annotations

from typing import Final

# Operations: the first word of a span's name and the value of OPERATION
CHAT: Final = "chat"
INVOKE_AGENT: Final = "invoke_agent"
EXECUTE_TOOL: Final = "execute_tool"
CREATE_AGENT: Final = "create_agent"

# Attributes
OPERATION: Final = "gen_ai.operation.name"
PROVIDER: Final = "gen_ai.provider.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
RESPONSE_MODEL: Final = "gen_ai.response.model"
RESPONSE_ID: Final = "gen_ai.response.id"
FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
CONVERSATION: Final = "gen_ai.conversation.id"
AGENT_ID: Final = "gen_ai.agent.id"
AGENT_NAME: Final = "gen_ai.agent.name"
TOOL_NAME: Final = "gen_ai.tool.name"
TOOL_CALL_ID: Final = "gen_ai.tool.call.id"
TOKEN_TYPE: Final = "gen_ai.token.type"  # noqa: S105 - an attribute's name; its values are `input` and `output` only
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
CACHE_READ_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
CACHE_WRITE_TOKENS: Final = "gen_ai.usage.cache_creation.input_tokens"
ERROR_TYPE: Final = "error.type"
STATUS: Final = "http.response.status_code"
METHOD: Final = "http.request.method"
ROUTE: Final = "http.route"

# Metrics, for the export over OTLP
TOKEN_USAGE: Final = "gen_ai.client.token.usage"  # noqa: S105 - a metric's name
OPERATION_SECONDS: Final = "gen_ai.client.operation.duration"
FIRST_TOKEN_SECONDS: Final = "gen_ai.server.time_to_first_token"  # noqa: S105 - a metric's name
REQUEST_SECONDS: Final = "gen_ai.server.request.duration"
INVOKE_AGENT_SECONDS: Final = "gen_ai.invoke_agent.duration"
EXECUTE_TOOL_SECONDS: Final = "gen_ai.execute_tool.duration"

ANTHROPIC: Final = "anthropic"
"""The value of PROVIDER for the Messages API."""


def span_name(operation: str, subject: str | None) -> str:
    """`chat claude-sonnet-5-5`, `invoke_agent reviewer`, `execute_tool Bash`; the operation alone without a subject."""
    return f"{operation} {subject}" if subject else operation
