"""RESULTS.md: its text is in results.md.jinja, its tables are made by the modules beside it."""

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jinja2

from collapse.measures.statistics import format_bounds
from collapse.report import records
from collapse.report.markdown import cell, rows_of, table
from collapse.report.reference import reference_for
from collapse.utils.files import ROOT, read_json
from studies import (
    alarm_replay,
    collapse_threshold,
    engram_pieces,
    engram_salience,
    linguistic_collapse,
    lora_speed,
    sensitivity,
)
from studies.report import claims, experiments, own_models, side_studies, thresholds

SECTION = re.compile(r"^## (.+)\n\n\*(.+)\*$", re.MULTILINE)  # title, question


@dataclass(frozen=True)
class Page:
    """RESULTS.md, and the number of each table, "A1", by its key."""

    text: str
    numbers: dict[str, str]


def results_page() -> Page:
    """RESULTS.md, its tables and figures numbered in the order of the template."""
    numbers: dict[str, str] = {}
    figures = itertools.count(1)

    def number(key: str) -> str:
        numbers[key] = f"A{len(numbers) + 1}"
        return numbers[key]

    def figure(path: Path, caption: str) -> str:
        if not path.exists():
            return ""
        link = f"![{caption}]({own_models.relative(path)})"
        return f"{link}\n\n**Figure A{next(figures)}.** {caption}."

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "thousands": "{:,}".format,
        "percent": lambda share: f"{float(share):.0%}",
        "as_rate": lambda rate: f"{10 ** float(rate):.1e}",
    }
    modules = (claims, experiments, own_models, side_studies, thresholds)
    modules += (alarm_replay, collapse_threshold, engram_pieces, engram_salience, lora_speed)
    modules += (linguistic_collapse, records, sensitivity)
    functions = (cell, figure, format_bounds, number, reference_for, own_models.relative, rows_of)
    functions += (experiments.origin, experiments.short_commit, own_models.results_of, read_json)
    names = {module.__name__.rpartition(".")[2]: module for module in modules}
    names |= {function.__name__: function for function in functions}
    template = environment.get_template("results.md.jinja")
    text = template.render(names, table=table, CONFIGS=own_models.CONFIGS, ROOT=ROOT)
    text = re.sub(r"\n{3,}", "\n\n", text.strip("\n")) + "\n"
    return Page(text.replace("<!--contents-->", contents(SECTION.findall(text))), numbers)


def contents(sections: Iterable[tuple[str, str]]) -> str:
    """A line for each section, with its link as GitHub makes it."""
    lines = []
    for title, question in sections:
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        lines.append(f"* [{title}](#{anchor}): {question}")
    return "\n".join(lines)
