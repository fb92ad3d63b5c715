"""README.md and docs/: every Python block runs, prints what it says it prints, and every command parses.

The blocks of a page run in its order in one namespace. A line ``print(...)  # -> text`` prints just that. Blocks marked
``python gpu`` need a GPU and are only compiled elsewhere. Commands in blocks marked ``sh run`` are run; those in other
blocks are parsed; of those within a line, ``fusedres ...``, command and options must exist. Links lead somewhere.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from test_cli import ROOT, subcommands

from fusedres import cli

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNNERS = r"(?:torchrun .*?-m fusedres|python -m fusedres|fusedres)"


class Block(NamedTuple):
    """A fenced block: what stands behind its opening fence, the number of its first line, and its text."""

    info: str
    line: int
    text: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(match[1].strip(), text[: match.start()].count("\n") + 2, match[2]) for match in found]


def commands(block: Block) -> list[list[str]]:
    """The arguments of every ``fusedres`` command of a shell block."""
    lines = block.text.replace("\\\n", " ").splitlines()
    matches = (re.match(rf"{RUNNERS} (.*)", line) for line in lines)
    return [shlex.split(match[1], comments=True) for match in matches if match]


def with_blocks(condition: Any) -> list[Any]:
    return [pytest.param(page, id=page.name) for page in PAGES if any(map(condition, blocks(page)))]


def is_python(block: Block) -> bool:
    return block.info.split()[:1] == ["python"]


def is_shell(block: Block) -> bool:
    return block.info.split()[:1] in ([], ["sh"])


def is_run(block: Block) -> bool:
    return block.info == "sh run"


@pytest.mark.parametrize("page", with_blocks(is_python))
def test_python_blocks_run_and_print_what_they_say(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, one_thread: None
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": page.stem}
    for block in filter(is_python, blocks(page)):
        # Empty lines before it, so that a traceback names the line of the page.
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        if block.info == "python gpu" and not torch.cuda.is_available():
            continue
        exec(code, namespace)
        promised = re.findall(r"# -> (.*)$", block.text, re.MULTILINE)
        printed = capsys.readouterr().out.splitlines()
        assert [line for line in printed if line in promised] == promised, (page.name, block.line, printed)


@pytest.mark.parametrize("page", with_blocks(is_shell))
def test_shell_blocks_name_commands_that_exist(page: Path) -> None:
    parser = cli.make_parser()
    makefile = (ROOT / "Makefile").read_text()
    for block in filter(is_shell, blocks(page)):
        for arguments in commands(block):
            parser.parse_args(arguments)
        for target in re.findall(r"^make (\w+)", block.text, re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("page", with_blocks(is_run))
def test_marked_shell_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.chdir(tmp_path)
    for block in filter(is_run, blocks(page)):
        assert commands(block)
        for arguments in commands(block):
            assert cli.main(arguments) == 0, arguments


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_within_the_text_exist(page: Path) -> None:
    named = subcommands(cli.make_parser())
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(rf"`{RUNNERS} ([^`]+)`", text):
        name, *words = shlex.split(code)
        parser = named[name]
        for word in words:
            parser = subcommands(parser).get(word, parser)
            assert not word.startswith("--") or word in parser._option_string_actions, code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_pages_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert all((page.parent / link).exists() for link in links), links
    named = re.findall(r"\bdocs/\w+\.(?:md|png|csv|json)\b", text)
    assert all((ROOT / name).exists() for name in named), named


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"docs/{page.name}" not in readme] == []
