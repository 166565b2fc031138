"""Write RESULTS.md, and fill the marked blocks of FINDINGS.md and README.md, from the JSON files.

RESULTS.md holds every table and figure of every run, in one order, each study with its command and
where its numbers come from. A block stands between <!--begin NAME--> and <!--end-->; NAME is a
function block_NAME below or in findings_own_models.py, and all between the marks is replaced.
Figures whose numbers are in the JSON files are drawn anew.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from collapse.measures.statistics import format_interval, mean_interval
from collapse.report import plots, rank_plots, records
from collapse.report.comparisons import compare_datasets, comparisons_of
from collapse.report.records import values_of
from collapse.report.reference import REFERENCE, reference_for
from collapse.utils.errors import run_script
from collapse.utils.files import ROOT, read_json, write_file
from studies import sensitivity, sink
from studies.report import own_models, time_tables
from studies.report import result_tables as tables
from studies.report.page import Page, with_full

DOCUMENTS = ("FINDINGS.md", "README.md")
BLOCK = re.compile(r"(?P<begin><!--begin (?P<name>\S+)-->\n).*?(?P<end><!--end-->)", re.DOTALL)


@dataclass(frozen=True)
class Study:
    """A results folder and how its numbers were made."""

    folder: str
    title: str
    short: str  # as tables of FINDINGS.md name it
    command: str
    other: str = ""  # results folder of the same models on the other data set


SMOLLM = "--model smollm2-135m --data-dir DIR --train-limit 2000"
# In the order in which every table and figure has them; a folder without results is passed over.
STUDIES = (
    Study(
        "results",
        "Experiment 1: a small transformer from scratch, SST-2",
        "SST-2, small",
        "python experiment.py --data-dir DIR --seeds 42 43 44",
    ),
    Study(
        "results/movie-snippets",
        "Experiment 1 on movie-review snippets",
        "snippets, small",
        'make experiment ARGS="--seeds 42 43 44"',
    ),
    Study(
        "results/movie-snippets/24-epochs",
        "Experiment 1 on movie-review snippets, three times as long",
        "snippets, small, 24 epochs",
        'make experiment ARGS="--models 1 2 --seeds 42 43 44 --epochs 24 --output-dir '
        'results/movie-snippets/24-epochs"',
    ),
    Study(
        "results_7b",
        "Experiment 2: Qwen2.5-7B, SST-2",
        "SST-2, 7B",
        "python experiment_7b.py --data-dir DIR",
    ),
    Study(
        "results_7b/smollm2-135m",
        "Experiment 2, stand-in: SmolLM2-135M-Instruct, 2,000 rows of SST-2",
        "SST-2, stand-in",
        f"python experiment_7b.py {SMOLLM} --seeds 42 43 44 --output-dir results_7b/smollm2-135m",
    ),
    Study(
        "results_agnews",
        "Experiment 3: Qwen2.5-7B, AG News",
        "AG News, 7B",
        "python experiment_agnews_7b.py --data-dir DIR",
        other="results_7b",
    ),
    Study(
        "results_agnews/smollm2-135m",
        "Experiment 3, stand-in: SmolLM2-135M-Instruct, 2,000 rows of AG News",
        "AG News, stand-in",
        f"python experiment_agnews_7b.py {SMOLLM} --eval-limit 2000 --compute-dtype bfloat16 "
        "--seeds 42 43 44 --output-dir results_agnews/smollm2-135m",
        other="results_7b/smollm2-135m",
    ),
)
CROSS = "results_agnews/smollm2-135m"  # its gains are compared with those of its `other`
RANKS = "results_effective_rank/effective_rank_results.json"
SINK = "studies/results/sink/sink.json"
SIMULATION = "studies/results/statistics/simulation.json"


def present(studies: tuple[Study, ...] = STUDIES) -> list[Study]:
    return [study for study in studies if (ROOT / study.folder / "results.json").exists()]


def short_titles() -> dict[str, str]:
    return {study.folder: study.short for study in STUDIES}


def results_of(study: Study) -> dict:
    return read_json(ROOT / study.folder / "results.json")


def read_ranks() -> dict[str, dict]:
    """Experiment 4 on STUDIES, in their order, with changes as this version tells them."""
    stored = read_json(ROOT / RANKS)
    places = {study.folder: place for place, study in enumerate(STUDIES)}
    known = [name for name, result in stored.items() if result["folder"] in places]
    known.sort(key=lambda name: places[stored[name]["folder"]])
    ordered = {name: stored[name] for name in known}
    return records.summarize(records.with_records(ordered))


def short_names(ranks: dict[str, dict]) -> dict[str, tuple[str, dict]]:
    """Results folder -> short name, and the result of Experiment 4."""
    names = short_titles()
    return {result["folder"]: (names[result["folder"]], result) for result in ranks.values()}


# --------------------------------------------------------------------------------------------------
# RESULTS.md
# --------------------------------------------------------------------------------------------------

INTRODUCTION = """# Results

Every table and figure of every run; `make findings` writes this page from the JSON files. What they
mean stands in [FINDINGS.md](FINDINGS.md).

* *Levels* are the mean of the seeds (lowest to highest seed).
* *Differences* are mean [95% interval]. Of accuracies it is the crossed random-effects interval,
  of ranks and CDNV seed variance plus jackknife variance of the rows: both are for other seeds
  *and* other validation rows. An ARI has no rows: t over the seeds. McNemar's exact p describes
  one pair of trainings, not the method.
* *Best epoch* is chosen on the validation split itself, so it flatters. Model 3 is evaluated with
  the zero engram; *carried*: with that of the row before in a fixed shuffled order.
* Losses are in nats (LM: per token); training values are running means with dropout. Ranks are of
  pooled validation states. Training rows of AG News are drawn from its 9,983-row training subset
  in every study. Columns and rows headed *reference* are
  [the reference's](https://github.com/MikeyBeez/sentiment): one seed, its own code.
"""


TABLES: dict[str, tuple[str, Callable[[Path, dict], str]]] = {
    "accuracy": ("Accuracy.", tables.table_accuracy),
    "comparisons": ("Differences in accuracy.", tables.table_comparisons),
    "training": ("Losses, gradients, effective rank.", tables.table_training),
    "seeds": ("Each training.", tables.table_seeds),
    "engrams": ("Engrams.", tables.table_engrams),
    "measured": ("Ranks and training accuracy on the way.", tables.table_measured),
}


def add_study(page: Page, study: Study) -> None:
    results = results_of(study)
    page.text(f"## {study.title}\n\nCommand: `{study.command}`")
    page.text(tables.provenance(Path(study.folder), results))
    for name, (caption, table) in TABLES.items():
        if shown := table(Path(study.folder), results):
            page.table(f"{study.folder} {name}", caption, shown)
    if study.other and (ROOT / study.other / "results.json").exists():
        other = read_json(ROOT / study.other / "results.json")
        caption = "Beside the other data set."
        page.table(f"{study.folder} cross", caption, tables.table_cross(results, other))
    page.figure(f"{study.folder}/learning_curves.png", f"Learning curves: {study.short}")
    page.figure(f"{study.folder}/rank_over_steps.png", f"Rank over steps: {study.short}")
    page.figure(f"{study.folder}/engram_clusters.png", f"Engrams, t-SNE: {study.short}")


def add_ranks(page: Page) -> None:
    ranks = read_ranks()
    page.text("## Experiment 4: ranks and neural collapse of the saved models")
    page.text("Command: `python effective_rank_analysis.py --data-dir DIR`")
    page.text(tables.provenance_of_ranks(RANKS, ranks))
    matched = next(iter(ranks.values()))["matched_rows"]
    caption = f"Ranks of the pooled states; matched: {matched} rows in every study."
    page.table("ranks levels", caption, tables.table_records(ranks, tables.RANK_COLUMNS))
    caption = "Changes of rank and of neural collapse."
    page.table("ranks changes", caption, tables.table_changes(ranks))
    caption = "Neural collapse: NC1 to NC3 lower, NC4 higher is more collapsed; validation rows."
    page.table("ranks collapse", caption, tables.table_records(ranks, tables.COLLAPSE_COLUMNS))
    page.table("ranks depth", "Effective rank by depth.", tables.table_depth(ranks))
    for name, caption in (
        ("overview", "Overview"),
        ("effective_rank", "Singular spectra and effective ranks"),
        ("rank_by_layer", "Effective rank by depth"),
        ("neural_collapse", "Neural collapse"),
    ):
        page.figure(f"results_effective_rank/{name}.png", caption)


def add_other_studies(page: Page) -> None:
    found, simulation = read_json(ROOT / SINK), read_json(ROOT / SIMULATION)
    page.text("## The first token as an attention sink")
    page.text("Command: `python studies/sink.py --data-dir DIR`")
    lengths, data = found["lengths"], found["data"]
    page.text(
        f"*{found['model']} before fine-tuning, {data['name']}: {data['validation_rows']:,} "
        f"validation rows of {lengths['mean']:.1f} tokens. Source: `{SINK}`, measured "
        f"{tables.origin([found])}.*"
    )
    page.table("sink", "By layer; layer 0 are the embeddings.", tables.table_sink(found))
    page.figure(SINK.replace(".json", ".png"), "Rank, length and norms by layer")
    found = read_json(own_models.BAG_OF_WORDS)
    page.text("## What a bag of words reaches")
    page.text("Command: `python studies/bag_of_words.py --data-dir DIR`")
    file = own_models.BAG_OF_WORDS.relative_to(ROOT)
    page.text(f"*Source: `{file}`, made {tables.origin([found])}.*")
    caption = "Accuracy, %, of TF-IDF and a logistic regression, and of models on the same rows."
    page.table("bag of words", caption, own_models.table_bag_of_words(short_titles()))
    page.text("## What the statistics resolve")
    page.text(f"Command: `python studies/statistics_simulation.py`. Source: `{SIMULATION}`.")
    caption = "Half-widths that ten seeds would have, by the variances of our runs."
    page.table("half widths", caption, tables.table_half_widths(simulation))
    caption = "How often an interval excludes zero where there is no difference, %."
    page.table("false positives", caption, tables.table_false_positives(simulation))


def add_speed_and_reference(page: Page) -> None:
    page.text("## Speed\n\nCommands: `python studies/throughput.py`, `python studies/hours.py`")
    measured = read_json(ROOT / "results/throughput.json")
    caption = "Experiment 1, measured against padding to the maximum length."
    page.table("throughput", caption, tables.table_throughput(measured))
    caption = "The 7B experiments: hours of a training, by card."
    page.table("paper", caption, tables.table_paper(paper_hours()))
    caption = "7B runs on other people's cards (`results_7b/by-others/`), not checked by us."
    page.table("by others", caption, tables.table_by_others(ROOT / "results_7b/by-others"))
    page.text("## The reference's numbers\n\nOne seed each; ranks of its two data sets at other N.")
    page.table("reference accuracy", "Accuracy, %.", tables.table_reference_accuracy())
    page.table("reference ranks", "Ranks.", tables.table_reference_ranks())


def paper_hours() -> dict[str, dict]:
    places = ("results_7b", "results_agnews")
    return {place: read_json(ROOT / place / "throughput_on_paper.json") for place in places}


REFERENCES = """## Works cited

Aghajanyan et al. 2020 (representational collapse in fine-tuning). Dettmers et al. 2023 (QLoRA).
Galanti et al. 2021 (CDNV). Garrido et al. 2022 (RankMe). Hu et al. 2021 (LoRA). Hutto & Gilbert
2014 (the snippets). Papyan et al. 2020 (neural collapse). Radford et al. 2018 (an auxiliary LM
loss of weight one half in fine-tuning). Roy & Vetterli 2007 (effective rank). Searle et al. 1992
(crossed random effects). Shao & Wu 1989 (delete-d jackknife). Wu & Papyan 2024 (Linguistic
Collapse). Xiao et al. 2023 (attention sinks).
"""


def results_page() -> Page:
    page = Page()
    page.text(INTRODUCTION)
    page.text("## The protocol's endpoints")
    page.text("Rules and margins: [studies/PROTOCOL.md](studies/PROTOCOL.md).")
    page.table("endpoints", "P1 to P5, adjusted together by Holm.", own_models.table_endpoints())
    time_tables.add_time(page)
    own_models.add_studies(page)
    for study in present():
        add_study(page, study)
    add_ranks(page)
    add_other_studies(page)
    add_speed_and_reference(page)
    sensitivity.add_tables(page)
    page.text(REFERENCES)
    return page


# --------------------------------------------------------------------------------------------------
# Blocks of FINDINGS.md and README.md
# --------------------------------------------------------------------------------------------------


def repeated() -> list[Study]:
    """Studies on data sets that the reference used, with all three models."""
    found = [study for study in present() if reference_for(Path(study.folder))]
    return [study for study in found if "model3" in results_of(study)["models"]]


def block_hours(page: Page) -> str:
    return tables.table_hours(paper_hours())


Cells = dict[str, str]  # short name of a study -> what a claim's row says of it


def gains() -> Cells:
    """Model 2's gain in final accuracy over Model 1."""
    found = {s.short: comparisons_of(results_of(s))["final"]["model2 - model1"] for s in repeated()}
    return {name: format_interval(pair["interval"], 2, 100, "+") for name, pair in found.items()}


def rank_changes(ranks: dict, pair: str) -> Cells:
    return {
        short: tables.change_cell(result["changes"][pair], "effective_rank", 1)
        for short, result in short_names(ranks).values()
    }


def ari_gain(study: Study) -> dict:
    """Engram ARI of the trained compressor less the untrained one's: over seeds, it has no rows."""
    clusters = [run["cluster"] for run in results_of(study)["models"]["model3"].values()]
    return mean_interval(c["trained"]["ari"] - c["untrained"]["ari"] for c in clusters)


def mild_collapse(ranks: dict) -> tuple[str, Cells]:
    """Where on SST-2 model 1 meets the reference's sign of a mild collapse, by the means of the
    seeds: stable rank and participation ratio fall while the effective rank does not.

    Which ones do; of each its numbers before and after training.
    """
    names = ("effective_rank", "stable_rank", "participation_ratio")
    met, shown = [], {}
    on_sst2 = {name: result for name, result in ranks.items() if name.startswith("SST-2")}
    for short, result in short_names(on_sst2).values():
        change = {
            name: [np.mean(values_of(result, key, name)) for key in ("pretrained", "model1")]
            for name in names
        }
        falls = {name: after < before for name, (before, after) in change.items()}
        if falls == dict(zip(names, (False, True, True), strict=True)):
            met.append(short)
        pairs = (f"{before:.1f}→{after:.1f}" for before, after in change.values())
        shown[short] = "; ".join(pairs)
    return f"met by {'; '.join(met) or 'none'}", shown


def block_claims(page: Page) -> str:
    """What the reference claims, and what stands beside it here."""
    ranks = {k: r for k, r in read_ranks().items() if reference_for(Path(r["folder"]))}
    found = own_models.endpoints()
    claims = [*claims_of_accuracy(found), *claims_of_rank(ranks, found)]
    studies = repeated()
    names = [study.short for study in studies]
    rows = [
        [claim, theirs, *(ours.get(name, "") for name in names), verdict]
        for claim, theirs, ours, verdict in claims
    ]
    header = ["claim of the reference", "its number", *names, "verdict"]
    keys = ["endpoints", "salience"]
    keys += [f"{study.folder} {kind}" for study in studies for kind in ("comparisons", "engrams")]
    keys += [f"{CROSS} cross", "ranks levels", "ranks changes"]
    return with_full(tables.markdown(header, rows, numbers=False), page, *keys)


Claim = tuple[str, str, Cells, str]  # claim, the reference's number, ours, verdict


def claims_of_accuracy(found: dict[str, dict]) -> list[Claim]:
    """H1, H2, H3."""
    here = next(study for study in STUDIES if study.folder == CROSS)
    there = next(study for study in STUDIES if study.folder == here.other)
    compared = compare_datasets(results_of(here), results_of(there))["comparisons"]
    more = format_interval(compared["model2 - model1"]["more_here"], 2, 100, "+")
    their_aris = [REFERENCE[place]["ari"] for place in ("results_7b", "results_agnews")]
    return [
        (
            "H1: Model 2 is more accurate than Model 1, points",
            their_gains(),
            gains(),
            own_models.standing(found, "P1"),
        ),
        (
            "H2: that gain grows with task complexity, points (ours: less SST-2's)",
            "four classes against two: fourteen times",
            {here.short: more},
            own_models.standing(found, "P3"),
        ),
        (
            "H3: engrams group by class unsupervised, ARI (ours: less an untrained compressor's)",
            "SST-2, 7B {}; AG News, 7B {}; no control".format(*their_aris),
            {s.short: format_interval(ari_gain(s), 3, sign="+") for s in repeated()},
            own_models.of_h3(found),
        ),
    ]


def their_gains() -> str:
    names = {study.folder: study.short for study in STUDIES}
    finals = ((names[place], theirs["final"]) for place, theirs in REFERENCE.items())
    gained = ((name, final["model2"] - final["model1"]) for name, final in finals)
    return "; ".join(f"{name} {gain:+.2f}" for name, gain in gained)


def claims_of_rank(ranks: dict[str, dict], found: dict[str, dict]) -> list[Claim]:
    """H4, and the mild collapse on SST-2."""
    sst2, ag_news = (REFERENCE[place]["ranks"] for place in ("results_7b", "results_agnews"))
    start, model1, model2 = (ag_news[key][0] for key in ("pretrained", "model1", "model2"))
    names = ("effective rank", "stable rank", "participation ratio")
    mild = "; ".join(
        f"{name} {sst2['pretrained'][place]}→{sst2['model1'][place]}"
        for place, name in enumerate(names)
    )
    met, shown = mild_collapse(ranks)
    return [
        (
            "H4: Model 1 loses effective rank (ours: less the start)",
            f"AG News, 7B {start}→{model1}",
            rank_changes(ranks, "model1 - pretrained"),
            own_models.of_h4(found),
        ),
        (
            "H4: Model 2 keeps it (ours: less Model 1)",
            f"AG News, 7B {start}→{model2}",
            rank_changes(ranks, "model2 - model1"),
            own_models.standing(found, "P5"),
        ),
        ("On SST-2 Model 1 collapses mildly", mild, shown, met),
    ]


def block_experiments(page: Page) -> str:
    """Three models on each of the reference's data sets: accuracy, rank, engrams, beside its."""
    rows = []
    for folder, (short, result) in short_names(read_ranks()).items():
        theirs = reference_for(Path(folder))
        if not theirs:
            continue
        runs = read_json(ROOT / folder / "results.json")
        start = np.mean(values_of(result, "pretrained", "effective_rank"))
        their_ranks = {key: ranks[0] for key, ranks in theirs.get("ranks", {}).items()}
        for key in records.keys_of(result):
            if key not in runs["models"]:  # before training: the share tells of it
                continue
            finals = [run["final"]["accuracy"] for run in runs["models"][key].values()]
            cells = [f"{100 * np.mean(finals):.2f} ({theirs['final'][key]:.2f})"]
            rank = np.mean(values_of(result, key, "effective_rank"))
            cells.append(f"{rank:.1f}, {100 * rank / start:.0f}%")
            if key in their_ranks:
                share = their_ranks[key] / their_ranks["pretrained"]
                cells[-1] += f" ({their_ranks[key]}, {100 * share:.0f}%)"
            cells.append(engram_cell(runs, theirs) if key == "model3" else "")
            rows.append([short, key.removeprefix("model"), *cells])
        for accuracy in own_models.bag_of_words(folder).values():
            rows.append([short, "bag of words", f"{100 * accuracy:.2f}", "", ""])
    header = ["data, backbone", "model", "accuracy, % (reference)"]
    header += ["effective rank, of the start (reference)", "engram ARI, untrained (reference)"]
    keys = [f"{study.folder} {kind}" for study in repeated() for kind in ("accuracy", "engrams")]
    return with_full(tables.markdown(header, rows), page, *keys, "ranks levels", "bag of words")


def engram_cell(runs: dict, theirs: dict) -> str:
    clusters = [run["cluster"] for run in runs["models"]["model3"].values()]
    aris = [np.mean([c[case]["ari"] for c in clusters]) for case in ("trained", "untrained")]
    return "{:.3f}, {:.3f} ({:.3f})".format(*aris, theirs["ari"])


def fill(text: str, page: Page) -> str:
    """The document with every block made anew; page is RESULTS.md, whose tables they name."""

    blocks = vars(own_models) | globals()

    def replace(match: re.Match) -> str:
        content = blocks[f"block_{match['name']}"](page)
        return f"{match['begin']}\n{content}\n\n{match['end']}"

    return BLOCK.sub(replace, text)


def summarize_and_draw() -> None:
    """Summaries and figures of the tables of own models, figures of what the JSON files hold.

    t-SNE needs the engrams of a run.
    """
    rank_plots.plot_all((ROOT / RANKS).parent, read_ranks())
    own_models.summarize()
    time_tables.summarize()
    sensitivity.write_summary()
    sink.plot((ROOT / SINK).with_suffix(".png"), read_json(ROOT / SINK))
    for study in present():
        results = results_of(study)
        data = results["settings"]["data"]
        rows = f"{data['train_rows']:,} training, {data['validation_rows']:,} validation rows"
        title = f"{results['experiment']} on {data['name']} ({rows})"
        path = ROOT / study.folder / "learning_curves.png"
        plots.plot_learning_curves(path, title, results["models"])


def main() -> None:
    summarize_and_draw()
    page = results_page()
    write_file(ROOT / "RESULTS.md", page.document().encode())
    for name in DOCUMENTS:
        path = ROOT / name
        write_file(path, fill(path.read_text(), page).encode())
    print(f"wrote RESULTS.md and its figures, filled {' and '.join(DOCUMENTS)}")


if __name__ == "__main__":
    run_script(main)
