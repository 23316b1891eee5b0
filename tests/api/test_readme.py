"""What the README shows works as it is shown."""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
import shutil
from pathlib import Path

import pytest

from running_server import KEY, Running

pytestmark = [pytest.mark.anyio, pytest.mark.real_cli]

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


async def test_the_python_of_the_readme_runs(server: Running) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    code = code.replace("http://127.0.0.1:8000", server.url)

    def run() -> str:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, "README.md", "exec"), {"KEY": KEY})
        return printed.getvalue()

    async with asyncio.timeout(60):
        printed = await asyncio.to_thread(run)
    assert "agent.message" in printed
    assert printed.rstrip().endswith("session.status_idle")


async def test_the_curl_of_the_readme_runs(server: Running) -> None:
    shown = re.search(r"```\n(curl .*?)```", README, re.DOTALL)
    assert shown is not None
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed: apt-get install curl")
    command = shown[1].replace("http://127.0.0.1:8000", server.url).replace("$KEY", KEY)
    process = await asyncio.create_subprocess_shell(command, stdout=-1, stderr=-1)
    async with asyncio.timeout(60):
        out, _ = await process.communicate()
    assert b"You said: Hello!" in out
