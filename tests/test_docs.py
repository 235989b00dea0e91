"""The pages of docs/ whose code a reader runs: each block, in order, in an empty folder.

A block with a title is a file. Each line of a ``bash`` block is run. What needs a network, several
terminals or an installation is a ``sh`` block, and is tried by other tests.
"""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import command

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
EXAMPLES = ROOT / "examples"
FILE = re.compile(r'```\w+ title="(?P<name>[\w.-]+)"\n(?P<text>.*?)```', re.S)
BLOCK = re.compile(r"```bash\n(.*?)```", re.S)
LINK = re.compile(r"\]\((?!https?://)([^)#]*)(?:#([^)]*))?\)")
TERMINALS = ("1-digits.md", "5-two-macs.md")  # tried by test_readme.py
PAGES = sorted(
    page
    for folder in ("tutorial", "how-to")
    for page in (DOCS / folder).glob("*.md")
    if BLOCK.search(page.read_text()) and page.name not in TERMINALS
)

pytestmark = pytest.mark.usefixtures("uncompiled")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The present folder; modules that are imported from it are forgotten at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name, module in [*sys.modules.items()]:
        if str(getattr(module, "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=[f"{p.parent.name}/{p.stem}" for p in PAGES])
def test_code_of_a_page_runs(page, folder):
    text = page.read_text()
    for file in FILE.finditer(text):
        (folder / file["name"]).write_text(file["text"])
    for block in BLOCK.findall(text):
        for line in block.strip().splitlines():
            run(line)


def test_files_of_the_tutorial_are_among_the_examples():
    """The pages' files, which the test above runs, and those of the examples are the same."""
    folders = {"2-csv": "tables", "3-hugging-face": "hugging_face"}
    for page, folder in folders.items():
        text = (DOCS / "tutorial" / f"{page}.md").read_text()
        files = {file["name"]: file["text"] for file in FILE.finditer(text)}
        assert files == {path.name: path.read_text() for path in (EXAMPLES / folder).glob("*.py")}


def test_each_step_of_the_tutorial_is_in_the_list_of_examples():
    text = (EXAMPLES / "README.md").read_text()
    assert all(f"tutorial/{page.name})" in text for page in (DOCS / "tutorial").glob("*.md"))
    listed = set(re.findall(r"^\| \[`(\w+)`\]", text, re.M))
    assert listed == {path.name for path in EXAMPLES.iterdir() if path.is_dir()} - {"__pycache__"}


def run(line: str) -> None:
    program, *words = shlex.split(line)
    if program == "python3":
        runpy.run_path(words[0], run_name="__main__")
        return
    assert program == "mlx-fed", line
    if words[0] == "simulate" and "--workers" not in words:
        words += ["--workers", "0"]  # spares processes
    done = command(*words)
    assert done.code == 0, done.text
    if words[0] == "simulate" and "--target" not in words and " --rounds 1 " not in line:
        losses = [float(loss) for loss in re.findall(r"^round \d.*?   loss (\S+)", done.text, re.M)]
        assert losses[-1] < losses[0], done.text


def test_pages_of_the_navigation_exist_and_no_page_is_missing():
    names = re.findall(r"[\w/-]+\.md$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(names) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the site and GitHub make them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}


def test_links_lead_to_files_and_headings():
    broken = []
    for page in [*DOCS.rglob("*.md"), *ROOT.glob("*.md"), *EXAMPLES.rglob("*.md")]:
        for link, anchor in LINK.findall(re.sub(r"```.*?```", "", page.read_text(), flags=re.S)):
            target = page.parent / link if link else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(f"{page.relative_to(ROOT)}: {link}#{anchor}")
    assert broken == []


def test_messages_of_the_troubleshooting_page_are_in_the_code():
    """A quoted message has ``...`` where the program puts in a value."""
    texts = [
        node.value
        for path in (ROOT / "src").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    page = (DOCS / "troubleshooting.md").read_text()
    messages = re.findall(r"`([^`]+)`", "".join(re.findall(r"^\*\*(.*?)\*\*", page, re.M)))
    unknown = [
        message
        for message in messages
        if not all(
            any(words.strip() in text for text in texts) for words in message.split("...") if words
        )
    ]
    assert len(messages) > 20
    assert unknown == []
