r"""The little language that drives the scripted upstream: directives inside the prompt.

The *driving text* of a request is the last text block of the last user message that holds a text of its own (blocks
that are only a `<system-reminder>` and the CLI's interruption notices do not count). Directives are written
`[[name argument]]`; an argument may be a JSON string, to hold any character. What is not a known directive is text.

| directive | what the upstream does |
|---|---|
| *(none)* | answers `You said: ` and the driving text, a word per delta |
| `[[say TEXT]]` | answers TEXT, a word per delta |
| `[[tokens N]]` | answers `1 2 3 … N`, one number per delta |
| `[[think TEXT]]` | a thinking block (with signature) before what follows |
| `[[tool NAME {json}]]` | calls the tool NAME with this input; several in one step are parallel calls |
| `[[then]]` | ends a step: the next one runs when the tool results of this one have arrived. After the last step the answer is `Tool said: ` and the results |
| `[[structured]]` | the smallest JSON value that fits `output_config.format`; without the directive, too, when the prompt gives no other answer |
| `[[history]]` | JSON: `{"messages": count, "roles": […], "texts": […], "digest": key}` of what was received (reminders left out) |
| `[[recall]]` | JSON list of all earlier user texts |
| `[[system]]` | the system text that was received |
| `[[field NAME]]` | JSON of this field of the request body (`null` when absent) |
| `[[stop REASON]]` | sets `stop_reason` (`refusal` and `stop_sequence` bring their details) |
| `[[delay MS]]` | waits this long before each delta but the first |
| `[[first MS]]` | waits this long before the first byte |
| `[[error STATUS TYPE?]]` | fails with this status; the type is that of the status unless named |
| `[[error-once STATUS TYPE?]]` | the same, but only the first time that this driving text arrives |
| `[[error-after N TYPE?]]` | sends N deltas, then an `error` event (`overloaded_error`) |
| `[[retry-after SECONDS]]` | sets `retry-after` on the error (429 and 529 have `1` anyway) |
| `[[cut N]]` | drops the connection after N deltas of a stream; a request without `stream` is answered |
| `[[hang]]` | never answers (token counts neither); `[[hang N]]` stops after N deltas |
| `[[again]]` | ends an answer: what follows is answered when this driving text arrives the next time, the last one from then on |
| `[[once]]` | `error-after`, `cut` and `hang` of this step happen only the first time that this driving text arrives |
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

INTERRUPTED = "[Request interrupted by user"
_OPEN = re.compile(r"\[\[\s*([a-z]+(?:-[a-z]+)*)(?=[\s\]])")
_TOOL_NAME = re.compile(r"\s*([^\s\]{]+)\s*")
_AGAIN = re.compile(r"\[\[\s*again\s*\]\]")
_CLOSE = re.compile(r"\s*\]\]")
_REMINDER = re.compile(r"\s*<system-reminder>.*</system-reminder>\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Part:
    """One thing to answer, in order: `kind` is the directive's name; `argument` a text, a number or a tool input."""

    kind: str
    argument: Any = None
    tool: str = ""


@dataclass(slots=True)
class Step:
    """What one model call does. Times are in seconds; `*_after` count deltas, None: does not happen."""

    parts: list[Part] = field(default_factory=list)
    text: str = ""
    stop_reason: str | None = None
    delay: float = 0.0
    first: float = 0.0
    error: tuple[int, str | None] | None = None
    error_after: tuple[int, str] | None = None
    retry_after: str | None = None
    cut_after: int | None = None
    hang_after: int | None = None
    """-1: nothing at all is answered."""
    once: bool = False


NAMES = frozenset(
    {"say", "tokens", "think", "tool", "then", "structured", "history", "recall", "system", "field", "stop", "delay"}
    | {"first", "error", "error-once", "error-after", "retry-after", "cut", "hang", "again", "once"}
)


def answers_in(text: str) -> list[str]:
    """The driving text, cut at each `[[again]]`: one for each time that it arrives."""
    return _AGAIN.split(text)


def parse(text: str) -> list[Step]:
    """The steps of a driving text, at least one."""
    steps = [Step()]
    plain: list[str] = []
    position = 0
    while found := _OPEN.search(text, position):
        name = found[1]
        parsed = _argument(name, text, found.end()) if name in NAMES else None
        if parsed is None:  # not ours, or not closed: plain text
            plain.append(text[position : found.end()])
            position = found.end()
            continue
        plain.append(text[position : found.start()])
        argument, tool, position = parsed
        if name == "then":
            steps[-1].text = "".join(plain).strip()
            plain = []
            steps.append(Step())
        else:
            _apply(steps[-1], name, argument, tool)
    plain.append(text[position:])
    rest = "".join(plain)
    steps[-1].text = rest if rest == text else rest.strip()
    return steps


def _argument(name: str, text: str, start: int) -> tuple[Any, str, int] | None:
    """(argument, tool name, end) of the directive whose name ends at `start`; None when it is not closed."""
    tool = ""
    if name == "tool":
        if (named := _TOOL_NAME.match(text, start)) is None:
            return None
        tool, start = named[1], named.end()
    while start < len(text) and text[start].isspace():
        start += 1
    if text[start : start + 1] in {"{", '"', "["}:
        try:
            value, end = json.JSONDecoder().raw_decode(text, start)
        except ValueError:
            pass
        else:
            if closing := _CLOSE.match(text, end):
                return value, tool, closing.end()
    end = text.find("]]", start)
    if end < 0:
        return None
    raw = text[start:end].strip()
    return ({} if name == "tool" and not raw else raw), tool, end + 2


def _apply(step: Step, name: str, argument: Any, tool: str) -> None:
    words = argument.split() if isinstance(argument, str) else []
    number = _number(words[0]) if words else 0.0
    kind = words[1] if len(words) > 1 else None
    match name:
        case "tool":
            step.parts.append(Part("tool", argument, tool))
        case "tokens":
            step.parts.append(Part("tokens", int(number)))
        case "delay":
            step.delay = number / 1000
        case "first":
            step.first = number / 1000
        case "error" | "error-once":
            step.error = (int(number), kind)
            step.once = step.once or name == "error-once"
        case "error-after":
            step.error_after = (int(number), kind or "overloaded_error")
        case "cut":
            step.cut_after = int(number)
        case "hang":
            step.hang_after = int(number) if words else -1
        case "once":
            step.once = True
        case "again":
            pass  # what goes before and after it is parsed alone (`answers_in`)
        case "stop" | "retry-after":
            setattr(step, "stop_reason" if name == "stop" else "retry_after", argument)
        case _:
            step.parts.append(Part(name, argument))


def _number(word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        return 0.0
    return max(0.0, number) if math.isfinite(number) else 0.0


def without_faults(step: Step) -> Step:
    """The step of a text that failed before and was to fail only once."""
    step.error = step.error_after = step.cut_after = step.hang_after = None
    return step


# What was received ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Received:
    """What the script needs to know of a request's messages."""

    text: str
    """The driving text."""
    round: int
    """Assistant messages since then: which step is due."""
    results: str
    """The tool results of the last message, joined."""


def received(messages: Sequence[Mapping[str, Any]]) -> Received:
    """Find the driving text and what happened since."""
    rounds, results = 0, ""
    for message in reversed(messages):
        if message.get("role") == "assistant":
            rounds += 1
        elif message.get("role") == "user":
            if texts := user_texts(message):
                return Received(texts[-1], rounds, results)
            results = results or _tool_results(message)
    return Received("", rounds, results)


def blocks(content: Any) -> list[Mapping[str, Any]]:
    """Content as a list of blocks; a string is one text block."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [block for block in content if isinstance(block, Mapping)] if isinstance(content, list) else []


def texts_of(content: Any) -> list[str]:
    """The texts of all text blocks."""
    return [str(block.get("text", "")) for block in blocks(content) if block.get("type") == "text"]


def user_texts(message: Mapping[str, Any]) -> list[str]:
    """The texts that a user wrote: no reminders, no interruption notices, nothing empty."""
    return [
        text
        for text in texts_of(message.get("content"))
        if text and not text.startswith(INTERRUPTED) and not _REMINDER.fullmatch(text)
    ]


def _tool_results(message: Mapping[str, Any]) -> str:
    results = (block for block in blocks(message.get("content")) if block.get("type") == "tool_result")
    return "; ".join(" ".join(texts_of(block.get("content"))) for block in results)


def all_texts(messages: Iterable[Mapping[str, Any]], role: str) -> list[str]:
    """Every text of this role, in order, reminders left out."""
    return [text for message in messages if message.get("role") == role for text in user_texts(message)]


def minimal_value(schema: Any, root: Any = None, depth: int = 0) -> Any:
    """The smallest JSON value that satisfies a JSON schema of the kind that structured output allows."""
    root = schema if root is None else root
    if not isinstance(schema, Mapping) or depth > 50:
        return None
    if isinstance(reference := schema.get("$ref"), str):
        target: Any = root
        for key in reference.removeprefix("#/").split("/"):
            target = target.get(key, {}) if isinstance(target, Mapping) else {}
        return minimal_value(target, root, depth + 1)
    for keyword in ("const", "default"):
        if keyword in schema:
            return schema[keyword]
    if schema.get("enum"):
        return schema["enum"][0]
    for keyword in ("anyOf", "oneOf", "allOf"):
        if options := schema.get(keyword):
            return minimal_value(options[0], root, depth + 1)
    kind = schema.get("type")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    if kind == "object" or (kind is None and "properties" in schema):
        properties = schema.get("properties", {})
        return {name: minimal_value(properties.get(name), root, depth + 1) for name in schema.get("required", ())}
    if kind == "array":
        return [minimal_value(schema.get("items"), root, depth + 1)] * int(schema.get("minItems", 0))
    if kind == "string":
        formats = {"date": "2026-01-01", "date-time": "2026-01-01T00:00:00Z", "email": "a@example.com"}
        formats |= {"uuid": "00000000-0000-4000-8000-000000000000", "uri": "https://example.com/"}
        return formats.get(schema.get("format", ""), "x" * int(schema.get("minLength", 0)))
    if kind in {"integer", "number"}:
        lowest = schema.get("minimum", schema.get("exclusiveMinimum", -1) + ("exclusiveMinimum" in schema))
        return max(0, lowest) if lowest <= 0 else lowest
    return False if kind == "boolean" else None


def directives_markdown() -> str:
    """The table of directives, for the documentation."""
    return "\n".join(re.findall(r"^\|.*$", __doc__ or "", re.MULTILINE)) + "\n"
