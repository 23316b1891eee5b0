"""What an agent is made of: a caller's fields become a definition that is complete in itself. Pure.

References to other agents and skills stay as they were sent, in `Definition.references`; the store looks them up and
writes the versions that they mean at this moment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from claude_wrapper.errors import InvalidRequest
from claude_wrapper.sessions.resources.tools import require_connected, resolve_servers, resolve_tools
from claude_wrapper.sessions.resources.values import Fields, id_of, merged_metadata, metadata_of, name_of

MAX_SYSTEM: Final = 100_000
MAX_SKILLS: Final = 64
MAX_ROSTER: Final = 64
LATEST: Final = "latest"
_EFFORTS: Final = ("low", "medium", "high", "xhigh", "max")
_DEFAULT_EFFORT: Final = "high"
_FIELDS: Final = (
    *("name", "model", "description", "system", "tools", "mcp_servers", "skills"),
    *("metadata", "multiagent", "execution_identity"),
)
_CLEARABLE: Final = ("description", "system", "tools", "mcp_servers", "skills", "multiagent", "execution_identity")


@dataclass(frozen=True, slots=True)
class Definition:
    """A definition as the wire shows it; skills and other agents not yet looked up."""

    values: Mapping[str, Any]
    """name, description, system, model, tools, mcp_servers, skills, metadata, multiagent, execution_identity."""

    def to_json(self) -> dict[str, Any]:
        """A copy that may be changed."""
        return dict(self.values)


def new_definition(fields: Fields) -> Definition:
    """The definition of a create."""
    fields.only(*_FIELDS)
    for name in ("name", "model"):
        if not fields.given(name):
            raise InvalidRequest("is required", field=fields.at(name))
    values: dict[str, Any] = {name: _READERS[name](fields) for name in _FIELDS if name != "metadata"}
    values["metadata"] = metadata_of(fields)
    require_connected(values["tools"], values["mcp_servers"])
    return Definition(values)


def changed_definition(present: Mapping[str, Any], fields: Fields) -> Definition:
    """The definition after an update: what was sent replaces, `metadata` is merged, the rest stays."""
    fields.only(*_FIELDS, "version")
    values = dict(present)
    for name in _FIELDS:
        if not fields.has(name):
            continue
        if name == "metadata":
            patch = fields.maybe_object("metadata")
            values["metadata"] = merged_metadata(present["metadata"], patch) if patch else present["metadata"]
        elif fields.given(name) or name in _CLEARABLE:
            values[name] = _READERS[name](fields)
        else:
            raise InvalidRequest("cannot be cleared", field=fields.at(name))
    require_connected(values["tools"], values["mcp_servers"])
    return Definition(values)


def overridden(present: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    """A definition with a session's own model, system, tools, MCP servers and skills in place of the agent's."""
    values = dict(present)
    for name in ("model", "system", "tools", "mcp_servers", "skills"):
        if fields.given(name) or (fields.has(name) and name != "model"):
            values[name] = _READERS[name](fields)
    require_connected(values["tools"], values["mcp_servers"])
    return values


def resolve_model(fields: Fields) -> dict[str, Any]:
    """`model`: a name, or an object with effort, speed and region; effort and speed always present in the result."""
    value = fields.data.get("model")
    if isinstance(value, str):
        return {"id": _model_id(value, fields.at("model")), "effort": {"type": _DEFAULT_EFFORT}, "speed": "standard"}
    model = fields.object("model").only("id", "effort", "speed", "inference_geo")
    resolved: dict[str, Any] = {"id": _model_id(model.data.get("id"), model.at("id"))}
    effort = model.data.get("effort")
    if effort is None:
        resolved["effort"] = {"type": _DEFAULT_EFFORT}
    elif isinstance(effort, str):
        resolved["effort"] = {"type": model.one_of("effort", *_EFFORTS)}
    else:
        resolved["effort"] = {"type": model.object("effort").only("type").one_of("type", *_EFFORTS)}
    resolved["speed"] = model.one_of("speed", "standard", "fast") if model.given("speed") else "standard"
    if (region := model.maybe_text("inference_geo", most=64, least=1)) is not None:
        resolved["inference_geo"] = region
    return resolved


def _model_id(value: Any, path: str) -> str:
    name = name_of(value, path, most=256)
    if any(character.isspace() for character in name):
        raise InvalidRequest("is not a model's name", field=path)
    return name


def _skills(fields: Fields) -> list[dict[str, Any]]:
    skills: list[dict[str, Any]] = []
    for skill in fields.objects("skills", most=MAX_SKILLS):
        kind = skill.only("type", "skill_id", "version").one_of("type", "custom", "anthropic")
        path = skill.at("skill_id")
        skill_id = (
            id_of(skill.data.get("skill_id"), path, "skill") if kind == "custom" else skill.text("skill_id", most=64)
        )
        if any(other["skill_id"] == skill_id for other in skills):
            raise InvalidRequest("the skill is there twice", field=path)
        version = skill.maybe_text("version", most=128, least=1) or LATEST
        skills.append({"type": kind, "skill_id": skill_id, "version": version})
    return skills


def _identity(fields: Fields) -> dict[str, Any]:
    identity = fields.maybe_object("execution_identity")
    if identity is not None and identity.one_of("type", "service_account", "aws_role") == "aws_role":
        raise InvalidRequest("this server cannot act as an AWS role", field=identity.at("type"))
    return {"type": "service_account"}


def _multiagent(fields: Fields) -> dict[str, Any] | None:
    given = fields.maybe_object("multiagent")
    if given is None:
        return None
    if given.one_of("type", "coordinator", "multiagent_20261001") == "coordinator":
        roster = [_roster_entry(member, path, advisor=True) for member, path in given.items("agents", most=MAX_ROSTER)]
        if not roster:
            raise InvalidRequest("must not be empty", field=given.at("agents"))
        if sum(member["type"] == "advisor" for member in roster) > 1:
            raise InvalidRequest("at most one advisor", field=given.at("agents"))
        given.only("type", "agents")
        return {"type": "coordinator", "agents": roster}
    given.only("type", "advisor", "subagents", "workflows")
    return {
        "type": "multiagent_20261001",
        "advisor": _advisor(given),
        "subagents": _team(given, "subagents"),
        "workflows": _team(given, "workflows"),
    }


def _advisor(given: Fields) -> dict[str, Any]:
    advisor = given.maybe_object("advisor")
    if advisor is None or advisor.one_of("type", "enabled", "disabled") == "disabled":
        return {"type": "disabled"}
    return {"type": "enabled", "model": _model_id(advisor.data.get("model"), advisor.at("model"))}


def _team(given: Fields, name: str) -> dict[str, Any]:
    team = given.maybe_object(name)
    if team is None or team.one_of("type", "enabled", "disabled") == "disabled":
        return {"type": "disabled"}
    team.only("type", "inline_agents", "predefined_agents")
    inline = team.maybe_object("inline_agents")
    kind = inline.only("type").one_of("type", "enabled", "disabled") if inline is not None else "enabled"
    members = team.items("predefined_agents", most=MAX_ROSTER)
    agents = [_roster_entry(member, path, advisor=False) for member, path in members]
    return {"type": "enabled", "inline_agents": {"type": kind}, "predefined_agents": agents}


def _roster_entry(value: Any, path: str, *, advisor: bool) -> dict[str, Any]:
    if isinstance(value, str):
        return {"type": "agent", "id": id_of(value, path, "agent")}
    entry = Fields.of(value, path)
    kind = entry.one_of("type", "agent", "self", *(("advisor",) if advisor else ()))
    if kind == "self":
        return {"type": "self"}
    if kind == "advisor":
        return {"type": "advisor", "model": _model_id(entry.data.get("model"), entry.at("model"))}
    resolved: dict[str, Any] = {"type": "agent", "id": id_of(entry.data.get("id"), entry.at("id"), "agent")}
    if (version := entry.only("type", "id", "version").integer("version", least=1, most=2**31 - 1)) is not None:
        resolved["version"] = version
    return resolved


_READERS: Final[Mapping[str, Callable[[Fields], Any]]] = {
    "name": lambda fields: name_of(fields.data["name"], fields.at("name"), most=256),
    "model": resolve_model,
    "description": lambda fields: fields.maybe_text("description", most=2048) or None,
    "system": lambda fields: fields.maybe_text("system", most=MAX_SYSTEM) or None,
    "tools": resolve_tools,
    "mcp_servers": resolve_servers,
    "skills": _skills,
    "multiagent": _multiagent,
    "execution_identity": _identity,
}
