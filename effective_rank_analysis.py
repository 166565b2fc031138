"""Experiment 4: have the hidden states collapsed? Rank and neural-collapse metrics of the models that were trained.

Looks for checkpoints under results/, results_7b/ and results_agnews/, runs up to 2,000 validation rows through each
model as it runs (model 3 with its cold prefix), and measures pooled hidden states of every layer and the
classifier's intermediate features. Each measured model is kept until the code changes: a run that is started again goes
on. Studies in the output folder of results folders that have no checkpoints here stay as they are.
"""

import dataclasses
import gc
import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import matplotlib.ticker
import numpy as np
import scipy.stats
import torch
import tyro

import common
import experiment

KEYS = ("pretrained", "model1", "model2", "model3")
CHANGES = (("pretrained", "model1"), ("model1", "model2"), ("model2", "model3"), ("model1", "model3"))
CHANGES += (("pretrained", "model2"), ("pretrained", "model3"))
CURVE_ROWS = (50, 100, 200, 400, 800, 1600)  # numbers of rows at which the rank is also measured
HALVED = ("effective_rank", "stable_rank", "cdnv")  # numbers whose changes have an interval over rows, from random halves
LEAST_ROWS = 4  # half of them still have a rank
COLORS = {"pretrained": "#666666", **{f"model{number}": color for number, color in common.MODEL_COLORS.items()}}
MARKERS = {"pretrained": "D", **{f"model{number}": marker for number, marker in common.MODEL_MARKERS.items()}}


@dataclass
class Config:
    """Settings of the analysis; the comment above a field is its --help text."""

    # Result folders to analyse. Default: all with checkpoints under results/, results_7b/ and results_agnews/ but limit-*.
    folders: tuple[Path, ...] = ()
    # Folder for the results.
    output_dir: Path = common.ROOT / "results_effective_rank"
    # Folder with the data in its official layout. Default: the Hugging Face cache, then the hub.
    data_dir: Path | None = None
    # Validation rows to measure, a fixed draw.
    rows: int = 2000
    # Random subsets of rows behind each interval over rows, two or more.
    draws: int = 50
    # Weights to load: of the last epoch, or of the one with the best validation accuracy.
    weights: Literal["final", "best"] = "final"
    # Where to compute; auto takes a GPU when there is one.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # Measure everything anew, and replace results in the output folder that were measured otherwise.
    fresh: bool = False


# ---------------------------------------------------------------------------------------------------------
# What there is to analyse
# ---------------------------------------------------------------------------------------------------------

SCRIPTS = {"results": "experiment.py", "results_7b": "experiment_7b.py", "results_agnews": "experiment_agnews_7b.py"}


def find_folders(config: Config) -> list[Path]:
    """Result folders with at least one finished training; says by which command the missing ones are made."""
    if config.folders:
        found = [folder for folder in config.folders if trainings(folder)]
        missing = [f"{folder} holds no finished training" for folder in config.folders if folder not in found]
    else:
        found, missing = [], []
        for top, script in SCRIPTS.items():
            states = (common.ROOT / top).glob("**/state/settings.json")
            here = sorted(file.parent.parent for file in states if trainings(file.parent.parent))
            limited = [folder for folder in here if "limit-" in str(folder.relative_to(common.ROOT))]
            found += [folder for folder in here if folder not in limited]
            missing += [f"{folder} is left out, as a run on fewer rows: --folders {folder} takes it" for folder in limited]
            if common.ROOT / top not in here:
                missing.append(f"no checkpoints in {top}/ itself: `python {script}` makes them")
    if not found:
        raise common.UserError(f"nothing to analyse; {'; '.join(missing)}.")
    for folder in found:
        if lacking := [key for key in KEYS[1:] if key not in dict(trainings(folder))]:
            missing.append(f"{folder} lacks {', '.join(lacking)}: the command that made it adds them by --models 1 2 3")
    for sentence in missing:
        print(f"NOTE: {sentence}")
    return found


def trainings(folder: Path) -> list[tuple[str, int]]:
    """(model key, seed) of every finished training in a results folder."""
    names = [path.parent.name.split("-seed") for path in (folder / "state").glob("model*-seed*/metrics.json")]
    return sorted((key, int(seed)) for key, seed in names)


def load_task(settings: dict, data_dir: Path | None) -> common.Task:
    """The rows that a results folder was made with. Raises UserError when they cannot be had, or are others now."""
    wanted = settings["data"]
    if wanted["name"].startswith("AG News"):
        task = common.load_ag_news(data_dir)
    elif wanted["name"] == "SST-2":
        task = common.load_sst2(data_dir)
    else:
        task = common.load_movie_snippets()
    if task is None:
        raise common.UserError(f"{wanted['name']} is neither in the Hugging Face cache nor on the hub: give --data-dir.")
    task = common.limit_task(task, wanted["train_rows"], wanted["validation_rows"])
    if task.summary()["sha256"] != wanted["sha256"]:
        raise common.UserError(f"{task.source} holds other rows of {wanted['name']} than the models were trained on.")
    return task


def known_settings(config_class: type, stored: dict) -> Any:
    return config_class(**{field.name: stored[field.name] for field in dataclasses.fields(config_class) if field.name in stored})


def models_of(
    folder: Path, settings: dict, task: common.Task, weights: str, device: torch.device
) -> tuple[common.Split, Iterator[tuple[str, int, common.DualHeadModel]]]:
    """The validation split, and (model key, seed, model) one after another; the pretrained model comes first.

    A language model is loaded once and its adapters are exchanged. Its pretrained hidden states are the same for every
    seed and come once; the small transformer's baseline is the untrained network of each seed. The classifier of a
    baseline is a fresh draw.
    """
    stored, classes, jobs = settings["config"], len(task.class_names), trainings(folder)
    seeds = sorted({seed for _, seed in jobs})
    if "model" in stored:
        config = known_settings(common.LanguageModelConfig, stored)
        if device.type == "cpu" and config.model == common.DEFAULT_MODEL:
            raise common.UserError(f"{config.model} needs a CUDA GPU, and this would run on the CPU.")
        adapter_file = folder / "state" / f"{jobs[0][0]}-seed{jobs[0][1]}" / f"{weights}-adapter" / "adapter_config.json"
        if "/" not in config.model and config.model != common.STANDIN_MODEL:  # a folder: results keep its name alone
            config.model = common.read_json(adapter_file)["base_model_name_or_path"]
        source = stored["engram_source"]
        encode, seeds = common.load_tokenizer(config.model), seeds[:1]
        if stored.get("model_sha256") not in (None, common.digest_weights(config.model)):
            raise common.UserError(f"{config.model} holds other weights than the models were trained on.")
        causal_lm, lora = common.load_adapted_model(config, device)

        def build(number: int) -> common.DualHeadModel:
            return common.wrap_causal_lm(causal_lm, lora, number, classes, source, config)
    else:
        config = known_settings(experiment.Config, stored)
        encode = experiment.WordVocabulary(task.train.texts, config.vocabulary_size).encode

        def build(number: int) -> common.DualHeadModel:
            return experiment.build_model(number, classes, config).to(device)

    def models() -> Iterator[tuple[str, int, common.DualHeadModel]]:
        for seed in seeds:
            torch.manual_seed(seed)
            yield "pretrained", seed, build(1)
        for key, seed in jobs:
            model = build(int(key.removeprefix("model")))
            common.load_weights(folder / "state" / f"{key}-seed{seed}", weights, model)
            model.lm_head = None  # it has done its work: no feature passes through it
            yield key, seed, model

    return common.encode_rows(task.validation, encode, config.max_length), models()


# ---------------------------------------------------------------------------------------------------------
# Measuring one model
# ---------------------------------------------------------------------------------------------------------


def random_subsets(total: int, rows: int, draws: int) -> list[np.ndarray]:
    """Row numbers of random subsets, the same for every model on a split; without replacement: a row drawn twice adds no rank."""
    rng = np.random.default_rng([0, rows])
    return [rng.permutation(total)[:rows] for _ in range(draws)]


def ranks_from_gram(features: np.ndarray) -> dict[str, float]:
    """Two of rank_metrics, from the smaller Gram matrix of features (N, D): faster, to about six digits."""
    features = features - features.mean(0, dtype=np.float64)
    gram = features @ features.T if len(features) < features.shape[1] else features.T @ features
    s = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0))
    s = np.where(s > 1e-7 * s.max(), s, 0)
    return {"effective_rank": common.effective_rank(s), "stable_rank": float((s**2).sum() / (s.max() ** 2 or 1))}


def measure(model: common.DualHeadModel, split: common.Split, draws: int) -> dict[str, Any]:
    """Everything that results hold of one model. Keys of rank_metrics and neural_collapse_metrics are of the pooled states."""
    started = time.perf_counter()
    evaluation = common.evaluate(model, split, with_layers=True)
    forward_done = time.perf_counter()
    labels, outer = evaluation.labels, model.classifier.outer
    weights, bias = (parameter.detach().cpu().numpy() for parameter in (outer.weight, outer.bias))
    layers = [common.rank_metrics(states) for states in evaluation.layers]
    singular_values = common.singular_values(evaluation.pooled)
    ranks_done = time.perf_counter()
    n = len(labels)
    curve = {
        str(size): [ranks_from_gram(evaluation.pooled[rows])["effective_rank"] for rows in random_subsets(n, size, draws)]
        for size in CURVE_ROWS
        if size < n
    }
    halves = [
        ranks_from_gram(evaluation.pooled[rows])
        | {"cdnv": common.neural_collapse_metrics(evaluation.pooled[rows], labels[rows])["cdnv"]}
        for rows in random_subsets(n, n // 2, draws)
    ]
    subsets_done = time.perf_counter()
    record = {
        **layers[-1],
        **common.neural_collapse_metrics(evaluation.pooled, labels),
        "effective_rank_share": layers[-1]["effective_rank"] / max(1, n - 1),
        "accuracy": evaluation.record(0.0)["accuracy"],
        "intermediate": {
            **common.rank_metrics(evaluation.intermediate),
            **common.neural_collapse_metrics(evaluation.intermediate, labels, weights, bias),
        },
        "layers": layers,
        "singular_values": singular_values.tolist(),
        "subsets": curve,
        "halves": {"rows": n // 2, **{number: [half[number] for half in halves] for number in HALVED}},
    }
    record["seconds"] = {
        "forward": forward_done - started,
        "ranks": ranks_done - forward_done,
        "subsets": subsets_done - ranks_done,
        "collapse": time.perf_counter() - subsets_done,
    }
    return record


def measure_study(folder: Path, config: Config, device: torch.device, here: dict) -> tuple[str, dict]:
    """The study's name, and settings, data and records (model key -> seed -> record) of one results folder."""
    settings = common.read_json(folder / "state" / "settings.json")
    task = load_task(settings, config.data_dir)
    name = common.study_name(settings)
    split, models = models_of(folder, settings, task, config.weights, device)
    rows = common.fixed_draw(len(split.labels), config.rows)
    if len(rows) < LEAST_ROWS:
        raise common.UserError(f"{len(rows)} validation rows are too few: {LEAST_ROWS} or more are needed.")
    split = common.Split([split.token_ids[i] for i in rows], split.labels[rows])
    where = str(folder.resolve()).removeprefix(f"{common.ROOT}/")
    state = config.output_dir / "state" / where.strip("/").replace("/", "-")
    state.mkdir(parents=True, exist_ok=True)
    measured = how_measured(config)
    code = common.digest_files([Path(file) for file in (common.__file__, experiment.__file__, __file__)])
    print(f"{name}: {len(rows):,} validation rows, {config.weights} weights of {folder}", flush=True)
    records: dict[str, dict[str, dict]] = {}
    for key, seed, model in models:
        files = (folder / "state" / f"{key}-seed{seed}").rglob("*.safetensors")  # none of a baseline
        weights = sorted(file for file in files if config.weights in str(file.relative_to(folder)))
        made_from = [settings, common.digest_files(weights), code, *measured.values(), CURVE_ROWS]
        made_from = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()
        file = state / f"{key}-seed{seed}.json"
        record = common.read_json(file) if file.exists() and not config.fresh else {}
        if record.get("made_from") != made_from:
            record = {**measure(model, split, config.draws), "made_from": made_from, **here}
            common.write_json(file, record)
        if key == "model3" and config.weights == "final":  # the training has clustered the engrams of its last epoch
            clusters = common.read_json(folder / "state" / f"{key}-seed{seed}" / "metrics.json")["cluster"]
            record |= {"engram_ari": clusters["trained"]["ari"], "engram_ari_untrained": clusters["untrained"]["ari"]}
        records.setdefault(key, {})[str(seed)] = record
        times = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in record["seconds"].items())
        print(f"  {key} seed {seed}: effective rank {record['effective_rank']:.1f} ({times})", flush=True)
    return name, {"folder": where, "settings": settings, "num_samples": len(rows), "measured": measured, "records": records}


def how_measured(config: Config) -> dict[str, Any]:
    return {"rows": config.rows, "draws": config.draws, "weights": config.weights}


def earlier_studies(file: Path, config: Config) -> dict[str, dict]:
    """Name -> study, as measure_study returns it, that an earlier run measured. Raises UserError when it measured otherwise."""
    studies = common.read_json(file) if file.exists() else {}
    asked = how_measured(config)
    alike = {name: study for name, study in studies.items() if study.get("measured") == asked}
    if len(alike) < len(studies) and not config.fresh:
        here = ", ".join(f"{key} {value}" for key, value in asked.items())
        raise common.UserError(f"{file} was not measured with {here}: give another --output-dir, or --fresh to replace it.")
    return {name: study | {"records": {key: study[key]["seeds"] for key in keys_of(study)}} for name, study in alike.items()}


# ---------------------------------------------------------------------------------------------------------
# From records to results
# ---------------------------------------------------------------------------------------------------------


def scalars(record: dict) -> dict[str, float]:
    """Numbers of a record under flat names: those of the intermediate features as intermediate.NAME."""
    flat = {key: value for key, value in record.items() if isinstance(value, int | float)}
    return flat | {f"intermediate.{key}": value for key, value in record["intermediate"].items()}


def paired(records: dict, a: str, b: str) -> list[tuple[dict, dict]]:
    """Records of two models with the same seed; a pretrained model that has one record stands for every seed."""
    first, second = records.get(a, {}), records.get(b, {})
    if a == "pretrained" and len(first) == 1:
        return [(next(iter(first.values())), record) for record in second.values()]
    return [(first[seed], record) for seed, record in second.items() if seed in first]


def change(a: str, pairs: list[tuple[dict, dict]]) -> dict[str, Any]:
    """How much each number changes from model a to the other one, over seeds.

    `half` holds the changes of HALVED at half the rows, with intervals over rows, given these seeds.
    """
    flat = [(scalars(first), scalars(second)) for first, second in pairs]
    keys = [key for key in flat[0][0] if key in flat[0][1] and not key.rpartition(".")[2].startswith("num_")]
    if a == "pretrained":  # its classifier is a fresh draw: what came out of that is no change
        keys = [key for key in keys if not key.startswith("intermediate.") and key != "accuracy"]
    found = {key: common.mean_interval(second[key] - first[key] for first, second in flat) for key in keys}
    rows, total = pairs[0][0]["halves"]["rows"], pairs[0][0]["num_samples"]
    found["half"] = {"rows": rows}
    for key in HALVED:
        draws = [np.subtract(second["halves"][key], first["halves"][key]) for first, second in pairs]
        found["half"][key] = interval_over_rows(np.mean(draws, axis=0), rows, total)
    return found


def interval_over_rows(draws: np.ndarray, rows: int, total: int) -> dict[str, float]:
    """Mean of a statistic over subsets (draws,) of so many out of `total` rows, with an approximate 95 % t interval.

    The interval is for other samples of `total` rows. Small subsets scatter more than their mean is uncertain, large ones
    overlap and scatter less: deviations count sqrt(rows / (total - rows)) times (delete-d jackknife, Shao & Wu 1989).
    """
    mean, spread = float(np.mean(draws)), np.std(draws, ddof=1) * math.sqrt(rows / (total - rows))
    half = float(scipy.stats.t.ppf(0.975, len(draws) - 1) * spread)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def summarize(studies: dict[str, dict]) -> dict[str, dict]:
    """What effective_rank_results.json holds: study -> settings, changes, and model -> means, intervals, seeds."""
    shared = [size for size in CURVE_ROWS if all(size < study["num_samples"] for study in studies.values())]
    results = {}
    for name, study in studies.items():
        records = study["records"]
        result = {key: study[key] for key in ("folder", "settings", "num_samples", "measured")}
        result["matched_rows"] = shared[-1] if shared else None
        for key in keys_of(records):
            flat = [scalars(record) for record in records[key].values()]
            intervals = {number: common.mean_interval(f[number] for f in flat) for number in flat[0]}
            if shared:
                at_matched = (np.mean(record["subsets"][str(shared[-1])]) for record in records[key].values())
                intervals["effective_rank_matched"] = common.mean_interval(at_matched)
            means: dict[str, Any] = {"intermediate": {}}
            for number, interval in intervals.items():
                part, _, last = number.rpartition(".")
                (means[part] if part else means)[last] = interval["mean"]
            result[key] = {**means, "intervals": intervals, "seeds": records[key]}
        result["changes"] = {f"{b} - {a}": change(a, pairs) for a, b in CHANGES if (pairs := paired(records, a, b))}
        results[name] = result
    return results


def keys_of(result: dict) -> list[str]:
    return [key for key in KEYS if key in result]


def in_two_lines(name: str) -> str:
    return name.replace(" training rows, ", " training rows\n")


def display_name(key: str, result: dict) -> str:
    if key != "pretrained":
        return common.MODEL_NAMES[int(key.removeprefix("model"))]
    return "Pretrained" if "model" in result["settings"]["config"] else "Untrained"


def display_change(pair: str, result: dict) -> str:
    return pair.replace("pretrained", display_name("pretrained", result).lower())


TABLE = (("effective_rank", 1), ("effective_rank_share", 3), ("stable_rank", 1), ("participation_ratio", 1), ("dims_95pct", 0))
TABLE += (("cdnv", 2), ("intermediate.cdnv", 2), ("intermediate.ncc_agreement", 3))


def table(results: dict[str, dict]) -> str:
    """The outcome for the log."""
    lines = []
    for name, result in results.items():
        lines += ["", f"{name}: {result['num_samples']:,} rows; mean over seeds [95 % interval over seeds]"]
        width, rows = 28, result["matched_rows"]
        last = f"effective rank at {rows} rows" if rows else ""
        lines.append(f"{'':22}" + "".join(f"{key:{width}}" for key, _ in TABLE) + last)
        for key in keys_of(result):
            intervals = result[key]["intervals"]
            cells = "".join(f"{common.format_interval(intervals[number], digits):{width}}" for number, digits in TABLE)
            matched = (
                common.format_interval(intervals["effective_rank_matched"], 1) if "effective_rank_matched" in intervals else ""
            )
            lines.append(f"{display_name(key, result):22}{cells}{matched}")
        for pair, found in result["changes"].items():
            over_seeds, over_rows = (
                common.format_interval(kind["effective_rank"], 1, sign="+") for kind in (found, found["half"])
            )
            half = f"at {found['half']['rows']:,} rows {over_rows} over rows"
            lines.append(f"effective rank, {display_change(pair, result)}: {over_seeds} over seeds; {half}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------------------------------


def seed_band(axis: plt.Axes, x, rows, key: str, label: str | None, **look) -> None:
    """Mean line over seeds, and a band from the lowest to the highest seed; rows is (S, points)."""
    rows = np.array(rows, dtype=float)
    axis.plot(x, rows.mean(0), color=COLORS[key], label=label, **look)
    axis.fill_between(x, rows.min(0), rows.max(0), color=COLORS[key], alpha=0.2, linewidth=0)


def each_model(result: dict) -> Iterator[tuple[str, list[dict], str]]:
    for key in keys_of(result):
        records = list(result[key]["seeds"].values())
        yield key, records, f"{display_name(key, result)} ({len(records)} seed{'s' * (len(records) > 1)})"


def name_models(axis: plt.Axes, result: dict) -> None:
    names = [display_name(key, result) if key == "pretrained" else f"Model {key[-1]}" for key in keys_of(result)]
    axis.set_xticks(range(len(names)), names, fontsize=7)
    axis.set_xlim(-0.6, len(names) - 0.4)


def plot_ranks(path: Path, results: dict[str, dict]) -> None:
    """A row for each study: singular spectrum, cumulative variance, effective rank over rows, effective rank at all rows."""
    figure, axes = plt.subplots(len(results), 4, figsize=(14, 3.2 * len(results)), layout="constrained", squeeze=False)
    for row, (name, result) in zip(axes, results.items(), strict=True):
        for position, (key, records, label) in enumerate(each_model(result)):
            values = np.array([record["singular_values"] for record in records])  # (S, min(N, D))
            components, look = np.arange(1, values.shape[1] + 1), {"marker": MARKERS[key], "markersize": 4, "markevery": 0.15}
            seed_band(row[0], components, values / values.sum(1, keepdims=True), key, label, **look)
            seed_band(row[1], components, 100 * np.cumsum(values**2, 1) / (values**2).sum(1, keepdims=True), key, label, **look)
            curves = [
                record["subsets"] | {str(record["halves"]["rows"]): record["halves"]["effective_rank"]} for record in records
            ]
            sizes = sorted(map(int, curves[0]))
            draws = np.mean([[curve[str(size)] for size in sizes] for curve in curves], axis=0)  # (sizes, draws)
            points = [interval_over_rows(d, size, result["num_samples"]) for d, size in zip(draws, sizes, strict=True)]
            row[2].plot(sizes, [point["mean"] for point in points], color=COLORS[key], marker=MARKERS[key], markersize=4)
            low, high = ([point[end] for point in points] for end in ("low", "high"))
            row[2].fill_between(sizes, low, high, color=COLORS[key], alpha=0.2, linewidth=0)
            interval = result[key]["intervals"]["effective_rank"]
            row[3].bar(position, interval["mean"], color=COLORS[key], alpha=0.8)
            if interval["low"] is not None:
                half = interval["high"] - interval["mean"]
                row[3].errorbar(position, interval["mean"], half, color="black", capsize=4)
            ranks = [record["effective_rank"] for record in records]
            row[3].plot([position] * len(ranks), ranks, ".", color="black")
        bound = min(result["num_samples"] - 1, len(values[0]))
        row[0].set(
            xlabel="component", ylabel="share of the singular values' sum", yscale="log", xscale="log", title=in_two_lines(name)
        )
        row[0].set_ylim(bottom=1e-6)
        row[1].set(xlabel="component", ylabel="cumulative variance (%)", xscale="log", title=f"N = {result['num_samples']:,}")
        row[2].set(xlabel="rows", ylabel="effective rank", title="random subsets\nband: 95 % over rows")
        row[3].set(ylabel="effective rank", title=f"at most {bound:,}; dots: seeds\nbars: 95 % over seeds")
        name_models(row[3], result)
        row[0].legend(fontsize=8)
        for axis in row:
            axis.grid(alpha=0.3)
    figure.suptitle("Pooled hidden states on validation rows")
    common.save_figure(figure, path)


def plot_layers(path: Path, results: dict[str, dict]) -> None:
    """Effective rank by depth, a panel for each study, two abreast."""
    columns = min(2, len(results))
    lines = math.ceil(len(results) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5 * columns, 3.8 * lines), layout="constrained", squeeze=False)
    for axis in axes.flat[len(results) :]:
        axis.remove()
    for axis, (name, result) in zip(axes.flat, results.items(), strict=False):
        for key, records, label in each_model(result):
            ranks = [[layer["effective_rank"] for layer in record["layers"]] for record in records]
            look = {"marker": MARKERS[key], "markersize": 3}
            seed_band(axis, np.arange(len(ranks[0])), ranks, key, label, **look)
        axis.set(
            xlabel="layer (0: embeddings)"
            + ("; last point: after the final norm" if "model" in result["settings"]["config"] else ""),
            ylabel="effective rank of pooled states",
            title=f"{in_two_lines(name)}; N = {result['num_samples']:,}",
        )
        axis.set_ylim(bottom=0)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="lower left", handlelength=1)
    figure.suptitle("Where does the rank go? Mean over seeds; band: lowest to highest seed")
    common.save_figure(figure, path)


COLLAPSE_PANELS = (
    ("cdnv", "NC1: class-distance normalized\nvariance, pooled states"),
    ("intermediate.cdnv", "NC1: the same, classifier's\nintermediate features"),
    ("intermediate.etf_error", "NC2: distance of class means\nfrom a simplex, intermediate"),
    ("intermediate.self_duality_error", "NC3: distance of the head from\nself-duality, intermediate"),
    ("intermediate.ncc_agreement", "NC4: agreement with the nearest\nclass mean, intermediate"),
)


def plot_collapse(path: Path, results: dict[str, dict]) -> None:
    """Neural-collapse measures: a row for each study, a dot for each seed."""
    figure, axes = plt.subplots(len(results), 5, figsize=(14, 2.9 * len(results)), layout="constrained", squeeze=False)
    for row, (name, result) in zip(axes, results.items(), strict=True):
        for axis, (number, label) in zip(row, COLLAPSE_PANELS, strict=True):
            for position, (key, records, _) in enumerate(each_model(result)):
                values = [scalars(record)[number] for record in records]
                axis.plot(position, np.mean(values), "_", color=COLORS[key], markersize=20, markeredgewidth=2)
                axis.plot([position] * len(values), values, MARKERS[key], color=COLORS[key], markersize=5, alpha=0.7)
            if "cdnv" in number:
                axis.set_yscale("log")
                axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
                axis.yaxis.set_major_formatter("{x:g}")
                axis.yaxis.set_minor_formatter("")
                low, high = axis.get_ylim()
                axis.set_ylim(low / 1.3, high * 1.3)  # room for more than one label
            elif axis.get_ylim()[1] < 1e-6:  # two classes always form a simplex: what is left is rounding
                axis.set_ylim(-0.05, 1)
            name_models(axis, result)
            axis.set_ylabel(label, fontsize=9)
            axis.grid(alpha=0.3)
        row[0].set_title(f"{in_two_lines(name)}; N = {result['num_samples']:,}", loc="left")
    models = ", ".join(f"{number}: {name}" for number, name in common.MODEL_NAMES.items())
    meaning = "lower is more collapsed, NC4: higher; dots: seeds, bar: their mean"
    figure.suptitle(f"Neural collapse on validation rows: {meaning}\nmodels {models}")
    common.save_figure(figure, path)


def plot_overview(path: Path, results: dict[str, dict]) -> None:
    """Accuracy, effective rank and engram clusters of every study, with intervals over seeds where there are several.

    Ranks are of as many rows in every study, unless one has too few: a rank rises with the rows.
    """
    figure, axes = plt.subplots(1, 3, figsize=(15, 1.5 + 1.1 * len(results)), layout="constrained", sharey=True)

    def point(axis: plt.Axes, place: float, interval: dict, scale: float, **look) -> None:
        half = 0.0 if interval["low"] is None else scale * (interval["high"] - interval["mean"])
        axis.errorbar(scale * interval["mean"], place, xerr=half, capsize=4, linestyle="none", **look)

    shown: set[str] = set()

    def once(label: str) -> str | None:  # a legend entry for the first of its kind
        return None if label in shown else shown.add(label) or label

    for row, result in enumerate(results.values()):
        for offset, key in enumerate(keys_of(result)):
            intervals, place = result[key]["intervals"], row + 0.18 * (offset - 1.5)
            label = "before training" if key == "pretrained" else display_name(key, result)
            look = {"color": COLORS[key], "marker": MARKERS[key]}
            if key != "pretrained":
                point(axes[0], place, intervals["accuracy"], 100, **look)
            rank = "effective_rank_matched" if result["matched_rows"] else "effective_rank"
            bound = min((result["matched_rows"] or result["num_samples"]) - 1, result[key]["num_dimensions"])
            point(axes[1], place, intervals[rank], 100 / bound, label=once(label), **look)
            if "engram_ari" in intervals:
                point(axes[2], row - 0.1, intervals["engram_ari"], 1, label=once("trained"), **look)
                look |= {"color": COLORS["pretrained"], "marker": "o", "label": once("control: untrained compressor")}
                point(axes[2], row + 0.1, intervals["engram_ari_untrained"], 1, **look)
    axes[0].set_yticks(range(len(results)), map(in_two_lines, results))
    axes[0].invert_yaxis()
    axes[0].set(xlabel="validation accuracy (%)", title="Accuracy")
    matched = next(iter(results.values()))["matched_rows"]
    rows = f"{matched:,} rows" if matched else "the rows of each"
    label = "effective rank (% of the highest possible)\nto be compared within a study: backbones differ in width"
    axes[1].set(xlabel=label, title=f"Rank of pooled states, {rows}", xlim=(0, 100))
    axes[2].set(xlabel="adjusted Rand index with the classes", title="Engram clusters of model 3")
    for axis in axes[1:]:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    measured = next(iter(results.values()))["measured"]
    note = f"{measured['weights']} epoch, up to {measured['rows']:,} validation rows"
    figure.suptitle(f"{note}; mean over seeds, bars: 95 % over seeds where there are several")
    common.save_figure(figure, path)


def main() -> None:
    config = tyro.cli(Config, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    common.check_bounds("rows", config.rows, LEAST_ROWS, math.inf)
    common.check_bounds("draws", config.draws, 2, math.inf)
    device = common.pick_device(config.device)
    file = config.output_dir / "effective_rank_results.json"
    earlier = earlier_studies(file, config)
    folders, here = find_folders(config), common.environment(device)
    studies, names = dict(earlier), {study["folder"]: name for name, study in earlier.items()}
    measured: set[str] = set()
    unusable: list[str] = []
    for folder in folders:
        try:
            name, study = measure_study(folder, config, device, here)
        except common.UserError as error:
            unusable.append(f"{folder}: {error}")
            print(f"NOTE: {unusable[-1]}", flush=True)
            continue
        name = names.setdefault(study["folder"], name if name not in studies else f"{name}, {study['folder']}")
        studies[name] = study
        measured.add(name)
        gc.collect()  # one base model at a time
    if not measured:
        raise common.UserError(f"nothing could be analysed; {' '.join(unusable)}")
    for name in studies.keys() - measured:
        print(f"NOTE: {name} stays as {file} has it: measured by an earlier run")
    results = summarize(studies)
    common.write_json(file, results)
    plot_ranks(config.output_dir / "effective_rank.png", results)
    plot_layers(config.output_dir / "rank_by_layer.png", results)
    plot_collapse(config.output_dir / "neural_collapse.png", results)
    plot_overview(config.output_dir / "overview.png", results)
    print(table(results))
    print(f"\nresults and plots: {config.output_dir}")


if __name__ == "__main__":
    common.run_script(main)
