"""The vault's master key in a KMS: a real server whose operator names a client."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from claude_wrapper.app import offline
from claude_wrapper.app.tenants import MASTER_KEY_FILE
from claude_wrapper.config import Settings
from claude_wrapper.errors import ConfigurationError, VaultSealed
from running_server import Running, running

pytestmark = pytest.mark.anyio

CLIENT = """
import hashlib
from claude_wrapper.vault.keys import KmsError

class Client:
    def _stream(self, key, context):
        return hashlib.shake_256(key.encode() + b"/" + context).digest(4096)
    async def encrypt(self, key, plain, context):
        if key == "gone": raise KmsError("NotFound")
        return hashlib.sha256(plain).digest() + bytes(a ^ b for a, b in zip(plain, self._stream(key, context)))
    async def decrypt(self, key, blob, context):
        plain = bytes(a ^ b for a, b in zip(blob[32:], self._stream(key, context)))
        if key == "gone" or hashlib.sha256(plain).digest() != blob[:32]: raise KmsError("InvalidCiphertext")
        return plain

def client():
    return Client()

def broken():
    raise OSError("no instance role")
"""


@pytest.fixture
def kms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with a client (no cipher: it only must tell keys and contexts apart)."""
    (tmp_path / "operators_kms.py").write_text(CLIENT)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "operators_kms", raising=False)
    return "operators_kms"


async def _keep(server: Running) -> str:
    body = {"kind": "api_key", "name": "mine", "secret": {"api_key": "sk-ant-api03-kept"}}
    async with server.http.post("/v1/organizations/credentials", json=body) as response:
        assert response.status == 200, await response.text()
        return str((await response.json())["id"])


async def _opened(server: Running, credential: str) -> str:
    tenants = server.server.app.state.deps.tenants
    return str((await tenants.resolver.lease(tenants.operator, named=credential)).secret)


async def test_secrets_are_sealed_under_the_kms_and_open_under_a_changed_key(
    reachable_tmp_path: Path, kms: str
) -> None:
    name = f"{kms}:client"
    async with running(reachable_tmp_path, sandbox="none", spares=0, kms_client=name, kms_keys=("one",)) as server:
        kept = await _keep(server)
        assert await _opened(server, kept) == "sk-ant-api03-kept"
    assert not (reachable_tmp_path / "data" / MASTER_KEY_FILE).exists()

    changed = Settings(data_dir=reachable_tmp_path / "data", kms_client=name, kms_keys=("two", "one"))
    async with running(
        reachable_tmp_path, sandbox="none", spares=0, kms_client=name, kms_keys=("two", "one")
    ) as server:
        assert await _opened(server, kept) == "sk-ant-api03-kept"
    assert (await offline.rotate(changed)).primary == "two"
    async with running(reachable_tmp_path, sandbox="none", spares=0, kms_client=name, kms_keys=("two",)) as server:
        assert await _opened(server, kept) == "sk-ant-api03-kept"
    with pytest.raises(VaultSealed, match="master key two is needed"):
        async with running(reachable_tmp_path, sandbox="none", spares=0, kms_client=name, kms_keys=("other",)):
            pass


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kms_client": "operators_kms:client"}, "needs CLAUDE_WRAPPER_KMS_KEYS"),
        ({"kms_client": "operators_kms:client", "kms_keys": ("a",), "master_key": "x"}, "no MASTER_KEY"),
        ({"kms_client": "operators_kms:absent", "kms_keys": ("a",)}, "operators_kms:absent gives no client"),
        ({"kms_client": "not_there:client", "kms_keys": ("a",)}, "not_there"),
        ({"kms_client": "operators_kms:broken", "kms_keys": ("a",)}, "no instance role"),
        ({"kms_client": "operators_kms", "kms_keys": ("a",)}, "operators_kms gives no client"),
    ],
)
async def test_a_client_that_cannot_be_used_stops_the_start_and_says_why(
    tmp_path: Path, kms: str, settings: dict[str, object], says: str
) -> None:
    with pytest.raises(ConfigurationError, match=says):
        async with offline.opened(Settings(data_dir=tmp_path / "data", **settings)):
            pass


def test_a_new_key_of_a_kms_is_made_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="put its name first in KMS_KEYS"):
        offline.add_master_key(Settings(data_dir=tmp_path, kms_client="a:b", kms_keys=("c",)))
