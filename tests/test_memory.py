"""A model's memory: what is counted, freed, planned for a step, and done when it runs out."""

import ctypes
import gc
import itertools
import os
import subprocess
import sys

import numpy as np
import psutil
import pytest
import torch
import transformers
from conftest import SIZES, arm_of, random_split, save_tiny, tiny_model
from test_architectures import random_model
from test_language_model import CPU, build, gradients_of_step, stir, tiny_settings

import common
from collapse.models import memory
from collapse.models.losses import kl_from_start_sum
from collapse.models.memory import DOES_NOT_FIT, _activation_bytes
from collapse.models.pretrained import check_lm_loss, store_logit_scaling
from collapse.utils import device
from collapse.utils.device import pick_device
from collapse.utils.errors import UserError, is_out_of_memory, what_to_do
from collapse.utils.files import ROOT

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory.")


@pytest.fixture(scope="session")
def wide_qwen(tmp_path_factory):
    """Wide enough that a model which stays in memory shows."""
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 256, "intermediate_size": 1024}
    config = transformers.Qwen2Config(**sizes, tie_word_embeddings=False)
    folder = tmp_path_factory.mktemp("models") / "wide-qwen2"
    return save_tiny(transformers.Qwen2ForCausalLM(config), folder)


def process_bytes() -> int:
    """Memory of this process, once what is free has gone back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_count_of_activations_holds_on_to_no_weight(qwen, quantization):
    model = build(3, qwen, quantization=quantization)

    def holders():
        storages = [p.untyped_storage() for p in model.parameters()]
        return [torch._C._storage_Use_Count(storage._cdata) for storage in storages]

    _activation_bytes(model)  # bitsandbytes and peft may hold more after their first pass
    before = holders()
    _activation_bytes(model)
    assert holders() == before


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_models_that_are_built_and_dropped_leave_no_memory_behind(wide_qwen, quantization):
    """Of five models, each of 2 million parameters and some megabytes of activations."""
    sizes = []
    for _ in range(6):
        model = build(2, wide_qwen, quantization=quantization)
        if quantization == "nf4":
            model.memory_plan.unpack(2)
        gradients_of_step(model)
        del model
        sizes.append(process_bytes())
    assert sizes[-1] - sizes[0] < 2 * 2**20  # the first one also loads code


def test_unpacking_changes_memory_by_what_it_says(wide_qwen):
    """Bytes of all tensors that modules hold, in whatever way a step left them."""
    model = build(2, wide_qwen, quantization="nf4")
    plan, rss = model.memory_plan, []

    def held():
        found = {}
        for module in model.modules():
            for tensor in [*module._parameters.values(), *module._buffers.values()]:
                if tensor is not None:
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        packed = (m.weight for layer in plan.packed for _, _, m in layer)
        found |= {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in packed}
        return sum(found.values())

    start, weights = held(), plan.weight_bytes
    for count in (1, 2, 0, 2, 0):
        plan.unpack(count)
        gradients_of_step(model)
        assert held() - start == count * plan.unpacking_bytes == plan.weight_bytes - weights
        rss.append(process_bytes())
    assert rss[1] - rss[2] == pytest.approx(2 * plan.unpacking_bytes, rel=0.25)
    assert rss[4] - rss[2] < 2 * 2**20


def test_the_prefix_of_model_3_is_in_the_plan(qwen):
    split, planned = random_split(8, longest=10, vocabulary=60), {}
    for number in (2, 3):
        model = build(number, qwen)
        trainer = common.make_trainer(model, split, tiny_settings(qwen), arm_of(number))
        trainer.accumulate_gradients(np.arange(8))
        shapes = [
            trainer.collate(part).input_ids.numel() for part in trainer.sequences(range(8))[0]
        ]
        planned[number] = model.memory_plan.tokens - sum(shapes)
        plan = model.memory_plan
        plan.unpack_what_fits(split, 4)
        assert plan.longest == 4 * (split.lengths.max() + (number == 3))
    assert planned == {2: 0, 3: 8}


def test_the_first_layer_computes_no_gradient_for_the_embeddings(qwen):
    model = build(1, qwen, gradient_checkpointing="on").train()
    embeddings = model.backbone.get_input_embeddings()(torch.zeros(1, 3, dtype=torch.int64))
    assert not embeddings.requires_grad
    assert all(
        gradient.abs().sum() > 0 for gradient in gradients_of_step(stirred(model))[1].values()
    )


def stirred(model):
    stir(model)
    return model


# --------------------------------------------------------------------------------------------------
# Out of memory
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (OUT_OF_MEMORY, True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), False),
        (ValueError("out of memory"), False),
        (UserError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, is_it):
    assert is_out_of_memory(error) == is_it
    if is_it:
        assert "GPU memory is full" in what_to_do(error)


def failing(trainer, monkeypatch, times: int, error=OUT_OF_MEMORY) -> list[tuple[int, int, int]]:
    """The trainer's first passes run out of memory, after they are planned.

    Returns what will hold, of every try, layers unpacked and recomputed, and rows in a micro-batch.
    """
    compute, tries = trainer.model.forward, []

    def forward(*arguments):
        plan = trainer.model.memory_plan
        recomputed = sum(layer.gradient_checkpointing for layer in plan.layers)
        tries.append((plan.unpacked, recomputed, trainer.micro_batch_size))
        if len(tries) <= times:
            raise error
        return compute(*arguments)

    monkeypatch.setattr(trainer.model, "forward", forward)
    return tries


def trainer_with_room(qwen, layers: int, mode="auto"):
    """A trainer whose plan has room for a step with all unpacked, and so many layers more."""
    model = build(2, qwen, quantization="nf4", gradient_checkpointing=mode)
    split = random_split(8, longest=10, vocabulary=60)
    trainer = common.make_trainer(model, split, tiny_settings(qwen), arm_of(2))
    plan = model.memory_plan
    plan.WORKING_BYTES = 0  # a gigabyte would hide all else of a tiny model
    plan.free_bytes = 2**50
    plan.unpack_what_fits(split, 8)
    plan.free_bytes = plan.expected_bytes(8 * 10, 0) + layers * plan.unpacking_bytes
    return trainer


def test_out_of_memory_gives_up_only_what_it_must(tmp_path, monkeypatch):
    """A tenth less memory each time: fewer layers unpacked, more recomputed, then fewer rows."""
    monkeypatch.setattr(memory, "EVALUATION_TOKENS", {"cpu": 16})
    deep = save_tiny(random_causal_lm("Qwen2", num_hidden_layers=8), tmp_path / "deep")
    trainer = trainer_with_room(deep, layers=0)
    plan, needs = trainer.model.memory_plan, []
    shrink = plan.shrink

    def watched():
        before = plan.expected_bytes(plan.tokens, plan.layers_to_recompute(plan.tokens))
        found = shrink()
        after = plan.expected_bytes(plan.tokens, plan.layers_to_recompute(plan.tokens))
        needs.append((found, before, after))
        return found

    monkeypatch.setattr(plan, "shrink", watched)
    tries = failing(trainer, monkeypatch, 1000)
    with pytest.raises(UserError):
        trainer.step(np.arange(8), 1e-3)
    assert tries[0] == (8, 0, 8)
    packed = [unpacked for unpacked, _, rows in tries if rows == 8]
    assert packed == sorted(packed, reverse=True) and len(set(packed)) > 3 and packed[-1] == 0
    recomputed = [count for _, count, rows in tries if rows == 8]
    assert recomputed == sorted(recomputed) and recomputed[-1] == 7 and len(set(recomputed)) > 2
    assert [rows for *_, rows in tries] == sorted((rows for *_, rows in tries), reverse=True)
    for found, before, after in needs:
        assert after < before if found else after == before


@pytest.mark.parametrize("mode", ["on", "off"])
def test_out_of_memory_leaves_recomputation_as_it_was_asked_for(qwen, monkeypatch, mode):
    trainer = trainer_with_room(qwen, layers=0, mode=mode)
    tries = failing(trainer, monkeypatch, 2)
    trainer.step(np.arange(8), 1e-3)
    assert {recomputed for _, recomputed, _ in tries} == {2 if mode == "on" else 0}
    assert tries[-1][0] == 0 and tries[-1][2] < 8


def test_a_step_after_running_out_of_memory_is_the_same_step(qwen, monkeypatch):
    found = []
    for times in (0, 4):
        trainer = trainer_with_room(qwen, layers=0)
        stir(trainer.model)
        failing(trainer, monkeypatch, times, RuntimeError("CUDA error: out of memory"))
        trainer.step(np.arange(8), 1e-3)
        found.append({name: p.detach().clone() for name, p in trainer.model.trainable().items()})
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, atol=1e-5, rtol=1e-4)


def test_a_row_that_does_not_fit_ends_in_one_sentence(qwen, monkeypatch):
    trainer = trainer_with_room(qwen, layers=0)
    failing(trainer, monkeypatch, 1000)
    with pytest.raises(UserError, match="does not hold a single row"):
        trainer.step(np.arange(8), 1e-3)


def test_other_errors_of_a_step_are_raised(qwen, monkeypatch):
    trainer = trainer_with_room(qwen, layers=0)
    failing(trainer, monkeypatch, 1, RuntimeError("shapes"))
    with pytest.raises(RuntimeError, match="shapes"):
        trainer.step(np.arange(8), 1e-3)


@pytest.mark.parametrize("number", [2, 3])
def test_an_evaluation_that_runs_out_of_memory_goes_on_with_smaller_batches(number, monkeypatch):
    model, split = tiny_model(number), random_split(60)
    expected = common.evaluate(model, split)
    compute, sizes = model.forward, []

    def forward(ids, *arguments):
        sizes.append(ids.numel())
        if ids.numel() > 60:
            raise OUT_OF_MEMORY
        return compute(ids, *arguments)

    monkeypatch.setattr(model, "forward", forward)
    found = common.evaluate(model, split)
    assert sizes[0] > 60 and len(sizes) > 60 // 12
    too_large = [size for size in sizes if size > 60]
    assert all(later <= size / 2 for size, later in itertools.pairwise(too_large))
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)
    np.testing.assert_array_equal(found.labels, expected.labels)
    assert found.lm_loss == pytest.approx(expected.lm_loss, rel=1e-5)
    assert found.cls_loss == pytest.approx(expected.cls_loss, rel=1e-5)
    if number == 3:
        np.testing.assert_allclose(found.engrams, expected.engrams, atol=1e-5)
    monkeypatch.setattr(model, "forward", lambda *_: (_ for _ in ()).throw(OUT_OF_MEMORY))
    with pytest.raises(UserError, match=DOES_NOT_FIT[:30]):
        common.evaluate(model, split)


def test_main_sets_the_allocator_and_an_import_does_not():
    """In every script that may train on a GPU, and what a person has set stays."""
    scripts = [path.stem for path in ROOT.glob("*.py") if path.stem != "common"]
    show = "print(os.environ.get('PYTORCH_ALLOC_CONF'))"
    stop = "tyro.cli = lambda *_, **__: SystemExit"  # whatever main does next with that fails
    code = f"""
import importlib, os, sys, tyro
import common  # once; each script is then a process of its own
for name in sys.argv[1:]:
    if os.fork() == 0:
        script = importlib.import_module(name)
        {show}
        {stop}
        try:
            script.main()
        except Exception:
            {show}
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTORCH_ALLOC_CONF"}
    environment["PYTHONPATH"] = str(ROOT)
    for given, expected in ((None, "expandable_segments:True"), ("backend:native",) * 2):
        own = {} if given is None else {"PYTORCH_ALLOC_CONF": given}
        names = scripts if given is None else scripts[:1]
        command = [sys.executable, "-c", code, *names]
        found = subprocess.run(command, env=environment | own, capture_output=True, text=True)
        assert found.stdout.split() == [str(given), expected] * len(names), found.stderr


def test_a_plan_counts_as_free_what_an_earlier_model_left(qwen, monkeypatch):
    calls, free = [], memory._free_bytes
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    monkeypatch.setattr(memory, "_free_bytes", lambda device: calls.append("free") or free(device))
    build(1, qwen)
    assert calls == ["empty", "free"]


@pytest.mark.parametrize("source", ["nvidia-smi", "proc"])
def test_a_driver_that_torch_cannot_use_is_named(source, monkeypatch, capsys, tmp_path):
    """torch's wheels for CUDA 13 need driver 580; an older one looks like no GPU at all."""

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "DRIVER_FILE", tmp_path / "version")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert pick_device("auto") == CPU and not capsys.readouterr().out
    with pytest.raises(UserError, match="no CUDA device"):
        pick_device("cuda")
    if source == "proc":
        line = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 2024\n"
        (tmp_path / "version").write_text(line)
    else:
        tool = tmp_path / "nvidia-smi"
        tool.write_text("#!/bin/sh\necho 535.183.01\n")
        tool.chmod(0o755)
    assert pick_device("auto") == CPU
    assert "driver 535.183.01" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"driver 535.183.01.*580.*pip install.*torch==2.*/cu129"):
        pick_device("cuda")


# --------------------------------------------------------------------------------------------------
# Other models
# --------------------------------------------------------------------------------------------------

KINDS = {kind: {} for kind in ("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma3", "Olmo2", "SmolLM3")}
KINDS |= {"Gemma": {"head_dim": 16}, "Gemma2": {"final_logit_softcapping": 3.0}}
KINDS |= {"Granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0}}
KINDS |= {"Cohere": {"logit_scale": 0.0625}}


def random_causal_lm(kind: str, **changes):
    """Its LM head is large, so that what is done to logits matters."""
    model = random_model(kind, **KINDS[kind] | changes).requires_grad_(False)
    model.get_output_embeddings().weight.data *= 20
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_lm_loss_and_its_gradient_are_those_of_the_model(kind, tmp_path):
    """From its folder, as experiments load it, with adapters whose gradients are compared."""
    folder = save_tiny(random_causal_lm(kind), tmp_path / kind)
    model = build(2, folder, lora_dropout=0.0)
    stir(model)
    sums, found = gradients_of_step(model, lm_weight=0.999)
    split = random_split(8, longest=10, vocabulary=60)
    model.zero_grad()
    causal_lm = model.adapters.get_base_model()
    total, targets = 0.0, sum(split.lengths - 1)
    for ids in split.token_ids:
        if len(ids) > 1:
            loss = causal_lm(input_ids=ids[None], labels=ids[None]).loss * (len(ids) - 1)
            total += loss.item()
            (loss * 0.999 / targets).backward()
    assert sums.lm_loss == pytest.approx(total, rel=1e-4)
    parts = [name for name in found if ".lora_" in name]
    ours, own = (
        torch.cat([gradients[name].flatten() for name in parts])
        for gradients in (found, {n: p.grad for n, p in model.named_parameters()})
    )
    assert (ours - own).norm() < 0.02 * own.norm()  # a thousandth is the classifier's


def test_a_model_whose_logits_nobody_knows_is_refused_in_one_sentence():
    model = random_causal_lm("Granite")
    store_logit_scaling(model)
    check_lm_loss(model, "granite")
    model.get_output_embeddings().logit_scale = 1.0  # as if the setting had another name
    with pytest.raises(UserError, match="changes its logits"):
        check_lm_loss(model, "granite")


def test_divergence_from_the_start_knows_what_a_model_does_to_its_logits():
    """Closed form of KL and its gradient on capped and scaled logits."""
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 11, bias=False)
    head.logit_scale, head.logit_cap = 3.0, 2.0
    now, start = torch.randn(2, 5, 6, requires_grad=True), torch.randn(2, 5, 6)
    batch = common.Batch(*[torch.zeros(0)] * 3, target_index=torch.tensor([1, 3, 7, 9]))
    loss = kl_from_start_sum(now, batch, head, start, head)
    (found,) = torch.autograd.grad(loss, now)
    log_p, log_q = (
        (2 * torch.tanh(3 * head(s) / 2)).log_softmax(-1).flatten(0, 1)[batch.target_index - 1]
        for s in (now, start)
    )
    expected = (log_q.exp() * (log_q - log_p)).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, now)[0])


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "SmolLM3", "Llama", "Gemma3"])
def test_a_pass_without_a_mask_is_the_same_to_the_bit(kind, tmp_path, monkeypatch):
    """And asks for no number of a tensor, as transformers does for models that must have a mask."""
    model = build(3, save_tiny(random_causal_lm(kind), tmp_path / kind))
    asked, find = [], transformers.masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(
        transformers.masking_utils,
        "find_packed_sequence_indices",
        lambda ids: asked.append(1) or find(ids),
    )
    sums, found = gradients_of_step(model)
    assert bool(asked) == (kind in ("Llama", "Gemma3"))
    monkeypatch.setattr(common, "without_mask", lambda _: {})
    expected_sums, expected = gradients_of_step(model)
    assert asked and sums == expected_sums
    assert all(torch.equal(gradient, expected[name]) for name, gradient in found.items())
