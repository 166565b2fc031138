"""RESULTS.md while it is written: texts, numbered tables and figures."""

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

    def text(self, text: str) -> None:
        self.parts.append(text.strip("\n"))

    def table(self, key: str, caption: str, table: str) -> None:
        self.numbers[key] = f"A{len(self.numbers) + 1}"
        self.text(f"**Table {self.numbers[key]}.** {caption}\n\n{table}")

    def document(self) -> str:
        return "\n\n".join(self.parts) + "\n"

    def figure(self, path: str, caption: str) -> None:
        if (ROOT / path).exists():
            self.figures += 1
            self.text(f"![{caption}]({path})\n\n**Figure A{self.figures}.** {caption}.")
