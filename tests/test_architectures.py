"""Any causal LM: tiny random models of many architectures, saved to folders, as experiments use
them.
"""

import json

import huggingface_hub
import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import SIZES, arm_of, fails, random_split, save_tiny, start_script
from test_language_model import CPU, build, gradients_of_step, stir, tiny_settings

import common
import experiment_7b
from collapse.models.architectures import decoder_layers
from collapse.models.pretrained import load_causal_lm, load_tokenizer, resolve_model
from collapse.training.checkpoints import optimizer_tensors, restore_optimizer, save_weights
from collapse.utils import hub
from collapse.utils.errors import UserError

LAYERS = SIZES["num_hidden_layers"]
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Name of the classes in transformers -> what its configuration has beside SIZES.
ARCHITECTURES = {
    "Bloom": {"layer_norm_epsilon": 1e-5},
    "Cohere": {"logit_scale": 0.5},
    "Falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "GPT2": {},
    "GPTNeoX": {},
    "Gemma2": {"head_dim": 16, "sliding_window": 4},
    "Gemma3": {"head_dim": 16, "sliding_window": 4, "layer_types": None},
    "Granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "Llama": {},
    "Mistral": {"sliding_window": 4},
    "Mixtral": {"num_local_experts": 4},
    "Mpt": {"d_model": 64, "n_heads": 4, "n_layers": LAYERS},
    "OPT": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "Olmo2": {},
    "Phi": {},
    "Phi3": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "SmolLM3": {},
    "StableLm": {},
}
LM_HEADS = ("GPT2", "OpenAIGPT", "Bert")


def random_model(name, **changes):
    torch.manual_seed(0)
    kind = f"{name}TextConfig" if name == "Gemma3" else f"{name}Config"
    config = getattr(transformers, kind)(**SIZES | SPECIAL | ARCHITECTURES.get(name, {}) | changes)
    model = f"{name}LMHeadModel" if name in LM_HEADS else f"{name}ForCausalLM"
    return getattr(transformers, model)(config).eval()


@pytest.fixture(scope="module")
def save(tmp_path_factory):
    """save(model) gives its folder."""
    return lambda model: save_tiny(model, tmp_path_factory.mktemp("models") / type(model).__name__)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request, save):
    return save(random_model(request.param))


def built(number, folder, seed=0, **changes):
    """peft's adapters of stacked experts know no dropout."""
    dropout = 0.0 if "Mixtral" in folder.name else 0.05
    return build(number, folder, seed, lora_dropout=dropout, **changes)


def train(model, number, steps, state=None):
    """Steps with dropout, after those that left `state`; gives mean losses and the state after."""
    split = random_split(24, longest=10, vocabulary=60)
    trainer = common.make_trainer(model.train(), split, tiny_settings(""), arm_of(number))
    torch.manual_seed(5)
    if state:
        restore_optimizer(model, trainer.optimizer, state)
    losses = []
    for step in steps:
        sums = trainer.step(np.arange(8) + 8 * (step % 3), 3e-3)
        losses.append((sums.cls_loss, sums.lm_loss, sums.grad_norm))
    state = optimizer_tensors(model, trainer.optimizer)
    return losses, {name: tensor.detach().clone() for name, tensor in state.items()}


def own_losses(causal_lm, split):
    """transformers' LM loss with an attention mask, and the last hidden state, mean over text."""
    ids = torch.nn.utils.rnn.pad_sequence(split.token_ids, batch_first=True)
    mask = (torch.arange(ids.shape[1]) < torch.tensor(split.lengths)[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        out = causal_lm(
            input_ids=ids, attention_mask=mask, labels=labels, output_hidden_states=True
        )
    last = out.hidden_states[-1] * mask[..., None]
    return out.loss.item(), (last.sum(1) / mask.sum(1, keepdim=True)).numpy()


def test_every_model_trains_and_peft_computes_the_same(folder, model_number, tmp_path):
    model = built(model_number, folder)
    before = {name: p.detach().clone() for name, p in model.trainable().items()}
    losses, _ = train(model, model_number, range(9))
    first, last = np.array(losses[:3])[:, 0], np.array(losses[-3:])[:, 0]
    assert last.sum() < first.sum()  # the same rows
    assert np.isfinite(losses).all()
    still = [name for name, p in model.trainable().items() if torch.equal(p, before[name])]
    assert not still
    save_weights(tmp_path, "final", model, epoch=1)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    plain = peft.PeftModel.from_pretrained(plain, tmp_path / "final-adapter").eval()
    split = random_split(12, longest=10, vocabulary=60)
    if model_number == 3:
        model.projector = model.compressor = None  # the prefix is nothing that peft knows
    found = common.evaluate(model, split)
    lm_loss, pooled = own_losses(plain, split)
    np.testing.assert_allclose(found.pooled, pooled, rtol=1e-4, atol=1e-5)
    assert found.lm_loss == (None if model_number == 1 else pytest.approx(lm_loss, rel=1e-5))
    with plain.disable_adapter():
        assert not np.allclose(found.pooled, own_losses(plain, split)[1], 1e-2)


def test_a_resumed_training_equals_an_undisturbed_one(folder):
    expected, end = train(built(3, folder), 3, range(4))
    first, middle = train(built(3, folder), 3, range(2))
    second, found = train(built(3, folder, seed=9), 3, range(2, 4), middle)
    assert first + second == expected
    assert all(torch.equal(tensor, found[name]) for name, tensor in end.items())


def test_layers_are_those_of_output_hidden_states(folder):
    model, split = built(1, folder), random_split(6, longest=10, vocabulary=60)
    states = common.evaluate(model, split, with_layers=True).layers
    causal_lm = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert len(decoder_layers(causal_lm.base_model)) == LAYERS
    assert len(states.pooled) == LAYERS + 2  # embeddings, layers, final norm
    for row, ids in enumerate(split.token_ids):
        with torch.no_grad():
            own = causal_lm(input_ids=ids[None], output_hidden_states=True).hidden_states
        own = torch.stack(own)[:, 0].mean(1).numpy()
        found = np.delete(states.pooled[:, 0, row], -2, axis=0)  # what the final norm gets
        np.testing.assert_allclose(found, own, rtol=1e-4, atol=1e-5)


def test_recomputed_layers_give_the_same_gradients(folder):
    steps = []
    for mode in ("off", "on"):
        model = built(2, folder, gradient_checkpointing=mode)
        stir(model)
        torch.manual_seed(3)
        steps.append(gradients_of_step(model.train()))
        recomputing = [layer.gradient_checkpointing for layer in model.memory_plan.layers]
        assert recomputing == [mode == "on"] * LAYERS
    (sums, expected), (same_sums, same) = steps
    assert sums == same_sums and expected.keys() == same.keys()
    assert all(torch.equal(expected[name], same[name]) for name in expected)


def test_layers_that_cannot_recompute_and_no_final_norm(save):
    """The first GPT: both."""
    folder = save(random_model("OpenAIGPT"))
    model = built(2, folder)
    losses, _ = train(model, 2, range(3))
    assert np.isfinite(losses).all() and model.memory_plan.most_recomputed == 0
    states = common.evaluate(model, random_split(6, vocabulary=60), with_layers=True).layers
    assert len(states.pooled) == LAYERS + 1
    with pytest.raises(UserError, match="leave the option out"):
        built(2, folder, gradient_checkpointing="on")


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("Mamba", {}, "recurrent or a state space model"),
        ("Rwkv", {"attention_hidden_size": 64}, "recurrent or a state space model"),
        ("Bert", {}, "not causal"),
        ("OPT", {"word_embed_proj_dim": 32}, "differ in size"),
        ("GPT2", {"max_position_embeddings": 12}, "positions for 11 tokens and a prefix"),
    ],
)
def test_models_that_cannot_stand_under_the_heads_are_refused(save, name, changes, why):
    with pytest.raises(UserError, match=why) as refused:
        built(1, save(random_model(name, **changes)))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("name", "why"), [("Bart", "an encoder-decoder"), ("Gemma3", "text")])
def test_models_of_another_kind_are_refused_before_their_weights_are_read(tmp_path, name, why):
    getattr(transformers, f"{name}Config")().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"is .*{why}.*: choose a decoder"):
        resolve_model(tiny_settings(tmp_path))


@pytest.mark.parametrize("name", ["GPT2", "OPT"])
def test_nf4_of_other_linear_layers_trains(save, name):
    folder = save(random_model(name))
    packed, plain = built(3, folder, quantization="nf4"), built(3, folder)
    split = random_split(12, longest=10, vocabulary=60)
    found, expected = (common.evaluate(model, split).pooled for model in (packed, plain))
    assert 0 < np.abs(found - expected).mean() < 0.2 * np.abs(expected).mean()
    packed.memory_plan.unpack(1)
    np.testing.assert_allclose(common.evaluate(packed, split).pooled, found, rtol=1e-4, atol=1e-5)
    losses, _ = train(packed, 3, range(12))
    assert np.array(losses)[-3:, 0].sum() < np.array(losses)[:3, 0].sum()


def script_line(model, data_dir, output_dir):
    line = f"--model {model} --data-dir {data_dir} --output-dir {output_dir} --device cpu"
    line += " --workers 1 --epochs 1 --batch-size 8 --max-length 12 --lora-rank 4"
    return line + " --classifier-size 10 --engram-size 6 --train-limit 16"


def test_a_whole_run_of_gpt2(save, data_dir, tmp_path):
    """The script, with its adapters on every linear layer."""
    folder = save(random_model("GPT2"))
    start_script(experiment_7b, script_line(folder, data_dir, tmp_path))
    models = json.loads((tmp_path / "results.json").read_text())["models"]
    assert list(models) == ["model1", "model2", "model3"]
    adapters = LAYERS * 4 * (3 * 64 + 64 + 64 + 4 * 64 + 64 + 64 + 64 + 64)
    assert adapters < models["model1"]["42"]["parameters"]["trainable"] < 2 * adapters


@pytest.fixture
def hub_model(tmp_path, monkeypatch):
    """A model of the hub as its cache holds it, two commits of it; the hub itself is silent.

    Gives its name, and the commits of main and of the tag v1.
    """
    repository, commits = tmp_path / "models--nobody--tiny", ("a" * 40, "b" * 40)
    (repository / "refs").mkdir(parents=True)
    for name, commit, positions in zip(("main", "v1"), commits, (128, 96), strict=True):
        (repository / "refs" / name).write_text(commit)
        model = random_model("GPT2", max_position_embeddings=positions)
        save_tiny(model, repository / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_hub_answers", lambda: False)
    return "nobody/tiny", *commits


def test_a_revision_is_pinned_to_its_commit(hub_model):
    name, main, v1 = hub_model
    for revision, commit, positions in ((None, main, 128), ("v1", v1, 96), (v1, v1, 96)):
        settings, in_results, details = resolve_model(tiny_settings(name, revision=revision))
        assert (settings.model, in_results, settings.revision) == (name, name, commit)
        assert details == {"model_commit": commit}
        assert load_causal_lm(settings, CPU).config.max_position_embeddings == positions
        assert load_tokenizer(settings.model, settings.revision)(["good bad"])[0]
    with pytest.raises(UserError, match="cannot load the model"):
        resolve_model(tiny_settings(name, revision="v2"))


def test_a_folder_has_no_revision(save):
    with pytest.raises(UserError, match="is a folder"):
        resolve_model(tiny_settings(save(random_model("GPT2")), revision="main"))


def test_results_name_the_commit_and_go_on_with_no_other(hub_model, data_dir, tmp_path, capsys):
    name, _, v1 = hub_model

    def run(options):
        start_script(experiment_7b, script_line(name, data_dir, tmp_path / "out") + options)

    run(" --models 1 --revision v1")
    config = json.loads((tmp_path / "out/results.json").read_text())["settings"]["config"]
    assert config["model_commit"] == v1 and "revision" not in config
    adapter = tmp_path / "out/state/model1-seed42/final-adapter/adapter_config.json"
    assert json.loads(adapter.read_text())["revision"] == v1
    run(f" --models 2 --revision {v1}")
    assert "model_commit is bbb" in fails(run, capsys, "")
