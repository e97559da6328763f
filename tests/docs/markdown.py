"""Fenced code blocks, links and headings of the documentation pages."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(
    r"^(?P<fence>`{3,})(?P<info>[^`\n]*)\n(?P<code>.*?)^(?P=fence)\s*$", re.M | re.S
)
_TITLE = re.compile(r'title="([^"]+)"')
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True, kw_only=True)
class Block:
    """One fenced block."""

    language: str
    info: str
    """The rest of the fence line."""
    code: str
    line: int
    """Line of the page on which the code begins, counted from 1."""

    @property
    def title(self) -> str | None:
        """The file name the block is shown under, if it has one."""
        found = _TITLE.search(self.info)
        return found[1] if found else None


def pages() -> list[Path]:
    """README, everything under docs/, and the examples' README."""
    docs = sorted((ROOT / "docs").rglob("*.md"))
    return [ROOT / "README.md", *docs, ROOT / "examples/custom_models/README.md"]


def page_id(page: Path) -> str:
    """A page's path from the repository root."""
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        language, _, info = match["info"].strip().partition(" ")
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(language=language, info=info, code=match["code"], line=line))
    return found


def prose(page: Path) -> str:
    """The page without its fenced blocks and inline code."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return re.sub(r"`[^`\n]+`", "", text)


def links(page: Path) -> list[str]:
    """Link targets outside code, in order."""
    return _LINK.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """The `#fragment` of every heading, as mkdocs and GitHub make them."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ +(.+?)\s*$", text, re.M)
    kept = [re.sub(r"[^\w\s-]", "", title.lower()) for title in titles]
    return {re.sub(r"[\s]+", "-", title.strip()) for title in kept}


def commands(page: Path) -> list[list[str]]:
    """The words of every `$ command` in the page's console blocks."""
    found = []
    for block in blocks(page):
        if block.language == "console":
            joined = block.code.replace("\\\n", " ")
            lines = [line[2:] for line in joined.splitlines() if line.startswith("$ ")]
            found += [shlex.split(line, comments=True) for line in lines]
    return found
