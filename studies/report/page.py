"""RESULTS.md while it is written: sections, texts, numbered tables and figures."""

import re
from dataclasses import dataclass, field

from collapse.utils.files import ROOT


@dataclass
class Page:
    """The parts of RESULTS.md; tables and figures are numbered in order."""

    parts: list[str] = field(default_factory=list)
    numbers: dict[str, str] = field(
        default_factory=dict
    )  # key of a table, "FOLDER NAME" -> its number, "A1"
    figures: int = 0
    contents: list[str] = field(default_factory=list)  # a line a section

    def text(self, text: str) -> None:
        self.parts.append(text.strip("\n"))

    def section(self, title: str, question: str) -> None:
        """Begin a section, which answers the question."""
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")  # as GitHub makes it
        self.contents.append(f"* [{title}](#{anchor}): {question}")
        self.text(f"## {title}\n\n*{question}*")

    def table(self, key: str, caption: str, table: str) -> None:
        self.numbers[key] = f"A{len(self.numbers) + 1}"
        self.text(f"**Table {self.numbers[key]}.** {caption}\n\n{table}")

    def document(self) -> str:
        """The page; its table of contents stands behind its first part."""
        first, *others = self.parts
        return "\n\n".join([first, "\n".join(self.contents), *others]) + "\n"

    def figure(self, path: str, caption: str) -> None:
        if (ROOT / path).exists():
            self.figures += 1
            self.text(f"![{caption}]({path})\n\n**Figure A{self.figures}.** {caption}.")
