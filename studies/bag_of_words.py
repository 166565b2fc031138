"""How well does a bag of words classify the rows that the models are trained on?

Fits a logistic regression on TF-IDF of single words, with the training and validation rows of each
experiment and study, whole texts. The strength of its L2 penalty is chosen on held-out training
rows, as a model's learning rate is; then it is fitted on all training rows. A model's accuracy
means little if this baseline, which knows no language, reaches it. Writes
studies/results/bag_of_words/results.json.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from collapse.data.registry import load_again
from collapse.data.task import Rows, Task, in_corpus_text, limit_task, tuning_split
from collapse.utils.device import pick_device
from collapse.utils.errors import run_script
from collapse.utils.files import ROOT, read_json, write_json
from collapse.utils.provenance import environment
from studies import benefit, class_count, collapse_threshold
from studies.report import experiments
from studies.report.own_models import BAG_OF_WORDS
from studies.shared import finetune

STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # scikit-learn's C: larger is a weaker penalty


@dataclass
class Config:
    """Settings; the comment above a field is its --help text."""

    # Folder with the data sets in their official layouts. Default: the Hugging Face hub.
    data_dir: Path | None = None


def tasks(data_dir: Path | None) -> Iterator[tuple[str, str, Task]]:
    """(results folder, name of the data set, its task) of every experiment and study."""
    for study in experiments.studies_with_results():
        data = read_json(ROOT / study.folder / "results.json")["settings"]["data"]
        yield study.folder, data["name"], load_again(data, data_dir)
    for name, (rows, _) in collapse_threshold.SIZES.items():
        if name != finetune.TOY:
            task = limit_task(finetune.load_task(name, data_dir), rows, finetune.MEASURED_ROWS)
            yield "studies/results/collapse_threshold/newsgroups", name, in_corpus_text(task)
    for name, size in benefit.SIZES.items():
        if name != finetune.TOY:
            task, _ = finetune.load_split(name, data_dir)
            task = limit_task(task, size.train_rows, None)
            yield "studies/results/benefit/newsgroups", name, task
    for classes in class_count.COUNTS:
        task, _ = class_count.load_merged(classes, "nested", 0, data_dir)
        yield "studies/results/class_count/newsgroups", f"{classes} classes", task


def measure(task: Task) -> dict[str, Any]:
    """Accuracy on validation rows, and the chosen C with its accuracy on held-out rows."""
    reduced, held_out = tuning_split(task, min(finetune.TUNING_ROWS, len(task.train) // 5))
    accuracy_by_strength = {
        strength: accuracy(reduced.train, held_out, strength) for strength in STRENGTHS
    }
    best = max(accuracy_by_strength, key=accuracy_by_strength.get)
    return {
        "train_rows": len(task.train),
        "validation_rows": len(task.validation),
        "classes": len(task.class_names),
        "accuracy": accuracy(task.train, task.validation, best),
        "C": best,
        "held_out_accuracy": accuracy_by_strength[best],
    }


def accuracy(train: Rows, test: Rows, strength: float) -> float:
    """Accuracy on test rows of a bag of words that is fitted on the training rows."""
    words = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b", sublinear_tf=True)
    model = make_pipeline(words, LogisticRegression(C=strength, max_iter=1000))
    predicted = model.fit(train.texts, train.labels).predict(test.texts)
    return float(np.mean(predicted == np.array(test.labels)))


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    rows = []
    for folder, name, task in tasks(config.data_dir):
        rows.append({"folder": folder, "data": name, **measure(task)})
        row = rows[-1]
        print(f"{folder}, {name}: {row['accuracy']:.2%} (C {row['C']:g})", flush=True)
    made = environment(pick_device("cpu"))
    write_json(BAG_OF_WORDS, {"rows": rows, **made})


if __name__ == "__main__":
    run_script(main)
