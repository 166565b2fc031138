"""Write RESULTS.md, and fill the marked blocks of FINDINGS.md and README.md, from the JSON files.

RESULTS.md has every table and figure of every run, for each study with its command and the origin
of its numbers. A block is the text between <!--begin NAME--> and <!--end-->; it is replaced by the
output of BLOCKS[NAME]. Figures whose numbers are in the JSON files are drawn again.
"""

import math
import re
from collections.abc import Callable, Sequence

from collapse.report import plots, rank_plots
from collapse.utils.errors import run_script
from collapse.utils.files import ROOT, read_json, write_file
from studies import alarm_replay, collapse_threshold, sensitivity, sink
from studies.report import (
    claims,
    experiments,
    hero,
    own_models,
    real_models,
    side_studies,
    thresholds,
)
from studies.report.page import Page

DOCUMENTS = ("FINDINGS.md", "README.md")
AG = "AG News"
BLOCK = re.compile(r"(?P<begin><!--begin (?P<name>\S+)-->\n).*?(?P<end><!--end-->)", re.DOTALL)

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


def add_endpoints(page: Page) -> None:
    page.section("The protocol's endpoints", "What was claimed beforehand, and what came of it?")
    page.text("Rules and margins: [studies/PROTOCOL.md](studies/PROTOCOL.md).")
    caption = "P1 to P5, adjusted together by Holm."
    page.table("endpoints", caption, own_models.table_endpoints())


def add_experiments(page: Page) -> None:
    title = "The reference's three experiments, repeated"
    page.section(title, "How do our numbers stand beside the published ones?")
    caption = "Final epoch, three seeds, and *(the reference's)*, one seed; Model 3 with the zero "
    caption += "engram; *untrained*: a compressor as it was drawn."
    page.table("experiments", caption, claims.table_repeated())
    for study in experiments.studies_with_results():
        experiments.add_study(page, study)


def add_bag_of_words(page: Page) -> None:
    page.section("What a bag of words reaches", "Do the models know more than which words occur?")
    page.text("Command: `python studies/bag_of_words.py --data-dir DIR`")
    made = experiments.origin([read_json(own_models.BAG_OF_WORDS)])
    page.text(f"*Source: `{own_models.BAG_OF_WORDS.relative_to(ROOT)}`, made {made}.*")
    caption = "Accuracy, %, of TF-IDF and a logistic regression, and of models on the same rows."
    titles = {study.folder: study.short for study in experiments.STUDIES}
    page.table("bag of words", caption, own_models.table_bag_of_words(titles))


REFERENCES = """## Works cited

Aghajanyan et al. 2020 (representational collapse in fine-tuning). Dettmers et al. 2023 (QLoRA).
Galanti et al. 2021 (CDNV). Garrido et al. 2022 (RankMe). Hu et al. 2021 (LoRA). Hutto & Gilbert
2014 (the snippets). Papyan et al. 2020 (neural collapse). Radford et al. 2018 (an auxiliary LM
loss of weight one half in fine-tuning). Roy & Vetterli 2007 (effective rank). Searle et al. 1992
(crossed random effects). Shao & Wu 1989 (delete-d jackknife). Wu & Papyan 2024 (Linguistic
Collapse). Xiao et al. 2023 (attention sinks).
"""

SECTIONS: tuple[Callable[[Page], None], ...] = (  # in this order
    add_endpoints,
    thresholds.add_time,
    thresholds.add_threshold,
    thresholds.add_standin_threshold,
    own_models.add_benefit,
    own_models.add_class_count,
    own_models.add_salience,
    own_models.add_pieces,
    own_models.add_linguistic,
    add_experiments,
    experiments.add_ranks,
    side_studies.add_sink,
    add_bag_of_words,
    side_studies.add_statistics,
    side_studies.add_speed,
    side_studies.add_reference,
    sensitivity.add_tables,
    alarm_replay.add_alarm,
)


def results_page() -> Page:
    page = Page()
    page.text(INTRODUCTION)
    for add_section in SECTIONS:
        add_section(page)
    page.text(REFERENCES)
    return page


# --------------------------------------------------------------------------------------------------
# Blocks of FINDINGS.md and README.md
# --------------------------------------------------------------------------------------------------


def table_threshold() -> str:
    results = own_models.results_of(own_models.CONFIGS["collapse_threshold"])
    return thresholds.table_threshold(results, ("not collapsed", "healthy"), unit=None)


def table_qwen() -> str:
    return thresholds.table_real_model(own_models.results_of(own_models.QWEN)["by_components"][AG])


# Name of a block -> a function that gives its table, and keys of the full tables in RESULTS.md.
BLOCKS: dict[str, Callable[[], tuple[str, Sequence[str]]]] = {
    "endpoints": lambda: (own_models.table_endpoints(short=True), ["endpoints"]),
    "threshold": lambda: (table_threshold(), ["threshold", "shifts"]),
    "gains": lambda: (
        own_models.table_gains(),
        ["benefit differences", "benefit ranks", "bag of words"],
    ),
    "qwen": lambda: (
        table_qwen(),
        [f"{own_models.QWEN.model} {kind}{AG}" for kind in ("", "ends ")],
    ),
    "claims": claims.reference_claims,
    "hours": lambda: (side_studies.table_hours(side_studies.paper_hours()), []),
}


def fill(text: str, page: Page) -> str:
    """The document with every block made again; page: RESULTS.md, whose table numbers they name."""

    def replace(match: re.Match) -> str:
        content, keys = BLOCKS[match["name"]]()
        if keys:
            content += f"\n\n*Full: {', '.join(page.numbers[key] for key in keys)}.*"
        return f"{match['begin']}\n{content}\n\n{match['end']}"

    return BLOCK.sub(replace, text)


def draw_heroes() -> None:
    """Rank and accuracy by learning rate on AG News: of the reference's family, and of own models.

    Shaded is a rate at which Model 1 is collapsed and Model 2 is not. Marked is the reference's
    rate, and for own models the one that tuning rows chose for Model 1 in benefit.py.
    """
    own, benefit = (own_models.CONFIGS[name] for name in ("collapse_threshold", "benefit"))
    chosen = own_models.results_of(benefit)["rates"][f"{AG}, model1"]
    published = {math.log10(2e-4): "the reference's rate"}
    lost = round(math.log10(1.6e-3), 5)  # as the tables store it
    for config, title, shaded, marked in (
        (own_models.QWEN, "Qwen2.5-Coder-0.5B-Instruct, LoRA", lost, published),
        (own, "Small language models", -2.25, {chosen: "rate one would choose"}),
    ):
        runs = [r for r in collapse_threshold.read_runs(config.folder) if r.trial.dataset == AG]
        if runs:
            title += f": {thresholds.steps_of(config)} steps on {AG}"
            hero.draw(config.folder / "hero.png", title, runs, shaded, marked)


def draw_real_models() -> None:
    """The rates at which real models collapse, in order of size; a column a data set."""
    columns = {}
    for config, name in (
        (own_models.STANDIN, "SmolLM2-135M-Instruct"),
        (own_models.QWEN, "Qwen2.5-Coder-0.5B-Instruct"),
    ):
        for run in collapse_threshold.read_runs(config.folder):
            columns.setdefault(f"{name}\n{run.trial.dataset}", []).append(run)
    real_models.draw(ROOT / thresholds.REAL_MODELS, columns)


def summarize_and_draw() -> None:
    """Write the summaries of all studies, and draw all figures whose numbers are in files.

    Not those of t-SNE, which need the engrams of a run.
    """
    rank_plots.plot_all((ROOT / experiments.RANKS).parent, experiments.read_ranks())
    own_models.summarize()
    draw_heroes()
    draw_real_models()
    sensitivity.write_summary()
    path = ROOT / side_studies.SINK
    sink.plot(path.with_suffix(".png"), read_json(path))
    for study in experiments.studies_with_results():
        results = experiments.results_of(study)
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
