"""Documents that can be wrong are checked: generated pages, links, and the commands that the README names."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from gateway.config.settings import ServeSettings

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

_spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "reference" / "generate.py")
assert _spec is not None
assert _spec.loader is not None
generate = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(generate)


@pytest.mark.parametrize("page", sorted(generate.PAGES))
def test_reference_pages_say_what_the_code_says(page: str) -> None:
    assert (ROOT / "docs" / "reference" / page).read_text() == generate.PAGES[page](), (
        "out of date: python docs/reference/generate.py"
    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", document.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (document.parent / target).exists(), target


def test_the_readme_names_commands_and_settings_that_exist() -> None:
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", text)) - {"minutes", "this"} <= targets | {"serve"}
    flags = {f"--{name.replace('_', '-')}" for name in ServeSettings.model_fields}
    for line in re.findall(r"^justitia (?:serve|gateway).*$", text, re.MULTILINE):
        assert set(re.findall(r"--[a-z-]+", line.partition("#")[0])) <= flags | {"--help"}


def test_every_decision_is_listed() -> None:
    listed = (ROOT / "docs" / "decisions" / "README.md").read_text()
    for page in (ROOT / "docs" / "decisions").glob("[0-9]*.md"):
        assert f"({page.name})" in listed
        assert f"{page.name[:4]}" in page.read_text().splitlines()[0]
