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

# Attributes
OPERATION: Final = "gen_ai.operation.name"
PROVIDER: Final = "gen_ai.provider.name"
REQUEST_MODEL: Final = "gen_ai.request.model"
CONVERSATION: Final = "gen_ai.conversation.id"
AGENT_NAME: Final = "gen_ai.agent.name"
TOOL_NAME: Final = "gen_ai.tool.name"
TOOL_CALL_ID: Final = "gen_ai.tool.call.id"
INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
CACHE_READ_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
STATUS: Final = "http.response.status_code"
METHOD: Final = "http.request.method"
ROUTE: Final = "http.route"

ANTHROPIC: Final = "anthropic"
"""The value of PROVIDER for the Messages API."""


def span_name(operation: str, subject: str | None) -> str:
    """`chat claude-sonnet-5-5`, `invoke_agent reviewer`, `execute_tool Bash`; the operation alone without a subject."""
    return f"{operation} {subject}" if subject else operation
