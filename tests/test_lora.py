"""LoRA layers as one function: against peft's own and against float64."""

import collections
import copy

import bitsandbytes
import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import SIZES, unpacked_nf4
from torch import nn
from torch.utils.checkpoint import checkpoint

from collapse.models import four_bits, lora

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def byte_mask(rows, p):
    """The mask as it is drawn on a GPU."""
    return torch.empty_like(rows, dtype=torch.bool).bernoulli_(1 - p)


@pytest.fixture(params=["positions", "bytes"])
def either_mask(request, monkeypatch):
    if request.param == "bytes":
        monkeypatch.setattr(lora, "draw_mask", byte_mask)


def pack(linear: nn.Linear, dtype=torch.float32) -> nn.Linear:
    """The layer with its weights in NF4, double-quantized, as a CPU trains it."""
    packed = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        compute_dtype=dtype,
        quant_type="nf4",
    )
    packed.load_state_dict(linear.state_dict())
    if packed.bias is not None:
        packed.bias.data = packed.bias.data.to(dtype)
    packed = packed.to("cpu").requires_grad_(False)
    four_bits.compute_unpacked(packed)
    return packed


def adapted(base: nn.Linear, dropout=0.0, rank=4, **settings) -> nn.Module:
    """A LoRA layer on `base`, still peft's own, whose adapter changes what it computes."""
    model = nn.Sequential(collections.OrderedDict(linear=base.requires_grad_(False)))
    model.is_loaded_in_4bit = isinstance(base, bitsandbytes.nn.Linear4bit)
    settings = {
        "r": rank,
        "lora_alpha": 3 * rank,
        "lora_dropout": dropout,
        "target_modules": ["linear"],
    } | settings
    peft.inject_adapter_in_model(peft.LoraConfig(**settings), model)
    for factor in (model.linear.lora_A, model.linear.lora_B):
        factor["default"].float()  # as get_peft_model leaves them
    torch.nn.init.normal_(model.linear.lora_B["default"].weight, 0, 0.1)
    return model.linear


def fused(layer: nn.Module) -> nn.Module:
    layer = copy.deepcopy(layer)
    lora.use_fused_lora(layer)
    return layer


def outcome(layer, x, upstream=None):
    """Output, and gradients in x, A and B."""
    x = x.clone().requires_grad_()
    y = layer(x)
    upstream = (
        torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
        if upstream is None
        else upstream
    )
    parameters = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    return y, *torch.autograd.grad(y, [x, *parameters], upstream.to(y.dtype))


def truth(layer, x, upstream):
    """The same from the formula, in float64."""
    x, a, b = (
        t.detach().double().requires_grad_()
        for t in (x, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    )
    base = layer.base_layer
    weight = unpacked_nf4(base) if isinstance(base, bitsandbytes.nn.Linear4bit) else base.weight
    y = nn.functional.linear(x, weight.double(), base.bias.double()) + layer.scaling["default"] * (
        x @ a.T @ b.T
    )
    return y, *torch.autograd.grad(y, [x, a, b], upstream.double())


def error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def tiny_model(folder=None, dtype=torch.float32, dropout=0.0, seed=0, layers=2):
    """A small Qwen2 with adapters that are still peft's own."""
    torch.manual_seed(seed)
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**SIZES | {"num_hidden_layers": layers})
    ).to(dtype)
    settings = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=TARGETS)
    model = peft.get_peft_model(model.requires_grad_(False), settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return model


@pytest.mark.parametrize("shape", [(7, 24), (3, 5, 24)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_output_and_gradients_are_those_of_peft(shape, bias, packed):
    torch.manual_seed(0)
    base = nn.Linear(24, 64, bias)
    layer = adapted(pack(base) if packed else base)
    x = torch.randn(shape)
    for found, expected in zip(outcome(fused(layer), x), outcome(layer, x), strict=True):
        assert found.shape == expected.shape and found.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(
            found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item()
        )


def test_the_linear_layer_of_gpt2_is_computed_as_peft_does(either_mask):
    """Its weight is transposed."""
    torch.manual_seed(0)
    layer = adapted(transformers.pytorch_utils.Conv1D(64, 24))
    layer.base_layer.weight.data.normal_()
    x = torch.randn(3, 5, 24)
    assert fused(layer).forward.__func__ is lora._forward
    for found, expected in zip(outcome(fused(layer), x), outcome(layer, x), strict=True):
        torch.testing.assert_close(
            found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item()
        )


def test_a_linear_layer_with_a_forward_pass_of_its_own_stays_that_of_peft():
    class Rounding(nn.Linear):
        def forward(self, x):
            return super().forward(x.round())

    layer = adapted(Rounding(24, 16))
    x = torch.randn(9, 24)
    assert all(
        torch.equal(a, b) for a, b in zip(outcome(fused(layer), x), outcome(layer, x), strict=True)
    )


def test_a_column_major_input_and_an_expanded_gradient_change_nothing():
    layer = adapted(nn.Linear(24, 16))
    x, upstream = torch.randn(24, 9).T, torch.ones(1, 1).expand(9, 16)
    for found, expected in zip(
        outcome(fused(layer), x, upstream), outcome(layer, x, upstream), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_bfloat16_is_as_near_to_the_truth_as_its_eight_bits_allow(packed):
    """peft's adapter computes in float32; here in bfloat16, which adds a rounding to the output and
    to the gradient of the input, and at most half a per cent to the gradients of A and B."""
    torch.manual_seed(0)
    base = nn.Linear(128, 96).bfloat16()
    layer = adapted(pack(base, torch.bfloat16) if packed else base, rank=16)
    x, upstream = torch.randn(200, 128).bfloat16(), torch.randn(200, 96).bfloat16()
    expected, by_peft, ours = (
        truth(layer, x, upstream),
        outcome(layer, x, upstream),
        outcome(fused(layer), x, upstream),
    )
    assert (
        [t.dtype for t in ours]
        == [t.dtype for t in by_peft]
        == [torch.bfloat16] * 2 + [torch.float32] * 2
    )
    for name, one, other, true in zip(("y", "x", "A", "B"), ours, by_peft, expected, strict=True):
        assert error(one, true) < (1.7 * error(other, true) if name in "yx" else 5e-3), name


def test_gradients_of_a_bfloat16_model_are_as_near_to_the_truth_as_those_of_peft():
    model = tiny_model(dtype=torch.bfloat16)
    exact = copy.deepcopy(model).float()
    ids = torch.randint(0, SIZES["vocab_size"], (4, 20), generator=torch.Generator().manual_seed(0))
    ours = copy.deepcopy(model)
    lora.use_fused_lora(ours)
    errors = {}
    expected = gradients(exact, ids)
    for name, other in (("peft", model), ("ours", ours)):
        found = gradients(other, ids)
        errors[name] = np.mean([error(found[key], gradient) for key, gradient in expected.items()])
    assert errors["ours"] < 1.35 * errors["peft"] < 0.05


def gradients(model, ids):
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {
        name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None
    }


def test_dropout_is_dropout(either_mask):
    """With factors of ones and a base layer of zeros, dropout's result is the output."""
    torch.manual_seed(0)
    base = nn.Linear(999, 999, bias=False)
    base.weight.data.zero_()
    for p in (0.05, 0.5):
        layer = fused(adapted(base, p, rank=999))
        for factor in (layer.lora_A, layer.lora_B):
            factor["default"].weight.data.copy_(torch.eye(999))
        x = torch.randn(301, 999, requires_grad=True)
        y = layer(x)  # scaling is three
        kept = y != 0
        assert kept.float().mean().item() == pytest.approx(1 - p, abs=3e-3)
        assert kept.float().mean(0).std().item() == pytest.approx(
            (p * (1 - p) / 301) ** 0.5, rel=0.1
        )
        neighbours = (kept[:, 1:] == kept[:, :-1]).float().mean().item()
        assert neighbours == pytest.approx(p**2 + (1 - p) ** 2, abs=5e-3)  # independent draws
        torch.testing.assert_close(y[kept], (3 * x / (1 - p))[kept], rtol=1e-4, atol=0)
        factor_a = layer.lora_A["default"].weight
        of_x, of_a = torch.autograd.grad(y.sum(), (x, factor_a))
        torch.testing.assert_close(of_x, 3 * kept / (1 - p), rtol=1e-4, atol=0)
        torch.testing.assert_close(of_a[0], (3 * x / (1 - p) * kept).sum(0), rtol=1e-3, atol=1e-2)
        assert not torch.equal(layer(x), y)
        torch.testing.assert_close(layer.eval()(x), 3 * x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("p", [1e-4, 0.05, 0.5, 0.99])
def test_the_rate_of_dropped_positions_is_exact(p):
    """To three standard errors, which are below 2^-16; gaps between them are geometric."""
    torch.manual_seed(0)
    count = 400_000_000 if p <= 0.05 else 20_000_000
    positions = lora.dropped_positions(count, p)
    assert abs(len(positions) / count - p) < 3 * (p * (1 - p) / count) ** 0.5
    gaps = positions.diff()
    assert gaps.min() >= 1 and positions[0] >= 0 and positions[-1] < count
    for k in (1, 2, 5):
        share = (gaps > k).double().mean().item()
        assert share == pytest.approx((1 - p) ** k, abs=4 * (0.25 / len(gaps)) ** 0.5)


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_few_positions_are_dropped_one_by_one(count):
    """Every subset of few values comes as often as independent draws give it."""
    torch.manual_seed(0)
    seen = collections.Counter(
        tuple(lora.dropped_positions(count, 0.3).tolist()) for _ in range(4000)
    )
    for subset, times in seen.items():
        expected = 4000 * 0.3 ** len(subset) * 0.7 ** (count - len(subset))
        assert set(subset) <= set(range(count)) and abs(times - expected) < 5 * expected**0.5 + 5
    assert seen[()] > 0


def test_masks_come_from_the_generator(either_mask):
    layer = fused(adapted(nn.Linear(24, 16), 0.3))
    x = torch.randn(50, 24)
    layer(x)
    state = torch.get_rng_state()
    expected, others = outcome(layer, x), outcome(layer, x)
    torch.set_rng_state(state)
    assert all(torch.equal(a, b) for a, b in zip(outcome(layer, x), expected, strict=True))
    assert not torch.equal(others[0], expected[0])


def test_checkpointing_draws_the_same_mask(either_mask):
    layer, x = fused(adapted(nn.Linear(24, 16), 0.3)), torch.randn(50, 24)
    state = torch.get_rng_state()
    expected = outcome(layer, x)
    torch.set_rng_state(state)
    recomputed = copy.copy(layer)
    recomputed.forward = lambda x: checkpoint(
        layer, x, use_reentrant=False, preserve_rng_state=True
    )
    assert all(torch.equal(a, b) for a, b in zip(outcome(recomputed, x), expected, strict=True))


def test_an_input_without_gradient_gives_the_adapters_theirs():
    layer, x = fused(adapted(nn.Linear(24, 16))), torch.randn(9, 24)
    _, _, *expected = outcome(layer, x)
    upstream = torch.randn(9, 16, generator=torch.Generator().manual_seed(5))
    layer(x).backward(upstream)
    found = [factor["default"].weight.grad for factor in (layer.lora_A, layer.lora_B)]
    assert x.grad is None and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_switched_off_adapter_leaves_the_base_layer(either_mask):
    model = tiny_model(dropout=0.3)
    ids = torch.arange(12)[None]
    base = copy.deepcopy(model).unload()
    lora.use_fused_lora(model)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)
    assert not torch.equal(model.eval()(input_ids=ids).logits, base(input_ids=ids).logits)


def test_the_base_layer_may_be_exchanged():
    """For others, which change the result, and for its own weights unpacked, which do not."""
    packed = pack(nn.Linear(64, 64))
    layer, x = fused(adapted(packed)), torch.randn(9, 64)
    expected = outcome(layer, x)
    layer.base_layer = nn.Linear(64, 64).requires_grad_(False)
    assert not torch.equal(layer(x), expected[0])
    layer.base_layer.weight.data = unpacked_nf4(packed)
    layer.base_layer.bias.data = packed.bias.data
    assert all(torch.equal(a, b) for a, b in zip(outcome(layer, x), expected, strict=True))


@pytest.mark.parametrize("shape", [(16, 16), (8, 48), (64, 96), (7, 10), (128, 64)])
def test_four_bits_are_unpacked_by_their_definition_whatever_the_width(shape):
    """Widths that are no multiple of a block's 64 values included, also with the adapter off."""
    base = nn.Linear(shape[1], shape[0])
    packed = pack(base)
    weight = unpacked_nf4(packed)
    torch.testing.assert_close(weight, base.weight.data, rtol=0, atol=0.2 * shape[1] ** -0.5)
    torch.testing.assert_close(four_bits.unpacked_weight(packed, torch.float32), weight)
    rounded = four_bits.unpacked_weight(packed, torch.bfloat16)
    torch.testing.assert_close(rounded, weight.bfloat16())
    layer, x = fused(adapted(packed)), torch.randn(5, shape[1])
    layer.enable_adapters(False)
    expected = nn.functional.linear(x, weight, packed.bias)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.eval()(x), expected)


@pytest.mark.parametrize("packed", [True, False])
def test_autocast_computes_in_its_type(packed):
    """As peft: a plain float32 layer gives bfloat16 there, a packed one its input's type."""
    torch.manual_seed(0)
    base = nn.Linear(64, 64)
    layer = adapted(pack(base, torch.bfloat16) if packed else base)
    x = torch.randn(30, 64)
    exact = outcome(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = outcome(layer, x), outcome(fused(layer), x)
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    for one, other, true in zip(found, expected, exact, strict=True):
        assert error(one, true) < 1.5 * error(other, true) + 5e-3


def test_what_it_does_not_compute_is_refused():
    x = torch.randn(3, 16)
    with pytest.raises(ValueError, match="no LoRA layers"):
        lora.use_fused_lora(nn.Linear(16, 16))
    for settings in ({"use_dora": True}, {"lora_bias": True}):
        with pytest.raises(ValueError, match="plain LoRA"):
            fused(adapted(nn.Linear(16, 16), **settings))
    embedding = nn.Sequential(collections.OrderedDict(linear=nn.Embedding(16, 8)))
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["linear"]), embedding)
    with pytest.raises(ValueError, match="Embedding"):
        lora.use_fused_lora(embedding)
    layer = fused(adapted(nn.Linear(16, 16)))
    with pytest.raises(ValueError, match="one adapter for all rows"):
        layer(x, adapter_names=["default"] * 3)
    layer.base_layer.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="freeze"):
        layer(x)
    layer.base_layer.weight.requires_grad_(False)
    layer.merge()
    with pytest.raises(ValueError, match="merged"):
        layer(x)
    layer.unmerge()
    layer.update_layer("second", r=4, lora_alpha=4, config=peft.LoraConfig(r=4))
    layer.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="one active adapter, not 2"):
        layer(x)
