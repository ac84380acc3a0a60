"""Documents that can be wrong are checked: generated pages, links, and the commands, modules and paths that they name."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from gateway.cli.main import USAGE
from gateway.config.settings import ServeSettings

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
TEMPLATES = sorted((ROOT / "tests" / "benchmarks").rglob("*.md"))  # of the pages with figures

CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.DOTALL | re.MULTILINE)
PATH = re.compile(r"(?<![\w./$-])(?:gateway|engine|predictor|tests|deploy|docs|requirements)/[\w./-]*")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def code_in(document: Path) -> list[str]:
    """The code of a document: its blocks, and what stands between backticks."""
    return CODE.findall(document.read_text())


def anchors(document: Path) -> set[str]:
    """The places in a document that a link can name, as GitHub makes them of headings."""
    text = document.read_text()
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    made = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return made | set(re.findall(r'<a id="([^"]+)"', text))


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


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", document.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_into_documents_lead_to_a_heading(document: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*?)#([^)]+)\)", document.read_text()):
        if not target.startswith(("http://", "https://")):
            page = document.parent / target if target else document
            assert anchor in anchors(page), f"{target}#{anchor}"


@pytest.mark.parametrize("document", [*DOCUMENTS, *TEMPLATES], ids=name)
def test_modules_and_paths_that_are_named_exist(document: Path) -> None:
    for code in code_in(document):
        for module in re.findall(r"python3? -m ((?:gateway|engine|predictor|tests)\b[\w.]*)", code):
            assert importlib.util.find_spec(module) is not None, module
        for path in PATH.findall(code):
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize("document", [*DOCUMENTS, *TEMPLATES], ids=name)
def test_commands_and_settings_that_are_named_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = set(re.findall(r"^  ([a-z]+)  ", USAGE, re.MULTILINE))
    flags = {f"--{field.replace('_', '-')}" for field in ServeSettings.model_fields}
    variables = {f"JUSTITIA_{field.upper()}" for field in ServeSettings.model_fields} | {"JUSTITIA_CONFIG"}
    for code in code_in(document):
        assert set(re.findall(r"(?<![\w/])make ([a-z][a-z-]+)", code)) <= targets, code
        assert set(re.findall(r"(?:^|[`$] |`)justitia ([a-z]+)", code, re.MULTILINE)) <= commands, code
        assert set(re.findall(r"\bJUSTITIA_[A-Z_]*[A-Z]\b", code)) <= variables | {"JUSTITIA_NAME"}, code
        for line in re.findall(r"(?:^|`)justitia (?:serve|gateway) .*$", code, re.MULTILINE):
            assert set(re.findall(r"(?<=\s)--[a-z-]+", line.partition("#")[0])) <= flags | {"--help"}, line


def test_every_decision_is_listed() -> None:
    listed = (ROOT / "docs" / "decisions" / "README.md").read_text()
    for page in (ROOT / "docs" / "decisions").glob("[0-9]*.md"):
        assert f"({page.name})" in listed
        assert f"{page.name[:4]}" in page.read_text().splitlines()[0]
