"""Write RESULTS.md, and fill the marked blocks of FINDINGS.md and README.md, from the JSON files.

RESULTS.md has every table and figure of every run; its text is in results.md.jinja. A block is the
text between <!--begin NAME--> and <!--end-->; it is replaced by the output of BLOCKS[NAME]. Figures
whose numbers are in the JSON files are drawn again.
"""

import re
from collections.abc import Callable, Sequence

from collapse.report import plots, rank_plots
from collapse.utils.errors import run_script
from collapse.utils.files import ROOT, read_json, write_file
from studies import collapse_threshold, sensitivity, sink
from studies.report import (
    claims,
    experiments,
    hero,
    own_models,
    real_models,
    side_studies,
    thresholds,
)
from studies.report.page import Page, results_page

DOCUMENTS = ("FINDINGS.md", "README.md")
AG = "AG News"
BLOCK = re.compile(r"(?P<begin><!--begin (?P<name>\S+)-->\n).*?(?P<end><!--end-->)", re.DOTALL)

# --------------------------------------------------------------------------------------------------
# Blocks of FINDINGS.md and README.md
# --------------------------------------------------------------------------------------------------


def table_threshold() -> str:
    results = own_models.results_of(own_models.CONFIGS["collapse_threshold"])
    return thresholds.table_threshold(results, ("not collapsed", "healthy"), unit=None)


def table_qwen() -> str:
    """How Qwen's runs ended, without the lines about single seeds below it."""
    found = own_models.results_of(own_models.QWEN)["by_components"][AG]
    return thresholds.table_real_model(found).partition("\n\n")[0]


# Name of a block -> a function that gives its table, and keys of the full tables in RESULTS.md.
BLOCKS: dict[str, Callable[[], tuple[str, Sequence[str]]]] = {
    "endpoints": lambda: (
        own_models.short_table_endpoints(),
        ["endpoints", "later endpoints"],
    ),
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
    published, _, _, lost, *_ = collapse_threshold.RATES_OF_A_MODEL
    of_reference = {published: "the reference's rate"}
    for config, title, shaded, marked in (
        (own_models.QWEN, "Qwen2.5-Coder-0.5B-Instruct, LoRA", lost, of_reference),
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
        (own_models.STANDIN, "SmolLM2-135M"),
        (own_models.GEMMA, "Gemma 3 270M"),
        (own_models.QWEN, "Qwen2.5-Coder-0.5B"),
    ):
        for dataset, by_arm in own_models.thresholds_of(config).items():
            columns[f"{name}\n{dataset}"] = by_arm
    predicted = {"Gemma 3 270M\nAG News": own_models.predicted_for_gemma()}
    real_models.draw(thresholds.REAL_MODELS, columns, predicted)


def summarize_and_draw() -> None:
    """Write the summaries of all studies, and draw all figures whose numbers are in files.

    Not those of t-SNE, which need the engrams of a run.
    """
    rank_plots.plot_all(experiments.RANKS.parent, experiments.read_ranks())
    own_models.summarize()
    draw_heroes()
    draw_real_models()
    sensitivity.write_summary()
    sink.plot(side_studies.SINK.with_suffix(".png"), read_json(side_studies.SINK))
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
    write_file(ROOT / "RESULTS.md", page.text.encode())
    for name in DOCUMENTS:
        path = ROOT / name
        write_file(path, fill(path.read_text(), page).encode())
    print(f"wrote RESULTS.md and its figures, filled {' and '.join(DOCUMENTS)}")


if __name__ == "__main__":
    run_script(main)
