"""The pages: current where the code writes them, links that lead somewhere, commands that exist."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

import shape_moe
from shape_moe.architectures.families import FAMILIES
from shape_moe.architectures.refused_families import REFUSED
from shape_moe.cli.main import VERBS, command
from support.family_models import TINY
from support.tiny_models import FAMILIES as FIRST_FAMILIES

PROJECT = Path(__file__).parents[1]
PAGES = [*sorted((PROJECT / "docs").glob("*.md")), *sorted(PROJECT.glob("*.md"))]
COMMANDS = typer.main.get_command(command()).commands


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, PROJECT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_of_the_command_is_current() -> None:
    made = script("make_cli_reference").text()
    assert (PROJECT / "docs" / "cli.md").read_text(encoding="utf-8") == made, "run make docs"
    for verb in VERBS:
        for param in COMMANDS[verb].params:
            assert all(f"`{name}" in made for name in param.opts if name not in {"--help-all", param.name})


def test_the_list_of_families_is_current_and_each_is_tested() -> None:
    made = script("make_families_page").text()
    assert (PROJECT / "docs" / "families.md").read_text(encoding="utf-8") == made, "run make docs"
    tested = {name.removesuffix("_grouped") for name in FIRST_FAMILIES} | set(TINY)
    assert tested == set(FAMILIES)
    assert not set(REFUSED) & set(FAMILIES)


def test_the_number_of_families_is_the_same_everywhere() -> None:
    said = {
        page.name: re.findall(r"\b(\d+) (?:model )?families\b", page.read_text(encoding="utf-8"))
        for page in (*PAGES, PROJECT / "pyproject.toml")
    }
    assert {name for name, numbers in said.items() if numbers} >= {"README.md", "families.md", "CHANGELOG.md"}
    assert {number for numbers in said.values() for number in numbers} == {str(len(FAMILIES))}


def test_the_reference_of_the_package_names_all_of_it() -> None:
    page = (PROJECT / "docs" / "api.md").read_text(encoding="utf-8")
    made = script("make_api_reference").text()
    names = [name for name in shape_moe.__all__ if not name.startswith("__")]
    for text in (page, made):
        assert re.findall(r"^### (\w+)$", text, flags=re.MULTILINE) == sorted(
            names, key=lambda name: (inspect.isclass(getattr(shape_moe, name)), names.index(name))
        )
    assert "    keep: float | None = None,\n" in made
    assert " object at 0x" not in made


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def said_commands() -> list[tuple[str, str]]:
    """Every line of the pages' shell blocks that calls this package, with its page; continued lines are joined."""
    found = []
    for page in PAGES:
        for block in blocks(page.read_text(encoding="utf-8"), "bash"):
            whole = block.replace("\\\n", " ")
            found += [(page.name, line) for line in re.findall(r"(?:^|[\s/;])shape-moe (\w[\w-]*.*)", whole)]
    return found


def test_commands_on_the_pages_have_verbs_and_options_that_exist() -> None:
    said = said_commands()
    assert len(said) >= 60
    for page, line in said:
        verb, *words = shlex.split(line, comments=True)
        assert verb in COMMANDS, f"{page}: {line}"
        known = {name for param in COMMANDS[verb].params for name in (*param.opts, *param.secondary_opts)}
        known |= {"--help", "-h"}
        given = [word.split("=")[0] for word in words if re.fullmatch(r"--?[a-z][\w-]*(=.*)?", word)]
        if verb != "serve":  # whose other options are vLLM's
            assert [name for name in given if name not in known] == [], f"{page}: {line}"


def anchors(text: str) -> set[str]:
    """The anchors that Markdown viewers make of headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{page.name}: {target}"


def test_every_page_can_be_found() -> None:
    """From the README, directly or through a page that it leads to."""
    links = re.compile(r"(?:docs/|\]\()([\w-]+\.md)")
    first = set(links.findall((PROJECT / "README.md").read_text(encoding="utf-8")))
    pages = {page.name for page in (PROJECT / "docs").glob("*.md")}
    second = {name for page in first & pages for name in links.findall((PROJECT / "docs" / page).read_text("utf-8"))}
    assert pages - first - second == set()


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((PROJECT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == shape_moe.__version__
    assert cited["license"] == "Apache-2.0"
    assert "2606.09886" in cited["references"][0]["url"]


def test_no_address_is_invented() -> None:
    for page in PAGES:
        assert re.findall(r"[\w.+-]+@[\w-]+\.(?:com|org|net|io|dev)\b", page.read_text(encoding="utf-8")) == []
