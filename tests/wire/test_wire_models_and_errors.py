"""Model lists, and which error goes with which status."""

from __future__ import annotations

import pytest

from claude_wrapper.testing import MODELS
from claude_wrapper.wire.errorbody import STATUS_OF_TYPE, type_of_status
from claude_wrapper.wire.models import find_model, list_to_wire, model_to_wire


@pytest.mark.parametrize(
    ("status", "kind"), [(418, "invalid_request_error"), (429, "rate_limit_error"), (599, "api_error")]
)
def test_every_status_has_a_type(status: int, kind: str) -> None:
    assert type_of_status(status) == kind


def test_types_and_statuses_agree_in_both_directions() -> None:
    assert {kind: type_of_status(status) for kind, status in STATUS_OF_TYPE.items()} == {k: k for k in STATUS_OF_TYPE}


def test_a_model_has_what_both_families_look_for() -> None:
    item = model_to_wire(MODELS[0])
    assert {
        "type": "model",
        "object": "model",
        "id": "claude-opus-5-5",
        "owned_by": "anthropic",
    }.items() <= item.items()
    assert isinstance(item["created"], int)
    assert item["capabilities"]["thinking"]["types"]["adaptive"] == {"supported": True}


def test_models_are_found_by_id_and_alias_only() -> None:
    assert find_model(MODELS, "sonnet") is find_model(MODELS, "claude-sonnet-5-5") is MODELS[1]
    assert find_model(MODELS, "sonne") is None


def test_pages_follow_the_cursors_without_gap_or_overlap() -> None:
    ids = [model.id for model in MODELS]
    first = list_to_wire(MODELS, limit=2)
    second = list_to_wire(MODELS, limit=2, after_id=first["last_id"])
    assert [item["id"] for page in (first, second) for item in page["data"]] == ids
    assert (first["has_more"], second["has_more"]) == (True, False)
    back = list_to_wire(MODELS, limit=1, before_id=ids[2])
    assert ([item["id"] for item in back["data"]], back["has_more"]) == ([ids[1]], True)
    assert list_to_wire(MODELS, after_id="unknown")["data"] == []
