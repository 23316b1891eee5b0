"""What may be written of an exception: its kind and where it happened, without what the caller said.

A message of ours (`WrapperError`) holds no secret and no content by its contract, nor do the operating system's. Any
other message may quote the data that an error was about; it is left out unless the operator asks for it.
"""

from __future__ import annotations

import traceback
from types import TracebackType
from typing import Any, Final

from claude_wrapper.errors import WrapperError

MAX_CHAIN: Final = 5
MAX_FRAMES: Final = 30
MAX_MESSAGE: Final = 500


def summary(error: BaseException, *, messages: bool = False) -> dict[str, Any]:
    """`{"chain": [{"type", "code"?, "message"?}], "frames": ["file.py:12 function"]}`; the innermost frame is last."""
    chain: list[dict[str, str]] = []
    current: BaseException | None = error
    while current is not None and len(chain) < MAX_CHAIN:
        chain.append(_link(current, messages=messages))
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return {"chain": chain, "frames": _frames(error.__traceback__)}


def _link(error: BaseException, *, messages: bool) -> dict[str, str]:
    link = {"type": type(error).__qualname__}
    if isinstance(error, WrapperError):
        link["code"] = error.code
        link["message"] = error.message[:MAX_MESSAGE]
    elif isinstance(error, OSError) and error.strerror:
        link["message"] = error.strerror[:MAX_MESSAGE]  # without the file name: it may be a customer's
    elif isinstance(error, BaseExceptionGroup):
        link["message"] = ", ".join(type(one).__qualname__ for one in error.exceptions[:MAX_CHAIN])
    elif messages:
        link["message"] = str(error)[:MAX_MESSAGE]
    return link


def _frames(trace: TracebackType | None) -> list[str]:
    walked = [(frame, line) for frame, line in traceback.walk_tb(trace)][-MAX_FRAMES:]
    return [f"{_short(frame.f_code.co_filename)}:{line} {frame.f_code.co_name}" for frame, line in walked]


def _short(path: str) -> str:
    return "/".join(path.split("/")[-3:])
