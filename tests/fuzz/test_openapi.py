"""The HTTP API against its own description: whatever fits the schema, or does not, is answered and never with a 500."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from time import monotonic
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode

from claude_wrapper.testing.attack.served import KEY, served

pytestmark = pytest.mark.real_cli

_SECONDS = 15.0
_EXAMPLES = 5


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server without spares, as a process of its own."""
    directory = tmp_path_factory.mktemp("served")
    ready: list[str] = []
    started, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        directory.chmod(0o711)
        async with served(directory, {"spares": "0", "sandbox": "none", "queue_seconds": "1"}) as server:
            ready.append(server.url)
            started.set()
            await asyncio.to_thread(stop.wait)

    def main() -> None:
        try:
            asyncio.run(serve())
        finally:
            started.set()

    thread = threading.Thread(target=main)
    thread.start()
    assert started.wait(60)
    try:
        yield ready[0]
    finally:
        stop.set()
        thread.join(60)


@pytest.mark.timeout(170)
@pytest.mark.parametrize("mode", [GenerationMode.NEGATIVE, GenerationMode.POSITIVE])
def test_no_request_makes_the_server_fail(url: str, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    until = monotonic() + _SECONDS
    tried: list[int] = []
    for found in schema.get_all_operations():
        if monotonic() < until:
            _try(found.ok(), mode, url, tried)
    assert len(tried) > 20
    assert any(status < 400 for status in tried) or mode is GenerationMode.NEGATIVE


def _try(operation: Any, mode: GenerationMode, url: str, tried: list[int]) -> None:
    """Some requests to one operation, as long as there is time."""

    @settings(
        max_examples=_EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        case = data.draw(operation.as_strategy(generation_mode=mode))
        response = case.call(base_url=url, headers={"authorization": f"Bearer {KEY}"}, timeout=15)
        case.validate_response(response, checks=[not_a_server_error])
        tried.append(response.status_code)

    with contextlib.suppress(Unsatisfiable):  # an operation without parameters cannot be asked wrongly
        check()
