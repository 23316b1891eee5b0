"""A process's only way out: one endpoint per slot that injects the credential, meters, retries and protects.

No secret is inside the sandbox: the process knows a socket (or a loopback path) and a dummy token, both its own.
"""

from claude_wrapper.broker.bodies import SYSTEM_PLACEHOLDER, refused_overrides
from claude_wrapper.broker.breaker import BreakerView
from claude_wrapper.broker.bridge import McpBridge
from claude_wrapper.broker.broker import SOCKET_BASE_URL, Broker
from claude_wrapper.broker.calls import (
    Binding,
    CallSink,
    Credential,
    CredentialKind,
    Gate,
    NoGate,
    NoSink,
    Observer,
    Reservation,
    TurnContext,
    UpstreamCall,
)
from claude_wrapper.broker.egress import Egress, EgressSettings
from claude_wrapper.broker.endpoint import Endpoint
from claude_wrapper.broker.hosts import HostRules
from claude_wrapper.broker.mcp import FixedHeaders, McpCredential, McpServer
from claude_wrapper.broker.settings import BrokerSettings

__all__ = [
    "SOCKET_BASE_URL",
    "SYSTEM_PLACEHOLDER",
    "Binding",
    "BreakerView",
    "Broker",
    "BrokerSettings",
    "CallSink",
    "Credential",
    "CredentialKind",
    "Egress",
    "EgressSettings",
    "Endpoint",
    "FixedHeaders",
    "Gate",
    "HostRules",
    "McpBridge",
    "McpCredential",
    "McpServer",
    "NoGate",
    "NoSink",
    "Observer",
    "Reservation",
    "TurnContext",
    "UpstreamCall",
    "refused_overrides",
]
