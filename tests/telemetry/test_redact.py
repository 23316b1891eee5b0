"""No secret survives, wherever it stands; ordinary words do."""

from __future__ import annotations

import json
import string

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from claude_wrapper.telemetry.redact import (
    MASK,
    MAX_DEPTH,
    MAX_LITERAL,
    MAX_LITERALS,
    MAX_TEXT,
    SHAPES,
    Redactor,
    secret_name,
)

TAIL = st.text(string.ascii_letters + string.digits + "_-", min_size=24, max_size=80)
ALNUM = st.text(string.ascii_letters + string.digits, min_size=24, max_size=60)
AROUND = st.text(" .,:;äß€\n\t\"'\\{}[]<>()=", max_size=30)
UPPER = st.text(string.ascii_uppercase + string.digits, min_size=16, max_size=16)


@st.composite
def shaped_secrets(draw: st.DrawFn) -> tuple[str, str]:
    """(a text as it would be met, the part that must not survive)."""
    tail, alnum = draw(TAIL), draw(ALNUM)
    upper = draw(UPPER)
    choices = [
        (f"sk-ant-api03-{tail}", tail),
        (f"sk-ant-oat01-{tail}", tail),
        (f"sk-ant-ort01-{tail}", tail),
        (f"sk-cw-{tail}", tail),
        (f"sk-env-{tail}", tail),
        (f"Bearer {tail}", tail),
        (f"authorization: Basic {alnum}", alnum),
        (f"eyJ{alnum}.eyJ{alnum}.{tail}", tail),
        (f"whsec_{alnum}", alnum),
        (f"AKIA{upper}", upper),
        (f"ghp_{alnum}", alnum),
        (f"ya29.{tail}", tail),
        (f"postgresql://app:{tail}@db.internal/x", tail),
        (f"https://h/cb?access_token={tail}&x=1", tail),
        (f'{{"refresh_token": "{tail}"}}', tail),
        (f"client_secret={alnum}", alnum),
        (f"-----BEGIN RSA PRIVATE KEY-----\n{alnum}\n-----END RSA PRIVATE KEY-----", alnum),
    ]
    return draw(st.sampled_from(choices))


def places(secret: str) -> list[object]:
    return [
        secret,
        [secret],
        {"message": secret},
        {"a": {"b": [{"c": (secret,)}]}},
        {secret: 1},
        {"text": json.dumps({"inner": secret})},
    ]


@given(shaped_secrets(), AROUND, AROUND)
@settings(max_examples=300, deadline=None)
def test_a_secret_with_a_known_shape_never_survives_in_any_place(
    secret: tuple[str, str], before: str, after: str
) -> None:
    text, kernel = secret
    # Around it stand spaces: a letter that touches "sk-" or "ghp_" would make another word of it.
    for place in places(f"{before} {text} {after}"):
        assert kernel not in json.dumps(Redactor().structure(place))


@given(st.text(min_size=8, max_size=200), st.text(max_size=50), st.text(max_size=50))
@settings(max_examples=200, deadline=None)
def test_a_registered_literal_never_survives_whatever_it_looks_like(secret: str, before: str, after: str) -> None:
    redactor = Redactor([secret])
    assume(secret not in " ".join(_flat(redactor.structure(places(before + " " + after)))))
    for place in places(before + secret + after):
        assert not [piece for piece in _flat(redactor.structure(place)) if secret in piece]


def _flat(value: object) -> list[str]:
    if isinstance(value, dict):
        return [piece for key, one in value.items() for piece in (str(key), *_flat(one))]
    if isinstance(value, list):
        return [piece for one in value for piece in _flat(one)]
    return [str(value)]


@pytest.mark.parametrize(
    "name",
    [
        "password", "Authorization", "x-api-key", "api_key", "apiKey", "refresh_token", "accessToken", "client_secret",
        "cookie", "set-cookie", "credential", "oauth_credentials", "master_key", "signing_secret", "pepper", "pwd",
        "access_tokens", "secret_value", "private_key", "aws_secret_access_key",
    ],
)  # fmt: skip
def test_what_stands_under_a_secret_name_is_masked_whatever_it_is(name: str) -> None:
    for value in ("x", "hunter22", ["a"], {"b": "c"}, b"raw"):
        assert Redactor().structure({name: value}) == {name: MASK}


@pytest.mark.parametrize(
    "name",
    [
        "input_tokens",
        "max_tokens",
        "key",
        "request",
        "session",
        "credential_id",
        "token_type",
        "author",
        "model",
        "api_key_id",
    ],
)
def test_names_that_only_look_secret_keep_their_values(name: str) -> None:
    assert Redactor().structure({name: 12}) == {name: 12}


@pytest.mark.parametrize(
    "text",
    [
        "task-management is a word with sk- in it",
        "the risk-assessment-of-this-plan",
        "tokens: 12345678",
        "basic authentication is not supported; use a key",
        "https://api.anthropic.com/v1/messages",
        "input_tokens=123456789",
        "connection to postgresql://db.internal:5432/app refused",
    ],
)
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert Redactor().text(text) == text


@given(shaped_secrets())
@settings(max_examples=100, deadline=None)
def test_masking_an_encoded_line_leaves_valid_json(secret: tuple[str, str]) -> None:
    text, kernel = secret
    line = json.dumps({"event": "x.y", "message": f'said "{text}" and \\ {text}\n', "nested": {"cancel_token": text}})
    masked = Redactor().text(line)
    json.loads(masked)
    assert kernel not in masked


@given(st.integers(0, MAX_LITERAL))
@settings(max_examples=30, deadline=None)
def test_a_secret_that_the_cut_would_halve_leaves_no_half(shift: int) -> None:
    secret = "Zq9" * 20
    text = "y" * (MAX_TEXT + shift) + " " + secret + " " + "y" * 3 * MAX_LITERAL
    shown = Redactor([secret]).text(text)
    assert "Zq" not in shown
    assert len(shown) < MAX_TEXT + MAX_LITERAL


def test_a_literal_that_begins_with_another_leaves_no_rest() -> None:
    redactor = Redactor(["abcdefgh", "abcdefghijklmnop"])
    assert redactor.text("<abcdefghijklmnop>") == f"<{MASK}>"


def test_a_forgotten_literal_is_shown_again_and_short_ones_are_refused() -> None:
    redactor = Redactor(["correct horse"])
    redactor.forget("correct horse")
    assert redactor.text("correct horse") == "correct horse"
    with pytest.raises(ValueError, match="8 to 4096"):
        redactor.register("short")


def test_the_number_of_literals_is_bounded() -> None:
    redactor = Redactor(f"literal-{n:06}" for n in range(MAX_LITERALS))
    with pytest.raises(ValueError, match="forget"):
        redactor.register("one too many")


def test_deep_and_wide_structures_are_cut() -> None:
    deep: object = "x"
    for _ in range(MAX_DEPTH + 20):
        deep = [deep]
    assert "nested too deep" in json.dumps(Redactor().structure(deep))
    assert len(Redactor().structure(list(range(100_000)))) == 200


def test_foreign_objects_are_shown_by_type_alone() -> None:
    class Holder:
        def __repr__(self) -> str:
            return "sk-ant-secret"

    assert Redactor().structure({"x": Holder(), "y": b"sk-ant"}) == {"x": "[Holder]", "y": "[6 bytes]"}


def test_the_name_test_is_not_fooled_by_case_or_dashes() -> None:
    assert secret_name("X-Api-Key")
    assert secret_name("Proxy-Authorization")
    assert not secret_name("monkey")


def test_a_redactor_does_not_show_its_literals() -> None:
    assert "correct horse" not in repr(Redactor(["correct horse"]))


@given(
    st.lists(st.sampled_from([*"aT1_- :=\"'\\\n{,", "token", "Secret", "api_key", "PASSWORD", "apikey_", "abcdef12"]))
)
@settings(max_examples=300, deadline=None)
def test_a_guard_lets_everything_pass_that_its_pattern_would_find(pieces: list[str]) -> None:
    text = "".join(pieces)
    for shape in SHAPES:
        if shape.guard is not None and shape.pattern.search(text):
            assert shape.guard.search(text.lower())
