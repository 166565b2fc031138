"""The first token as an attention sink: how do it and the length of texts affect ranks?

Runs SST-2's validation rows through a pretrained causal LM, before any fine-tuning. Measures for
each layer the effective rank of states pooled over all text tokens and over all but the first, the
share of the variance that 1/length explains, and the ratio of the first token's norm to the others.
Results: sink.json, sink.csv and sink.png in studies/results/sink/.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import tyro

import common
from collapse.config import STANDIN_MODEL, LanguageModelConfig
from collapse.data.batches import encode_rows
from collapse.data.sst2 import load_sst2
from collapse.data.task import limit_task
from collapse.measures.layers import records_by_depth
from collapse.models.pretrained import fill_in_for, find_model, load_causal_lm, load_tokenizer
from collapse.report.plots import legend_below, save_figure
from collapse.utils.device import pick_device, set_allocator, set_threads
from collapse.utils.errors import UserError, run_script
from collapse.utils.files import ROOT, write_json
from collapse.utils.provenance import environment
from studies.shared.tables import put_rows

COLUMNS = ("effective_rank", "effective_rank_without_first", "effective_rank_within")
COLUMNS += ("effective_rank_within_without_first", "length_share", "length_share_without_first")
COLUMNS += ("sink_ratio",)


@dataclass
class Config:
    """Settings; the comment above a field is its --help text."""

    # Pretrained causal LM: a name on the Hugging Face hub, a folder, or smollm2-135m.
    model: str = STANDIN_MODEL
    # Folder with SST-2 in its official layout. Default: the Hugging Face cache, then the hub.
    data_dir: Path | None = None
    # Folder for the results. Default: studies/results/sink, for another model a subfolder.
    output_dir: Path | None = None
    # Use this many validation rows, a fixed draw. Default: all.
    eval_limit: int | None = None
    # Where to compute; auto takes a GPU when there is one.
    device: Literal["auto", "cpu", "cuda"] = "auto"


def measure(config: Config) -> dict:
    """The content of sink.json: provenance, and `layers`, a record for each depth."""
    device = pick_device(config.device)
    set_threads(1)  # as the published numbers were made
    task = load_sst2(config.data_dir)
    if task is None:
        raise UserError("SST-2 is neither in the Hugging Face cache nor on the hub: --data-dir.")
    task = limit_task(task, None, config.eval_limit)
    settings = LanguageModelConfig(model=find_model(config.model), quantization="none")
    settings = fill_in_for(device, settings)
    causal_lm = load_causal_lm(settings, device).eval()
    size = causal_lm.config.hidden_size
    head = common.ClassificationHead(size, 1, 2).to(device)  # its output is not used
    model = common.DualHeadModel(causal_lm.base_model, size, head)
    split = encode_rows(task.validation, load_tokenizer(config.model), settings.max_length)
    rows = len(split.labels)
    print(f"reading {rows:,} rows of SST-2 with {config.model}: minutes on a CPU", file=sys.stderr)
    states = common.evaluate(model, split, with_layers=True).layers
    layers = records_by_depth(states, split.labels.numpy(), split.lengths)
    return {
        "model": Path(config.model).name,
        "data": task.summary(),
        "lengths": {"mean": float(split.lengths.mean()), "shortest": int(split.lengths.min())},
        **environment(device),
        "layers": [{name: layer[name] for name in COLUMNS} for layer in layers],
    }


PANELS = {
    "effective rank of pooled states": ("effective_rank", "effective_rank_without_first"),
    "share of variance that 1/length explains": ("length_share", "length_share_without_first"),
    "first token's norm over the others'": ("sink_ratio",),
}
LOOKS = (("#D55E00", "o", "all text tokens"), ("#0072B2", "s", "without the first token"))


def plot(path: Path, results: dict) -> None:
    """Plot rank, share explained by length, and norms over layers."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    depths = range(len(results["layers"]))
    for axis, (label, names) in zip(axes, PANELS.items(), strict=True):
        for name, (color, marker, legend) in zip(names, LOOKS, strict=False):
            values = [layer[name] for layer in results["layers"]]
            axis.plot(depths, values, color=color, marker=marker, markersize=4, label=legend)
        axis.set(xlabel="layer (0: embeddings; last: after the final norm)", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(bottom=0)
    axes[1].set_ylim(0, 1)
    axes[2].set_yscale("log")
    legend_below(figure)
    rows = results["data"]["validation_rows"]
    title = f"{results['model']} before fine-tuning, {results['data']['name']}"
    figure.suptitle(f"{title}: {rows:,} validation rows")
    save_figure(figure, path)


def main() -> None:
    config = tyro.cli(Config, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    set_allocator()
    results = measure(config)
    default = ROOT / "studies" / "results" / "sink"
    if config.model != STANDIN_MODEL:
        default = default / results["model"]
    folder = config.output_dir or default
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "sink.json", results)
    # A row for each layer; 0: embeddings, the last: after the final norm.
    rows = [{"model": results["model"], "layer": n} | r for n, r in enumerate(results["layers"])]
    put_rows(folder / "sink.csv", rows, "model")
    plot(folder / "sink.png", results)
    print((folder / "sink.csv").read_text(), end="")
    print(f"results: {folder}")


if __name__ == "__main__":
    run_script(main)
