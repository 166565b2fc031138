"""collapse-check: has fine-tuning collapsed a model, compared with its base on your own texts?

Exit code 0: kept, 1: collapsed or not finite, 2: bad input, 3: no verdict.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from collapse.check.report import READS, Report
from collapse.data.custom import labelled
from collapse.data.task import decode_lines
from collapse.data.text_tables import TEXT_SUFFIXES, parse_table
from collapse.measures import against_base
from collapse.measures.against_base import MAX_LENGTH, ROWS, Texts
from collapse.measures.rank import rank_metrics, singular_values
from collapse.models import finetuned
from collapse.models.finetuned import core_of
from collapse.models.pretrained import find_model, whole_tokenizer
from collapse.utils.errors import UserError, run_script
from collapse.utils.files import digest_weights

IN_MEMORY = "(in memory)"  # a model without a name


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
    off = base is None
    if not isinstance(model, nn.Module):
        model, base_name = finetuned.load_fine_tuned(name, base_name, dtype)
        off = not isinstance(base, nn.Module)  # else the adapter stands on the base that was named
    adapted = finetuned.is_adapted(model)
    off = off and finetuned.can_be_off(model)
    base_name = base_name or name * adapted
    if not (base_name or off or isinstance(base, nn.Module)):
        of = name or IN_MEMORY
        raise UserError(f"nothing says which model is the base of {of}: name it by --base.")
    if tokenizer is None and not (base_name if adapted else name):
        raise UserError("a model without a name needs its tokenizer: give tokenizer=TOKENIZER.")
    name, base_name = name or IN_MEMORY, base_name or IN_MEMORY
    max_length = min(max_length, getattr(core_of(model).config, "max_position_embeddings", 10**9))
    tokenizer = tokenizer or whole_tokenizer(base_name if adapted else name, None)
    texts = against_base.draw_texts(texts, labels, tokenizer, rows, max_length)
    if read == "auto":
        read = finetuned.pooling_of_training(name) or finetuned.what_its_head_reads(model)
    now = _side(model, texts, read, name)
    if off:
        with finetuned.adapter_off(model):
            start = _side(model, texts, read, base_name)
    else:
        model = None  # two may not fit
        whole = base if isinstance(base, nn.Module) else finetuned.load_whole(base_name, dtype)
        start = _side(whole, texts, read, base_name)
    verdict, why = against_base.judge(now["last_layer"], start["last_layer"], texts)
    record = {"schema": 1, "verdict": verdict, "why": why}
    record["kept"] = against_base.share_kept(now["last_layer"], start["last_layer"])
    record |= {"model": name + " (adapter)" * adapted, "base": base_name + " (adapter off)" * off}
    record |= {"texts_sha256": texts.sha256, "rows": len(texts.split.labels)}
    record |= {"classes": texts.classes, "max_length": max_length, "read": read}
    return Report(record | {part: {"base": start[part], "now": now[part]} for part in now})


def _side(model: nn.Module, texts: Texts, read: str, name: str) -> dict[str, Any]:
    core, causal, layers = core_of(model), finetuned.has_lm_head(model), []
    states, loss = against_base.pooled_states(model, core, texts, read, causal, every_layer=True)
    for pooled, _ in states.pooled:
        ranks = rank_metrics(pooled) if np.isfinite(pooled).all() else {}
        layers.append({name: ranks.get(name) for name in ("effective_rank", "stable_rank")})
    last, folder = states.pooled[-1, 0], Path(find_model(name))
    stored = digest_weights(folder) if folder.is_dir() else None
    return {
        "last_layer": against_base.numbers_of(states, loss, texts, read),
        "layers": layers,
        "singular_values": singular_values(last).tolist() if np.isfinite(last).all() else [],
        "revision": stored or getattr(core.config, "_commit_hash", None),
        "dtype": "4bit" if getattr(core, "is_loaded_in_4bit", False) else str(core.dtype),
    }


def read_texts(
    file: Path, text_column: str = "text", label_column: str | None = None
) -> tuple[list[str], list[str] | None]:
    """Texts and, where their column is named, labels: a text a line, or columns of a table.

    The file's suffix tells which: a table is .csv, .tsv, .json or .jsonl. Raises UserError for a
    file that cannot be read, naming the line.
    """
    columns = [text_column, *filter(None, [label_column])]
    lines = lines_of(file)
    if file.suffix.lower() in TEXT_SUFFIXES:
        rows = parse_table(lines, columns, file).rows
        if label_column:
            checked = [labelled(*row, None) for row in rows]
            return [text for text, _ in checked], [label for _, label in checked]
        return ["" if text is None else str(text) for _, (text,) in rows], None
    if label_column:
        raise UserError(f"--label-column is for CSV, TSV and JSON: give --labels beside {file}.")
    return lines, None


def lines_of(file: Path) -> list[str]:
    try:
        return decode_lines(file.read_bytes(), file)
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}).") from None


def main() -> None:
    run_script(_main, "stopped.")


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("model", help="model or adapter: a folder, or a name on the hub")
    add("--texts", type=Path, required=True, help="a text a line, or .csv, .tsv, .json, .jsonl")
    add("--text-column", default="text", help="of such a table")
    add("--label-column", help="of such a table; default: no labels")
    add("--labels", type=Path, help="instead, a label a line, one for each text")
    add("--base", help="default: the model without its adapter, or the base that its card names")
    add("--rows", type=int, default=ROWS)
    add("--max-length", type=int, default=MAX_LENGTH, help="in tokens")
    add("--read", choices=("auto", *READS), default="auto")
    add("--dtype", choices=("auto", "fp32", "bf16", "4bit"), default="auto")
    add("--out", type=Path, default=Path(), help="folder of report.html and report.json")
    add("--json", action="store_true", help="print JSON instead of text")
    a = parser.parse_args()
    if min(a.rows, a.max_length) < 1:
        raise UserError("--rows and --max-length are 1 or more.")
    texts, labels = read_texts(a.texts, a.text_column, a.label_column)
    if a.labels:
        labels = lines_of(a.labels)
        if a.label_column or a.labels.suffix.lower() in TEXT_SUFFIXES:
            raise UserError("--labels has a label a line: of a table, give --label-column instead.")
    report = check(a.model, a.base, texts, labels, None, a.rows, a.max_length, a.read, a.dtype)
    report.write(a.out)
    said = report.text() + "\nwrote report.html, report.json"
    print(json.dumps(report.record) if a.json else said)
    sys.exit(report.exit_code)
