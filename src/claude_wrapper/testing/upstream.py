"""The scripted model API, to import and to run: `python -m claude_wrapper.testing.upstream [PORT]`.

    async with ScriptedUpstream() as upstream:
        ...  # point a client at upstream.url; look at upstream.calls

Prompts are driven by directives such as `[[tokens 100]] [[delay 20]]`; `directives_markdown()` lists them.
"""

from __future__ import annotations

import asyncio
import sys

from claude_wrapper.testing.messages_server import RecordedRequest, ScriptedUpstream
from claude_wrapper.testing.script import directives_markdown

__all__ = ["RecordedRequest", "ScriptedUpstream", "directives_markdown"]


async def _serve(port: int) -> None:
    async with ScriptedUpstream(port=port, keep=100) as upstream:
        sys.stdout.write(f"scripted upstream: {upstream.url}\n\n{directives_markdown()}")
        sys.stdout.flush()
        await asyncio.Event().wait()


if __name__ == "__main__":
    try:
        asyncio.run(_serve(int(sys.argv[1]) if len(sys.argv) > 1 else 0))
    except KeyboardInterrupt:
        sys.exit(0)
