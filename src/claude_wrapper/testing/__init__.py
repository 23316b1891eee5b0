"""Doubles for tests, the demo and benchmarks: a scripted model API, a clock that is moved by hand, counted ids."""

from claude_wrapper.testing.catalogue import MODELS
from claude_wrapper.testing.clock import ManualClock, SequentialIds
from claude_wrapper.testing.messages_server import RecordedRequest, ScriptedUpstream
from claude_wrapper.testing.script import directives_markdown

__all__ = ["MODELS", "ManualClock", "RecordedRequest", "ScriptedUpstream", "SequentialIds", "directives_markdown"]
