"""CollapseCallback: it changes nothing of a training, and says when one collapses."""

import json
import os
import random
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import transformers
from test_check import TEXTS

from collapse.check import CollapseCallback
from collapse.utils.errors import UserError
from collapse.utils.files import ROOT

STEPS = 20


class Kill(transformers.TrainerCallback):
    """Leaves three directions of the last states from a step on."""

    def __init__(self, step, value=0.0):
        self.step, self.value = step, value

    def on_step_begin(self, args, state, control, model, **_):
        if state.global_step >= self.step:
            with torch.no_grad():
                model.model.norm.weight[3:] = self.value


def trainer_of(llama, folder, callbacks=(), attach=None, **arguments):
    """A Trainer of a tiny classifier with dropout, of 20 steps of 4 rows."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(llama)
    config.update({"attention_dropout": 0.3, "num_labels": 2, "pad_token_id": 0})
    model = transformers.LlamaForSequenceClassification.from_pretrained(llama, config=config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    rows = [
        {"input_ids": tokenizer(text)["input_ids"][:12], "labels": i % 2}
        for i, text in enumerate(TEXTS)
    ]
    settings = {"max_steps": STEPS, "per_device_train_batch_size": 4, "logging_steps": 5}
    settings |= {"save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True}
    settings |= {"learning_rate": 1e-3, "output_dir": str(folder)} | arguments
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(**settings),
        train_dataset=rows,
        eval_dataset=rows[:8],
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )
    if attach is not None:
        CollapseCallback(TEXTS, max_length=12, **attach).attach(trainer)
    return trainer


def test_a_trainer_without_a_tokenizer_is_told_to_take_one(llama, tmp_path):
    trainer = trainer_of(llama, tmp_path, attach={})
    trainer.processing_class = None
    with pytest.raises(UserError, match="give it processing_class=TOKENIZER"):
        trainer.train()


def measured(trainer):
    return [row for row in trainer.state.log_history if "collapse/alarm" in row]


def everything(trainer):
    """What two trainings have to agree in, bit for bit: weights, moments, generators, logs."""
    times = ("runtime", "per_second")
    logs = [
        {k: v for k, v in row.items() if not k.endswith(times) and "collapse" not in k}
        for row in trainer.state.log_history
        if "collapse/alarm" not in row
    ]
    moments = trainer.optimizer.state_dict()["state"]
    tensors = [*trainer.model.state_dict().values(), torch.get_rng_state()]
    tensors += [t for of_one in moments.values() for t in of_one.values()]
    return tensors, logs, random.getstate(), np.random.get_state()[1].tolist()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_is_the_same_bit_for_bit(llama, tmp_path, checkpointing):
    found = []
    for attach in (None, {"every": 3}):
        trainer = trainer_of(
            llama,
            tmp_path,
            attach=attach,
            gradient_checkpointing=checkpointing,
            eval_strategy="steps",
            eval_steps=10,
        )
        trainer.train()
        found.append(everything(trainer))
    (tensors, *rest), (others, *other_rest) = found
    assert len(tensors) > 40 and all(map(torch.equal, tensors, others))
    assert rest == other_rest
    assert [row["step"] for row in rest[0] if "loss" in row] == [5, 10, 15, 20]
    steps = [row["step"] for row in measured(trainer)]
    assert steps == [0, 3, 6, 9, 10, 12, 15, 18, 20]
    assert measured(trainer)[0]["collapse/components_kept"] == 1


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_it_warns_at_the_second_alarm_and_stops_where_it_is_told_to(llama, tmp_path, value):
    trainer = trainer_of(llama, tmp_path, [Kill(7, value)], {"every": 3, "stop": True})
    with pytest.warns(UserWarning, match="step 12: ") as told:
        trainer.train()
    said = [str(w.message) for w in told if "Lower the rate" in str(w.message)]
    assert len(said) == 1 and "it is untested for the last token" in said[0]
    assert trainer.state.global_step == 12
    alarms = {row["step"]: row["collapse/alarm"] for row in measured(trainer)}
    assert alarms == {0: 0, 3: 0, 6: 0, 9: 1, 12: 1}
    goes_on = trainer_of(llama, tmp_path, [Kill(7, value)], {"every": 3})
    with pytest.warns(UserWarning) as told:
        goes_on.train()
    assert goes_on.state.global_step == STEPS
    assert sum("Lower the rate" in str(w.message) for w in told) == 1


def test_without_a_collapse_it_is_silent_and_with_few_texts_it_gives_no_alarm(llama, tmp_path):
    trainer = trainer_of(llama, tmp_path, attach={"every": 5, "stop": True})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*components")
        trainer.train()
    assert trainer.state.global_step == STEPS
    few = trainer_of(llama, tmp_path, [Kill(7)], {"every": 5, "stop": True, "rows": 100})
    with pytest.warns(UserWarning, match="no alarm given: 100 different texts"):
        few.train()
    assert few.state.global_step == STEPS and measured(few)[-1]["collapse/components_kept"] < 0.25


def test_the_share_kept_chooses_the_best_checkpoint(llama, tmp_path):
    trainer = trainer_of(
        llama,
        tmp_path,
        [Kill(11)],
        {},
        eval_strategy="steps",
        eval_steps=5,
        save_strategy="steps",
        save_steps=5,
        metric_for_best_model="collapse/components_kept",
        greater_is_better=True,
    )
    with pytest.warns(UserWarning, match="COLLAPSED|collapsed"):
        trainer.train()
    assert trainer.state.best_metric > 0.5
    assert trainer.state.best_model_checkpoint.endswith(("-5", "-10"))


def test_a_resumed_run_keeps_the_reference(llama, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 10}
    whole = trainer_of(llama, tmp_path, attach={"every": 5}, **settings)
    whole.train()
    reference = tmp_path / "collapse_reference.json"
    before = reference.read_bytes()
    resumed = trainer_of(llama, tmp_path, attach={"every": 5}, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert reference.read_bytes() == before and json.loads(before)["step"] == 0
    name = "collapse/effective_rank"
    assert measured(resumed)[-1][name] == measured(whole)[-1][name]
    assert (
        resumed.callback_handler.callbacks[-1].start == whole.callback_handler.callbacks[-1].start
    )
    other = trainer_of(llama, tmp_path, attach={"every": 5, "rows": 140}, **settings)
    with pytest.warns(UserWarning, match="the baseline is step 10, not step 0"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert json.loads(reference.read_bytes())["step"] == 10  # other texts: of what is there


WORKER = """
import json, sys, torch
from pathlib import Path
from collapse.measures import against_base
from collapse.models.finetuned import core_of
from test_collapse_callback import measured, trainer_of
torch.set_num_threads(1)
llama, folder = map(Path, sys.argv[1:3])
trainer = trainer_of(llama, folder, [], {"every": 5}, ddp_backend="gloo")
trainer.train()
print("WRAPPED", type(trainer.model_wrapped).__name__)
if trainer.is_world_process_zero():
    callback = trainer.callback_handler.callbacks[-1]
    what = trainer.model, core_of(trainer.model), callback.texts, "last", False
    alone = against_base.pooled_states(*what)
    numbers = against_base.numbers_of(*alone, callback.texts, "last")
    logs = measured(trainer)
    (folder / "found.json").write_text(json.dumps([logs, numbers]))
"""


def test_two_processes_give_the_numbers_of_one(llama, tmp_path):
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    environment = os.environ | {"PYTHONPATH": path, "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(20000 + os.getpid() % 20000), "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", WORKER, str(llama), str(tmp_path)]
    workers = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    said = [worker.communicate(timeout=900)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said[0][-2000:]
    assert all("WRAPPED DistributedDataParallel" in text for text in said)
    logs, numbers = json.loads((tmp_path / "found.json").read_text())
    assert [row["step"] for row in logs] == [0, 5, 10, 15, 20]
    assert logs[-1]["collapse/effective_rank"] == pytest.approx(numbers["effective_rank"], rel=1e-6)
    one = trainer_of(llama, tmp_path / "one", attach={"every": 5}, max_steps=1)
    one.train()
    name = "collapse/effective_rank"
    assert measured(one)[0][name] == pytest.approx(logs[0][name], rel=1e-6)


def test_trl_trains_the_same_and_logs_the_lm_loss(llama, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    found = []
    for attached in (False, True):
        tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
        tokenizer.pad_token = tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
        settings = {"max_steps": 10, "per_device_train_batch_size": 4, "logging_steps": 5}
        settings |= {"save_strategy": "no", "report_to": [], "use_cpu": True, "bf16": False}
        trainer = trl.SFTTrainer(
            transformers.AutoModelForCausalLM.from_pretrained(llama),
            trl.SFTConfig(str(tmp_path), max_length=16, learning_rate=1e-2, **settings),
            train_dataset=datasets.Dataset.from_dict({"text": TEXTS}),
            processing_class=tokenizer,
        )
        if attached:
            CollapseCallback(TEXTS, every=5, max_length=12).attach(trainer)
        trainer.train()
        found.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        weights = trainer.model.state_dict().values()
        found.append([weight.clone() for weight in weights])
    assert found[0] == found[2] and len(found[0]) == 2
    assert all(map(torch.equal, found[1], found[3]))
    changes = [row["collapse/lm_loss_change"] for row in measured(trainer)]
    assert len(changes) == 3 and changes[0] == 0 > changes[-1]
