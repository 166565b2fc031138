"""A callback for any Trainer that says when a training collapses."""

import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback

from collapse.check.report import ADVICE, OTHER_READ, READS
from collapse.measures import against_base
from collapse.models.finetuned import core_of, has_lm_head, what_its_head_reads
from collapse.utils.errors import UserError
from collapse.utils.files import read_json, write_json

REFERENCE = "collapse_reference.json"
KEPT = "collapse/components_kept"
LOGGED = ("effective_rank", "effective_rank_without_first", "effective_rank_within", "stable_rank")
LOGGED += ("cdnv", "sink_ratio")


class CollapseCallback(TrainerCallback):
    """Measures fixed texts at step 0, evaluations, every so many steps and the last, and logs it.

    `collapse/alarm` is 1 where under 32.5% of the components of step 0 are left, or a state is not
    finite. Twice running it warns and, with `stop`, ends the training; nothing else of it changes.
    every: by default a twentieth of all steps, ten or more. RESULTS.md says how often it errs.
    """

    def __init__(
        self,
        texts: Sequence[str],
        labels: Sequence[Any] | None = None,
        every: int | None = None,
        stop: bool = False,
        rows: int = against_base.ROWS,
        max_length: int = against_base.MAX_LENGTH,
        read: str = "auto",
    ):
        self.text_arguments = texts, labels, rows, max_length
        self.every, self.stop, self.read = every, stop, read
        self.start: dict[str, Any] | None = None
        self.latest: tuple[int, float | None] | None = None  # step, components kept

    def attach(self, trainer: Any) -> "CollapseCallback":
        self.trainer = trainer
        trainer.add_callback(self)
        return self

    def on_train_begin(self, args, state, control, **_) -> None:
        texts, labels, *limits = self.text_arguments
        self.core, self.latest = core_of(self.trainer.model), None
        tokenizer = self.trainer.processing_class
        if tokenizer is None:
            raise UserError("the Trainer has no tokenizer: give it processing_class=TOKENIZER.")
        self.texts = against_base.draw_texts(texts, labels, tokenizer, *limits)
        self.reads = what_its_head_reads(self.core) if self.read == "auto" else self.read
        identity, stored = {"texts_sha256": self.texts.sha256, "read": self.reads}, None
        file = Path(args.output_dir) / REFERENCE
        if state.global_step and state.is_world_process_zero and file.exists():
            stored = read_json(file)
            stored = stored["numbers"] if stored | identity == stored else None
        self.start = (stored := _from_rank_zero(stored)) or self.measure(state)
        if state.global_step and not stored and state.is_world_process_zero:
            why = f"{file} is missing or of other texts: "
            why += f"the baseline is step {state.global_step}, not step 0"
            warnings.warn(why, stacklevel=2)
        if state.is_world_process_zero and not stored:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, {**identity, "step": state.global_step, "numbers": self.start})
        verdict, why = against_base.judge(self.start, self.start, self.texts)
        if verdict == "no verdict" and state.is_world_process_zero:
            warnings.warn(f"collapse is measured, but no alarm given: {why}", stacklevel=2)
        self.observe(state, control, None if stored else self.start)

    def on_step_end(self, args, state, control, **_) -> None:
        every = self.every or max(10, state.max_steps // 20)
        if state.global_step % every == 0 or state.global_step >= state.max_steps:
            self.observe(state, control)

    def on_evaluate(self, args, state, control, metrics, **_) -> None:
        if self.latest:  # else nothing trains
            self.observe(state, control)
            metrics[f"eval_{KEPT}"] = self.latest[1] or 0.0

    def measure(self, state: Any) -> dict[str, Any]:
        """In every process, for they may share the layers out; the first one's numbers count."""
        model, causal = self.trainer.model_wrapped, has_lm_head(self.core)
        arguments = self.texts, self.reads
        states, loss = against_base.pooled_states(model, self.core, *arguments, causal)
        first = state.is_world_process_zero
        return _from_rank_zero(against_base.numbers_of(states, loss, *arguments) if first else None)

    def observe(self, state: Any, control: Any, now: dict[str, Any] | None = None) -> None:
        """Measure, unless `now` is what there is, and log; once a step."""
        if self.latest and self.latest[0] == state.global_step:
            return
        began = time.perf_counter()
        now = now or self.measure(state)
        verdict, why = against_base.judge(now, self.start, self.texts, against_base.ALARM)
        self.latest = state.global_step, against_base.share_kept(now, self.start)
        record = {name: now[name] for name in LOGGED} | {"components": now["dims_95pct"]}
        record["components_kept"] = self.latest[1]
        losses = now["lm_loss"], self.start["lm_loss"]
        record["lm_loss_change"] = losses[0] - losses[1] if None not in losses else None
        record["alarm"] = int(verdict in ("collapsed", "not finite"))
        record["seconds"] = time.perf_counter() - began
        should_log = control.should_log
        self.trainer.log({f"collapse/{k}": v for k, v in record.items() if v is not None})
        control.should_log = should_log  # which `log` clears, and the loss would not be logged
        alarms = [row["collapse/alarm"] for row in state.log_history if "collapse/alarm" in row]
        if alarms[-2:] == [1, 1]:
            if state.is_world_process_zero and alarms[-3:] != [1, 1, 1]:  # said once
                if self.reads != "mean":
                    why += " " + OTHER_READ % READS[self.reads]
                warnings.warn(f"step {state.global_step}: {verdict}: {why} {ADVICE}", stacklevel=2)
            control.should_training_stop |= self.stop


def _from_rank_zero(value: Any) -> Any:
    """One process's value in all: two that differ in a last digit must not stop apart."""
    if dist.is_available() and dist.is_initialized():
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]
    return value
