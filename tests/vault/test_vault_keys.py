"""Master keys: one contract for all adapters; keys in files and settings; nothing secret is shown."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vault_doubles import FakeKms, material

from claude_wrapper.errors import ConfigurationError, VaultSealed
from claude_wrapper.vault.keys import (
    KeyMaterial,
    KmsMasterKey,
    LocalMasterKey,
    MasterKey,
    Wrapped,
    create_key_file,
    parse_keys,
    read_key_file,
)

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["local", "kms"])
def masters(request: pytest.FixtureRequest) -> tuple[MasterKey, MasterKey, MasterKey]:
    """(the old key, the new key with the old one beside it, a stranger)."""
    if request.param == "local":
        old, new, other = material(1), material(2), material(3)
        return LocalMasterKey([old]), LocalMasterKey([new, old]), LocalMasterKey([other])
    kms = FakeKms("old", "new", "other")
    return KmsMasterKey(kms, "old"), KmsMasterKey(kms, "new", ["old"]), KmsMasterKey(kms, "other")


Masters = tuple[MasterKey, MasterKey, MasterKey]


async def test_what_is_wrapped_comes_back(masters: Masters) -> None:
    old, _, _ = masters
    wrapped = await old.wrap(b"k" * 32, b"context")
    assert wrapped.key_id == old.primary
    assert b"k" * 32 not in wrapped.blob
    assert await old.unwrap(wrapped, b"context") == b"k" * 32


async def test_another_context_or_a_changed_byte_does_not_open(masters: Masters) -> None:
    old, _, _ = masters
    wrapped = await old.wrap(b"k" * 32, b"context")
    with pytest.raises(VaultSealed):
        await old.unwrap(wrapped, b"other context")
    for position in range(len(wrapped.blob)):
        damaged = bytearray(wrapped.blob)
        damaged[position] ^= 1
        with pytest.raises(VaultSealed):
            await old.unwrap(Wrapped(wrapped.key_id, bytes(damaged)), b"context")
    for length in (0, 1, 12, len(wrapped.blob) - 1):
        with pytest.raises(VaultSealed):
            await old.unwrap(Wrapped(wrapped.key_id, wrapped.blob[:length]), b"context")


async def test_a_new_primary_key_reads_what_the_old_one_wrapped_and_writes_with_itself(masters: Masters) -> None:
    old, new, _ = masters
    wrapped = await old.wrap(b"k" * 32, b"context")
    assert await new.unwrap(wrapped, b"context") == b"k" * 32
    assert (await new.wrap(b"k" * 32, b"context")).key_id == new.primary != old.primary
    assert new.readable == {old.primary, new.primary}


async def test_a_key_that_is_not_there_is_named(masters: Masters) -> None:
    old, _, other = masters
    wrapped = await old.wrap(b"k" * 32, b"context")
    with pytest.raises(VaultSealed, match=old.primary):
        await other.unwrap(wrapped, b"context")


async def test_a_kms_that_is_away_is_a_sealed_vault_and_not_a_crash() -> None:
    kms = FakeKms("old")
    master = KmsMasterKey(kms, "old")
    wrapped = await master.wrap(b"k" * 32, b"context")
    kms.away = True
    with pytest.raises(VaultSealed, match="ConnectionError"):
        await master.unwrap(wrapped, b"context")
    with pytest.raises(VaultSealed):
        await master.wrap(b"k" * 32, b"context")


@given(st.binary(min_size=32, max_size=32))
def test_no_representation_shows_a_key(key: bytes) -> None:
    secret = KeyMaterial(key)
    for shown in (repr(secret), repr(LocalMasterKey([secret])), secret.id):
        assert base64.b64encode(key).decode() not in shown
        assert key.hex() not in shown
        assert repr(key) not in shown


@given(st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=4, unique=True), st.booleans())
def test_keys_are_read_in_order_in_both_alphabets(keys: list[bytes], url_safe: bool) -> None:
    encode = base64.urlsafe_b64encode if url_safe else base64.b64encode
    text = "# master keys\n" + ",\n".join(encode(key).decode().rstrip("=") for key in keys) + " # the end\n"
    assert [key.material for key in parse_keys(text, source="test")] == keys


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no master key"),
        ("# nothing\n", "no master key"),
        ("SECRET!!", "key 1 is not base64"),
        (base64.b64encode(b"short").decode(), "key 1 has 5 bytes"),
        ((base64.b64encode(b"k" * 32).decode() + " ") * 2, "twice"),
    ],
)
def test_a_wrong_setting_is_named_and_never_shown(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        parse_keys(text, source="CLAUDE_WRAPPER_MASTER_KEY")
    assert "CLAUDE_WRAPPER_MASTER_KEY" in caught.value.message
    for word in text.split():
        assert word in ("#", "nothing") or word not in caught.value.message


def test_a_key_file_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "master.key"
    made = create_key_file(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_key_file(path) == (made,)
    with pytest.raises(FileExistsError):
        create_key_file(path)
    assert read_key_file(path) == (made,)


def test_a_key_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "master.key"
    create_key_file(path)
    path.chmod(0o640)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        read_key_file(path)
    with pytest.raises(ConfigurationError, match="FileNotFoundError"):
        read_key_file(tmp_path / "absent")


def test_a_vault_without_a_key_is_a_wrong_configuration() -> None:
    with pytest.raises(ConfigurationError):
        LocalMasterKey([])
    with pytest.raises(ConfigurationError):
        KeyMaterial(b"short")
