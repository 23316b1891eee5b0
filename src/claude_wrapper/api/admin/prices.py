"""`/v1/organizations/prices`: what the operator agreed on with an organisation, instead of the list. Ours."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response

from claude_wrapper.api.admin.apikeys import Moment
from claude_wrapper.api.admin.http import OPERATOR, AdminRoute, Asked, json, sliced
from claude_wrapper.errors import InvalidRequest, NotFound
from claude_wrapper.usage.cost import Price
from claude_wrapper.usage.prices import Dated, list_own, remove_own, set_own


class NewPrice(msgspec.Struct, forbid_unknown_fields=True):
    """What calls of `model` (a name, or the beginning of names) cost from a moment on, as an entry of `prices.json`."""

    model: str
    effective_from: Moment
    price: dict[str, Any]


async def list_prices(asked: Asked) -> Response:
    """The organisation's own prices; what they do not name is priced by the list."""
    return sliced([_view(one) for one in await asked.see(list_own)], asked, lambda row: str(row["id"]))


async def set_price(asked: Asked) -> Response:
    """Agree on a price from a moment on. Calls that are recorded already keep their cost."""
    body = await asked.body(NewPrice)
    own = Dated(body.model, body.effective_from, Price.parse(body.price))
    await asked.do(set_own, own)
    return json(_view(own))


async def delete_price(asked: Asked) -> Response:
    """Take a price back: from then on the one before it holds, else the list's."""
    model, since = asked.one("model"), asked.moment("effective_from")
    if model is None or since is None:
        raise InvalidRequest("is needed", field="model" if model is None else "effective_from")
    if not await asked.do(remove_own, model, since):
        raise NotFound(f"there is no own price of {model!r} from {since.isoformat()}")
    return json({"type": "price_deleted", "model": model, "effective_from": since})


def _view(own: Dated) -> dict[str, Any]:
    since = own.effective_from
    ident = f"{own.model}@{since.isoformat()}"
    return {"id": ident, "type": "price", "model": own.model, "effective_from": since, "price": own.price.to_json()}


_PATH = "/v1/organizations/prices"

ROUTES = (
    AdminRoute("GET", _PATH, "read:costs", list_prices, query=("limit", "page")),
    AdminRoute("POST", _PATH, OPERATOR, set_price, NewPrice),
    AdminRoute("DELETE", _PATH, OPERATOR, delete_price, query=("model", "effective_from")),
)
