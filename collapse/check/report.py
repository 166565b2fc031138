"""What a check found, as text, JSON and one HTML page."""

import html
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collapse.report.svg import chart
from collapse.utils.errors import UserError
from collapse.utils.files import write_file

EXIT_CODES = {"kept": 0, "collapsed": 1, "not finite": 1, "no verdict": 3}  # 2: bad input
READS = {"mean": "mean of text tokens", "last": "last token", "first": "first token"}
TABLE = (  # title, key, digits
    ("components, 95%", "dims_95pct", 0),
    ("effective rank", "effective_rank", 0),
    ("  without first token", "effective_rank_without_first", 0),
    ("  within classes", "effective_rank_within", 0),
    ("LM loss, nats", "lm_loss", 2),
)
ADVICE = "Accuracy may not show it. Lower the rate, or keep an LM or KL loss."
OTHER_READ = "The threshold was chosen for means over tokens; it is untested for the %s."
DOMINATED = 1.5  # stable rank below which a few texts make up a layer's variance
STYLE = (  # a dark page where dark is preferred; paths wrap, and a telephone shows the whole table
    ":root{color-scheme:light dark}body{font:16px sans-serif;max-width:44em;margin:2em auto;"
    "padding:0 1em}svg{width:100%}"
    "pre{font-size:min(.9em,2.8vw);white-space:pre-wrap;overflow-wrap:anywhere}"
)


@dataclass(frozen=True)
class Report:
    """`record` is report.json; what it has of both sides is a dict with `base` and `now`."""

    record: dict[str, Any]

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.record["verdict"]]

    def verdict(self) -> str:
        """With what to do, and what to know of it."""
        read, lines = self.record["read"], [f"{self.record['verdict'].upper()}: "]
        lines[0] += self.record["why"]
        if self.record["verdict"] == "collapsed":
            lines.append(ADVICE)
        if read != "mean":
            lines.append(OTHER_READ % READS[read])
        now, base = (_dominated(self.record["layers"][side]) for side in ("now", "base"))
        if new := ", ".join(map(str, sorted(now - base))):
            lines.append(f"A few texts dominate layer {new} (stable rank < 1.5), not in the base.")
        return "\n".join(lines)

    def text(self) -> str:
        record, lines = self.record, [f"{'':24}{'base':>9}{'now':>9}{'kept':>9}"]
        for title, key, digits in TABLE:
            base, now = (record["last_layer"][side][key] for side in ("base", "now"))
            if (base, now) == (None, None):
                continue
            kept = "n/a"
            if None not in (base, now):
                kept = f"{now - base:+.2f}" if key == "lm_loss" else f"{now / (base or 1):.0%}"
            cells = ["n/a" if value is None else f"{value:,.{digits}f}" for value in (base, now)]
            lines.append(f"{title:24}" + "".join(f"{cell:>9}" for cell in (*cells, kept)))
        head = f"model  {record['model']}\nbase   {record['base']}\n"
        head += f"texts  {record['rows']:,} matched · {READS[record['read']]} · last layer\n"
        return head + "\n".join(lines) + "\n" + self.verdict()

    def page(self) -> str:
        layers, shares = {}, {}
        for side in ("base", "now"):
            layers[side] = [layer["effective_rank"] or 0 for layer in self.record["layers"][side]]
            squares = [s**2 for s in self.record["singular_values"][side]]
            sums = itertools.accumulate(squares, initial=0.0)
            shares[side] = [part / (sum(squares) or 1) for part in sums]
        title = html.escape(self.verdict().partition("\n")[0])
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
            '<meta name="viewport" content="width=device-width">'
            f"<style>{STYLE}</style><h1>{title}</h1><pre>{html.escape(self.text())}</pre>"
            + chart("Effective rank by layer (0: embeddings)", layers)
            + chart("Share of the variance in the first components of the last layer", shares)
        )

    def write(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_file(folder / "report.html", self.page().encode())
            write_file(folder / "report.json", json.dumps(self.record, indent=1).encode())
        except OSError as error:
            raise UserError(f"cannot write to {folder} ({error.strerror}): change --out.") from None


def _dominated(layers: list[dict[str, float | None]]) -> set[int]:
    ranks = [layer["stable_rank"] for layer in layers]
    return {layer for layer, rank in enumerate(ranks) if rank and rank < DOMINATED}
