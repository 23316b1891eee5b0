"""Documents that are generated from tables in the code are what the code says today."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from claude_wrapper.api.errors import ANTHROPIC
from claude_wrapper.cli.documents import DOCUMENTS
from claude_wrapper.config import Settings, documentation, load
from claude_wrapper.errors import ConfigurationError, WrapperError

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#]+)")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_generated_document_is_up_to_date(name: str) -> None:
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == DOCUMENTS[name](), "run `make docs`"


def _subclasses(kind: type[WrapperError]) -> set[type[WrapperError]]:
    found = set(kind.__subclasses__())
    return found.union(*(_subclasses(one) for one in found)) if found else found


def test_every_error_code_has_a_row_in_the_dialect_table() -> None:
    import claude_wrapper.app  # noqa: F401 - so that every error class of the server is known

    codes = {kind.code for kind in _subclasses(WrapperError) if kind.__module__.startswith("claude_wrapper")}
    assert codes <= set(ANTHROPIC)


def test_every_link_between_documents_leads_somewhere() -> None:
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")):
        for target in LINK.findall(page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_is_linked_from_the_readme_or_from_a_page_that_is() -> None:
    pages = {*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")}
    found, new = set(), {ROOT / "README.md"}
    while new:
        found |= new
        links = {(page.parent / one).resolve() for page in new for one in LINK.findall(page.read_text("utf-8"))}
        new = (links & pages) - found
    assert sorted(str(page.relative_to(ROOT)) for page in pages - found) == []


def test_an_unknown_setting_is_an_error_that_names_it() -> None:
    with pytest.raises(ConfigurationError, match="CLAUDE_WRAPPER_TYPO"):
        load({"CLAUDE_WRAPPER_TYPO": "1"})


def test_a_toml_file_sets_what_the_environment_does_not(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('port = 9000\nspares = 4\negress_hosts = ["a.example", "b.example"]\nallow_oauth = true\n')
    settings = load({"CLAUDE_WRAPPER_PORT": "9001"}, file=file)
    assert (settings.port, settings.spares, settings.allow_oauth) == (9001, 4, True)
    assert settings.egress_hosts == ("a.example", "b.example")
    file.write_text("prot = 1\n")
    with pytest.raises(ConfigurationError, match="prot"):
        load({}, file=file)


@pytest.mark.parametrize(
    ("variable", "value"),
    [("PORT", "high"), ("SANDBOX", "chroot"), ("SPARES", "-1"), ("ALLOW_OAUTH", "perhaps"), ("LOG_LEVEL", "loud")],
)
def test_a_bad_value_is_an_error_that_names_the_setting(variable: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=f"CLAUDE_WRAPPER_{variable}"):
        load({f"CLAUDE_WRAPPER_{variable}": value})


def test_secrets_are_in_no_representation() -> None:
    settings = Settings(admin_key="hush-hush-hush-hush", anthropic_api_key="sk-ant-hush")
    assert "hush" not in repr(settings)
    assert "CLAUDE_WRAPPER_ADMIN_KEY" in documentation()
