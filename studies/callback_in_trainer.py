"""Does CollapseCallback warn in a Trainer of transformers at a rate that collapses, and only there?

Fine-tunes an own small language model (studies/shared/pretrain.py), or --model, as transformers
does it, on 500 sentences of SST-2 at two learning rates: with a fresh classifier on the last token
(of a BERT: the first), or with --sft as a language model, by trl. The callback measures the
sentences of the development set. Writes losses, components kept, alarms and warnings of both runs
into results.json, for --model into a file of its name. Minutes on a CPU.
"""

import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
import tyro

from collapse.check import CollapseCallback
from collapse.data.task import Task, in_corpus_text, limit_task
from collapse.models.pretrained import find_model
from collapse.utils.device import set_threads
from collapse.utils.errors import run_script
from collapse.utils.files import ROOT, digest_weights, write_json
from collapse.utils.provenance import environment, git_commit
from studies.shared import finetune, pretrain

OUTPUT = ROOT / "studies" / "results" / "callback_in_trainer"
EVERY, WARMUP_STEPS, TRAIN_ROWS, MAX_LENGTH = 10, 10, 500, 32


@dataclass
class Config:
    """Settings of the study; the comment above a field is its --help text."""

    # Folder with SST-2 in its official layout. Default: the Hugging Face hub.
    data_dir: Path | None = None
    # Another model to fine-tune: smollm2-135m, or the folder or name of any.
    model: str | None = None
    # Learning rates, one training at each.
    rates: tuple[float, ...] = (1e-2, 5e-4)
    # Steps of a training, of 16 sentences.
    steps: int = 120
    # What the callback reads: auto (what the classifier reads), mean, last or first.
    read: str = "auto"
    # Train on the sentences' tokens, with trl's SFTTrainer, in place of a classifier.
    sft: bool = False
    # Compute in bfloat16 (autocast): faster on CPUs that multiply it in hardware.
    bfloat16: bool = False
    # Text of the own language model.
    corpus: pretrain.CorpusName = "newsgroups"
    # Folder for own language models.
    models_dir: Path = pretrain.LANGUAGE_MODELS
    # File for the results. Default: in studies/results/callback_in_trainer.
    output: Path | None = None


def make_trainer(
    config: Config, model: Path, task: Task, rate: float, folder: Path
) -> transformers.Trainer:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.convert_ids_to_tokens(0)
    torch.manual_seed(0)
    arguments = {
        "output_dir": str(folder),
        "max_steps": config.steps,
        "per_device_train_batch_size": 16,
        "learning_rate": rate,
        "warmup_steps": WARMUP_STEPS,
        "lr_scheduler_type": "constant_with_warmup",
        "logging_steps": config.steps // 3,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": config.bfloat16,
        "disable_tqdm": True,
    }
    if config.sft:
        return trl.SFTTrainer(
            transformers.AutoModelForCausalLM.from_pretrained(model),
            trl.SFTConfig(max_length=MAX_LENGTH, **arguments),
            train_dataset=datasets.Dataset.from_dict({"text": task.train.texts}),
            processing_class=tokenizer,
        )
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=len(task.class_names)
    )
    classifier.config.pad_token_id = tokenizer.pad_token_id
    rows = [
        {"input_ids": tokenizer(text)["input_ids"][:MAX_LENGTH], "labels": label}
        for text, label in zip(task.train.texts, task.train.labels, strict=True)
    ]
    return transformers.Trainer(
        classifier,
        transformers.TrainingArguments(**arguments),
        train_dataset=rows,
        processing_class=tokenizer,
    )


def train(config: Config, model: Path, task: Task, rate: float, folder: Path) -> dict[str, Any]:
    """One training; what the callback logged, and its warnings."""
    trainer = make_trainer(config, model, task, rate, folder)
    trainer.remove_callback(transformers.PrinterCallback)
    limits = {"every": EVERY, "max_length": MAX_LENGTH, "read": config.read}
    CollapseCallback(task.validation.texts, **limits).attach(trainer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    log = trainer.state.log_history
    measured = [record for record in log if "collapse/alarm" in record]
    return {
        "rate": rate,
        "loss": {record["step"]: record["loss"] for record in log if "loss" in record},
        "components_kept": {r["step"]: r["collapse/components_kept"] for r in measured},
        "alarm": {record["step"]: record["collapse/alarm"] for record in measured},
        "warnings": [str(w.message) for w in caught if "components are left" in str(w.message)],
    }


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    set_threads(1)
    task = limit_task(finetune.load_task("SST-2 by sentence", config.data_dir), TRAIN_ROWS, 872)
    settings, output = {}, config.output or OUTPUT / "results.json"
    if config.model:
        model = Path(find_model(config.model))
        names = ("steps", "read", "sft", "bfloat16")
        settings = {"model": model.name, **{name: getattr(config, name) for name in names}}
        name = f"{model.name}-sft" if config.sft else model.name
        output = config.output or OUTPUT / f"{name}.json"
    else:
        (model,) = pretrain.backbones([0], config.corpus, config.models_dir)
        task = in_corpus_text(task)
    with tempfile.TemporaryDirectory() as folder:
        runs = [train(config, model, task, rate, Path(folder)) for rate in config.rates]
    made_with = environment(torch.device("cpu"), git_commit())
    output.parent.mkdir(parents=True, exist_ok=True)
    results = {**settings, "runs": runs, "weights_sha256": digest_weights(model), **made_with}
    write_json(output, results)
    for run in runs:
        kept = ", ".join(f"{step}: {share:.2f}" for step, share in run["components_kept"].items())
        print(f"rate {run['rate']:g}: components kept after step {kept}")
        print("\n".join(run["warnings"]) or "no warning")


if __name__ == "__main__":
    run_script(main)
