"""Which model and credential are asked when the first ones fail. Pure.

An organisation may name models to ask instead of an overloaded one, and may let a refused credential be replaced by its
next one. Both are tried only before the first byte of an answer, each at most once, and never with a credential that is
not the organisation's own: the server's is nobody's stand-in.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from claude_wrapper.broker.calls import Credential, CredentialKind, Standby
from claude_wrapper.tenancy.principal import may_use
from claude_wrapper.vault.resolve import OPERATOR_CREDENTIAL

_CREDENTIAL_STATUSES = frozenset({401, 402, 403, 429})
"""The credential is wrong, unpaid, not allowed or used up: another one may do."""


class Fault(enum.StrEnum):
    """Whose failure it was."""

    MODEL = "model"
    """Overloaded, broken or unreachable (5xx, 529, no answer, an open breaker): another model may do."""
    CREDENTIAL = "credential"
    REQUEST = "request"
    """The request itself: whoever is asked would say the same."""


def fault_of(status: int) -> Fault:
    """What a failed attempt's status blames."""
    if status in _CREDENTIAL_STATUSES:
        return Fault.CREDENTIAL
    return Fault.MODEL if status >= 500 else Fault.REQUEST


@dataclass(frozen=True, slots=True)
class Candidate:
    """Who may be asked."""

    model: str
    credential: Credential


Trail = Sequence[tuple[Candidate, Fault]]
"""Who was asked, in order, and how each failed."""


def following(
    trail: Trail, standby: Standby, *, allowed_models: frozenset[str] | None, other_models: bool
) -> Candidate | None:
    """Who is asked after these failures; None: nobody, the first failure stands.

    `allowed_models`: what the caller's key may use (that it may use the first one was checked before, by the name that it
    was asked for). `other_models` is False for requests whose answer depends on the model that was named (a token count).
    """
    first, last = trail[0][0], trail[-1]
    if last[1] is Fault.REQUEST or not replaceable(first.credential):
        return None
    failed_models = {asked.model for asked, fault in trail if fault is Fault.MODEL}
    failed_credentials = {asked.credential.id for asked, fault in trail if fault is Fault.CREDENTIAL}
    models = [first.model, *(standby.models_after(first.model) if other_models else ())]
    credentials = [first.credential, *(one for one in standby.credentials if _stands_in(one, first.credential))]
    for model in models:
        if model in failed_models or not (model == first.model or may_use(allowed_models, model)):
            continue
        for credential in credentials:
            if credential.id not in failed_credentials:
                return Candidate(model, credential)
    return None


def replaceable(credential: Credential) -> bool:
    """Whether requests under this credential may be changed at all: those of a subscription go out as the CLI wrote them."""
    return credential.kind is CredentialKind.API_KEY


def _stands_in(one: Credential, first: Credential) -> bool:
    """Never the operator's for a tenant's, nor the other way round, and never another kind."""
    return one.kind is first.kind and OPERATOR_CREDENTIAL not in (one.id, first.id)


def standby_of(models: Mapping[str, tuple[str, ...]], credentials: Sequence[Credential]) -> Standby | None:
    """None when there is nothing to fall back on, so that an organisation without such a policy costs nothing."""
    return Standby(models, tuple(credentials)) if models or credentials else None
