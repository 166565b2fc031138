"""collapse-check: has fine-tuning collapsed a model, compared with its base on your own texts?

Exit code 0: kept, 1: collapsed or not finite, 2: bad input, 3: no verdict.
"""

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from collapse.check.measuring import (
    MAX_LENGTH,
    ROWS,
    Texts,
    draw_texts,
    judge,
    numbers_of,
    pooled_states,
    share_kept,
)
from collapse.check.report import READS, Report
from collapse.measures.rank import rank_metrics, singular_values
from collapse.models import finetuned
from collapse.models.finetuned import core_of
from collapse.models.pretrained import find_model, whole_tokenizer
from collapse.utils.errors import UserError, run_script
from collapse.utils.files import digest_weights

SIDES = ("base", "now")


def check(
    model: str | nn.Module,
    base: str | nn.Module | None,
    texts: Sequence[str],
    labels: Sequence[Any] | None = None,
    tokenizer: Any = None,
    rows: int = ROWS,
    max_length: int = MAX_LENGTH,
    read: str = "auto",
    dtype: str = "auto",
) -> Report:
    """Compare a model's states with its base's on the same rows.

    model, base: hub names, folders, or loaded models of transformers and peft. base None: the model
    with its adapter off, or what its adapter or card names. Raises UserError for what cannot be
    compared.
    """
    name, base_name = (
        core_of(m).name_or_path if isinstance(m, nn.Module) else m for m in (model, base)
    )
    if not isinstance(model, nn.Module):
        model, base_name = finetuned.load_fine_tuned(name, base_name, dtype)
    adapted = finetuned.is_adapted(model)
    off = finetuned.can_be_off(model) and not isinstance(base, nn.Module)
    base_name = base_name or (name if adapted else None)
    if not base_name:
        raise UserError(f"nothing says which model is the base of {name}: name it by --base.")
    tokenizer = tokenizer or whole_tokenizer(base_name if adapted else name, None)
    drawn = draw_texts(texts, labels, tokenizer, rows, max_length)
    read = finetuned.what_its_head_reads(model) if read == "auto" else read
    found = {"now": _side(model, drawn, read)}
    if off:
        with finetuned.adapter_off(model):
            found["base"] = _side(model, drawn, read)
    else:
        model = None  # two may not fit
        whole = base if isinstance(base, nn.Module) else finetuned.load_whole(base_name, dtype)
        found["base"] = _side(whole, drawn, read)
    now, start = (found[side]["last_layer"] for side in ("now", "base"))
    verdict, why = judge(now, start, drawn)
    return Report(
        {
            "schema": 1,
            "verdict": verdict,
            "why": why,
            "kept": share_kept(now, start),
            "model": name + " (adapter)" * adapted,
            "base": base_name + " (adapter off)" * off,
            "texts_sha256": drawn.sha256,
            "rows": len(drawn.split.labels),
            "classes": drawn.classes,
            "max_length": max_length,
            "read": read,
            **{part: {side: found[side][part] for side in SIDES} for part in found["now"]},
        }
    )


def _side(model: nn.Module, texts: Texts, read: str) -> dict[str, Any]:
    core, layers = core_of(model), []
    states, loss = pooled_states(model, core, texts, read, every_layer=True)
    for pooled, _ in states.pooled:
        ranks = rank_metrics(pooled) if np.isfinite(pooled).all() else {}
        layers.append({name: ranks.get(name) for name in ("effective_rank", "stable_rank")})
    last, folder = states.pooled[-1, 0], Path(find_model(core.name_or_path))
    stored = digest_weights(folder) if folder.is_dir() else None
    return {
        "last_layer": numbers_of(states, loss, texts, read),
        "layers": layers,
        "singular_values": singular_values(last).tolist() if np.isfinite(last).all() else [],
        "revision": stored or getattr(core.config, "_commit_hash", None),
        "dtype": "4bit" if getattr(core, "is_loaded_in_4bit", False) else str(core.dtype),
    }


def read_texts(file: Path, column: str = "text") -> list[str]:
    """A text a line; by the file's name a column of CSV or of JSON lines."""
    try:
        with open(file, newline="", encoding="utf-8") as lines:
            if file.suffix == ".csv":
                return [row[column] or "" for row in csv.DictReader(lines)]
            if file.suffix in (".jsonl", ".json"):
                return [str(json.loads(line)[column]) for line in lines if line.strip()]
            return lines.read().splitlines()
    except (KeyError, TypeError):
        raise UserError(f"{file} has no column {column}: name one by --text-column.") from None
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or no JSON
        raise UserError(f"cannot read {file} ({error}).") from None


def main() -> None:
    run_script(_main)


def _main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="model or adapter: a folder, or a name on the hub")
    parser.add_argument("--texts", type=Path, required=True, help="a text a line, .csv or .jsonl")
    parser.add_argument("--text-column", default="text", help="of CSV or JSON lines")
    parser.add_argument("--base", help="default: the adapter off, or what adapter or card name")
    parser.add_argument("--labels", type=Path, help="a label a line, one for each text")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--max-length", type=int, default=MAX_LENGTH, help="in tokens")
    parser.add_argument("--read", choices=("auto", *READS), default="auto")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16", "4bit"), default="auto")
    parser.add_argument("--out", type=Path, default=Path(), help="folder of report.html and .json")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    a = parser.parse_args()
    if min(a.rows, a.max_length) < 1:
        raise UserError("--rows and --max-length are 1 or more.")
    texts = read_texts(a.texts, a.text_column)
    labels = read_texts(a.labels) if a.labels else None
    report = check(a.model, a.base, texts, labels, None, a.rows, a.max_length, a.read, a.dtype)
    report.write(a.out)
    print(
        json.dumps(report.record) if a.json else report.text() + "\nwrote report.html, report.json"
    )
    sys.exit(report.exit_code)
