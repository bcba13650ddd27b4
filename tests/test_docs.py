"""The pages are true: every python block runs, every printed line is printed, every table and link matches the tree.

Blocks of one page run in order and share a namespace. A comment above a block says what is special about it:

    <!-- test: raises Refusal -->    the block raises this error of flashdp_compile, which then counts as printed
    <!-- test: raises Refusal, not on torch 2.11 -->    there it runs without an error
    <!-- test: prints -->            above a text block: the python block before it prints these lines; ... skips any
    <!-- test: needs a GPU -->       runs only where there is one
    <!-- test: fragment -->          only has to be valid Python

A python block within a comment is setup that a reader does not need to see. All of it runs with compiler="eager" where
the page does not set one, so that it is quick.
"""

import ast
import contextlib
import io
import linecache
import re
import sys
import types
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch

import flashdp_compile
import flashdp_compile.pipeline  # fills the table of rules, which is put back behind every page
from flashdp_compile.options import Options
from flashdp_compile.passes.axes import registry

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]

_BLOCK = re.compile(
    r"^(?:<!-- test: (?P<mark>[^\n]*?) -->\n+)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    language: str
    mark: str
    code: str
    line: int  # of the first line of code, from 1


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(m["language"], m["mark"] or "", m["code"], 1 + text.count("\n", 0, m.start("code")))
        for m in _BLOCK.finditer(text)
    ]


class Namespace:
    """Runs the blocks of a page as if the page were a module, with the page's own line numbers."""

    def __init__(self, page: Path) -> None:
        self.file = str(page.relative_to(ROOT))
        self.module = types.ModuleType("page_" + re.sub(r"\W", "_", self.file))
        self.module.__file__ = str(page)
        sys.modules[self.module.__name__] = self.module  # dynamo looks globals up by the module's name
        lines = page.read_text(encoding="utf-8").splitlines(keepends=True)
        linecache.cache[self.file] = (sum(map(len, lines)), None, lines, self.file)

    def run(self, block: Block) -> str:
        tree = ast.increment_lineno(ast.parse(block.code, self.file), block.line - 1)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, self.file, "exec"), self.module.__dict__)
        return printed.getvalue()


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Compilation by interpreter unless a page says otherwise, in an empty folder of the test's own; rules that a page
    registers are gone afterwards."""
    monkeypatch.setitem(Options.__init__.__kwdefaults__, "compiler", "eager")
    monkeypatch.delenv("FLASHDP_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    tables: list[Any] = [registry.RULES, registry.LINEAR, registry.UNIFORM, registry.NO_DATA]
    before = [table.copy() for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


NOT_ON_2_11 = ", not on torch 2.11"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_block_runs(page, quick):
    namespace, printed = Namespace(page), ""
    for block in blocks(page):
        where = f"{namespace.file}:{block.line}"
        if block.language == "text" and block.mark == "prints" and printed is not None:
            assert_printed(block.code, printed, where)
        if block.language != "python":
            continue
        if block.mark == "fragment":
            ast.parse(block.code)
        elif block.mark.endswith(NOT_ON_2_11) and torch.__version__ < (2, 12):
            namespace.run(block)  # accepted, so what the refusal prints is not looked for
            printed = None
        elif block.mark.startswith("raises "):
            error = getattr(flashdp_compile, block.mark.removeprefix("raises ").removesuffix(NOT_ON_2_11))
            with pytest.raises(error) as caught:
                namespace.run(block)
            assert type(caught.value) is error, where
            printed = str(caught.value)
        elif block.mark != "needs a GPU" or torch.cuda.is_available():
            assert block.mark in ("", "needs a GPU"), f"{where}: unknown mark {block.mark!r}"
            printed = namespace.run(block)


def assert_printed(expected: str, printed: str, where: str) -> None:
    """`printed` holds the lines of `expected` in this order, however they are wrapped; `...` stands for anything."""
    text, at = " ".join(printed.split()), 0
    for line in filter(None, (" ".join(line.split()) for line in expected.splitlines())):
        if line != "...":
            # a whole line: what follows is a space or the end, so that one that has lost its tail is not found
            found = re.compile(".*?".join(map(re.escape, line.split("..."))) + r"(?!\S)").search(text, at)
            assert found, f"{where}: not printed: {line!r}, in\n{printed}"
            at = found.end()


def test_the_options_table_is_the_dataclass():
    rows = re.findall(r"^\| `(\w+)` \| `([^`]*)` \| (.+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    defaults = {
        f.name: f.default if f.default_factory is MISSING else f.default_factory()  # type: ignore[misc]
        for f in fields(Options)
    }
    assert {name: ast.literal_eval(default) for name, default, _ in rows} == defaults
    assert len(rows) == len(defaults)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_and_paths_exist(page):
    text = re.sub(r"```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    linked = re.findall(r"\]\((?!https?://|#)([^)#\s]+)[^)]*\)", text)
    missing = [target for target in linked if not (page.parent / target).exists()]
    named = re.findall(r"`((?:[\w.]+/)+[\w.]*)`", text)
    own = [path for path in named if path.split("/")[0] in ("docs", "examples", "flashdp_compile", "kernels", "passes")]
    own += [path for path in named if path.startswith("tests/")]
    missing += [path for path in own if not (ROOT / path).exists()]
    assert not missing


def test_anchors_exist():
    headings = {
        page: {
            re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
            for title in re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        }
        for page in PAGES
    }
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#\s]*\.md)?#([^)\s]+)\)", page.read_text(encoding="utf-8")):
            owner = (page.parent / target).resolve() if target else page
            assert anchor in headings[owner], f"{page.name}: {target}#{anchor}"
