"""Any causal LM: tiny random models of many architectures, saved to folders, as experiments use
them.
"""

import json

import numpy as np
import peft
import pytest
import tokenizers
import torch
import transformers
from conftest import SIZES, arm_of, random_split, start_script, without_times
from test_language_model import CPU, build, stir, tiny_settings

import common
import experiment_7b
from collapse.architectures import decoder_layers
from collapse.checkpoints import load_weights
from collapse.settings import UserError

LAYERS = SIZES["num_hidden_layers"]
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Name of the classes in transformers -> what its configuration has beside SIZES.
ARCHITECTURES = {
    "Bloom": {"layer_norm_epsilon": 1e-5},
    "Cohere": {"logit_scale": 0.5},
    "Falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "GPT2": {},
    "GPTNeoX": {},
    "Gemma": {"head_dim": 16},
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
    "Qwen3": {"head_dim": 16},
    "SmolLM3": {},
    "StableLm": {},
    "Starcoder2": {},
}
LM_HEADS = {"GPT2": "GPT2LMHeadModel"}
OPTIONS = "--device cpu --workers 1 --epochs 2 --batch-size 8 --max-length 12 --lora-rank 4"
OPTIONS += " --classifier-size 10 --engram-size 6 --train-limit 24 --eval-limit 16"


def random_model(name, **changes):
    torch.manual_seed(0)
    kind = f"{name}TextConfig" if name == "Gemma3" else f"{name}Config"
    config = getattr(transformers, kind)(**SIZES | SPECIAL | ARCHITECTURES.get(name, {}) | changes)
    return getattr(transformers, LM_HEADS.get(name, f"{name}ForCausalLM"))(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    text = "good bad word0 word1"
    tokenizer.train_from_iterator([text] * 9, SIZES["vocab_size"], show_progress=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer)


@pytest.fixture(scope="module")
def save(tokenizer, tmp_path_factory):
    """save(model) gives its folder."""

    def save_model(model):
        folder = tmp_path_factory.mktemp("models") / type(model).__name__
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save_model


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request, save):
    return save(random_model(request.param))


def run(folder, data_dir, output_dir):
    line = f"--model {folder} --data-dir {data_dir} --output-dir {output_dir} {OPTIONS}"
    start_script(experiment_7b, line)
    return json.loads((output_dir / "results.json").read_text())


def test_the_three_models_train_and_resume_and_peft_loads_them(
    folder, data_dir, tmp_path, monkeypatch
):
    expected = run(folder, data_dir, tmp_path / "undisturbed")
    for number in (1, 2, 3):
        metrics = expected["models"][f"model{number}"]["42"]
        assert len(metrics["val"]) == 2 and metrics["train"][-1]["grad_norm"] > 0
    step, calls = common.Trainer.step, []

    def killed(self, *arguments):
        calls.append(1)
        if len(calls) == 17:  # 3 steps an epoch, 6 a model: epoch 2 of model 3
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(common.Trainer, "step", killed)
    with pytest.raises(SystemExit):
        run(folder, data_dir, tmp_path / "resumed")
    found = run(folder, data_dir, tmp_path / "resumed")
    assert without_times(found) == without_times(expected)

    training = tmp_path / "resumed/state/model2-seed42"
    ours = build(2, folder)
    load_weights(training, "final", ours)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    plain = peft.PeftModel.from_pretrained(plain, training / "final-adapter").eval()
    split = random_split(12, longest=10, vocabulary=60)
    lm_loss = common.evaluate(ours, split).lm_loss
    assert lm_loss == pytest.approx(own_lm_loss(plain, split), rel=1e-5)
    with plain.disable_adapter():
        assert lm_loss != pytest.approx(own_lm_loss(plain, split), rel=1e-5)


def own_lm_loss(causal_lm, split):
    """transformers' own, with an attention mask."""
    ids = torch.nn.utils.rnn.pad_sequence(split.token_ids, batch_first=True)
    mask = (torch.arange(ids.shape[1]) < torch.tensor(split.lengths)[:, None]).long()
    with torch.no_grad():
        labels = ids.masked_fill(mask == 0, -100)
        return causal_lm(input_ids=ids, attention_mask=mask, labels=labels).loss.item()
