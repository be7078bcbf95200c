"""What documents say is there: links, commands, flags, messages."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import yaml

from bm3il.launch import cli
from bm3il.protocol.codec import PROTOCOL_VERSION
from bm3il.protocol.messages import BODIES

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *(page for page in DOCS if not page.is_symlink())]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9.-]*[a-z0-9]")
FOREIGN = {"--no-kill", "--rows", "--worlds", "--vehroute-output"}
"""Of Slurm, of benchmarks, and of SUMO."""


def headings(page: Path) -> set[str]:
    """Anchors, as GitHub and the site make them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower().replace("`", "")).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        where = (page.parent / path) if path else page
        assert where.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in headings(where), f"{page.name}: {target}"


def test_every_page_is_in_the_site() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = re.findall(r"[\w/]+\.md", str(yaml.safe_load(text)["nav"]))
    assert sorted(pages) == [page.name for page in DOCS]


@cache
def flags_of(command: str) -> frozenset[str]:
    """All that `bm3il COMMAND --help` names, sub-commands included."""
    import contextlib
    import io

    found: set[str] = set(flags_of("train")) if command == "submit" else set()
    for rest in ([], ["import"], ["record"], ["clean"], ["inspect"]):
        if rest and command not in ("demonstrations", "scenario"):
            continue
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            cli.main([command, *rest, "--help"])
        found |= set(FLAG.findall(shown.getvalue()))
    return frozenset(found)


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """Every `bm3il COMMAND …` of a page, with its flags."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for _, block in FENCE.findall(text) for line in block.splitlines()]
    lines += re.findall(r"`(bm3il [^`\n]+)`", text)
    found = []
    for line in lines:
        for command, rest in re.findall(r"(?:^|[;&] |/|\$ )bm3il ([a-z-]+)\b([^#|]*)", line):
            found.append((command, FLAG.findall(re.sub(r'"[^"]*"', "", rest))))  # names of environments
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_flags_are_there(page: Path) -> None:
    for command, flags in commands(page):
        assert command in cli.COMMANDS, f"{page.name}: bm3il {command}"
        for flag in set(flags) - flags_of(command):
            pytest.fail(f"{page.name}: bm3il {command} has no {flag}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_in_the_text_are_those_of_some_command(page: Path) -> None:
    known = frozenset().union(*(flags_of(command) for command in cli.COMMANDS)) | FOREIGN
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    named = {
        flag
        for span in re.findall(r"`([^`\n]+)`", text)
        for flag in FLAG.findall(span)
        if "python" not in span and not span.startswith("remote:")
    }
    assert not named - known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_documents_is_python(page: Path) -> None:
    for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            compile(block, page.name, "exec")


def test_the_wire_is_documented_as_it_is() -> None:
    text = (ROOT / "docs/wire.md").read_text(encoding="utf-8")
    assert f'"v": {PROTOCOL_VERSION},' in text
    assert [kind for kind in BODIES if f"`{kind}`" not in text] == []
