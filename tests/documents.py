"""Code blocks of the documentation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Block:
    """A fenced code block.

    Attributes:
        language: what follows the fence, empty where nothing does.
        line: of the file, from 1, where the text begins.
        heading: the last one before the block.
    """

    language: str
    text: str
    line: int
    heading: str

    def commands(self) -> list[str]:
        """The lines of a block of shell commands, continued ones joined."""
        return [line for line in self.text.replace("\\\n", " ").splitlines() if line.strip()]


def blocks(path: Path) -> list[Block]:
    """The fenced code blocks of a Markdown file, in order."""
    found, heading, in_heading = [], "", False
    for token in MarkdownIt().parse(path.read_text(encoding="utf-8")):
        if in_heading:
            heading = token.content
        in_heading = token.type == "heading_open"
        if token.type == "fence":
            found.append(Block(token.info.strip(), token.content, token.map[0] + 2, heading))
    return found
