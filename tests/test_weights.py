"""Pretrained models as people have them: all weights are read, or one sentence says what to do."""

import json
import shutil

import pytest
import tokenizers
import torch
import transformers
from conftest import SIZES, arm_of, fails, save_tiny, start_script
from safetensors.torch import load_file, save_file
from test_language_model import CPU, tiny_settings

import common
import experiment_7b
from collapse.models import pretrained
from collapse.models.pretrained import load_causal_lm, load_tokenizer, resolve_model
from collapse.utils.errors import UserError


def copy_of(folder, target):
    return shutil.copytree(folder, target / "model")


def edit_json(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def change_weights(folder, change):
    """change(name, tensor) gives what stands for a tensor: pairs of name and tensor."""
    file = folder / "model.safetensors"
    pairs = [pair for name, tensor in load_file(file).items() for pair in change(name, tensor)]
    save_file({name: t.contiguous().clone() for name, t in pairs}, file, {"format": "pt"})


def without(*parts):
    return lambda folder: change_weights(
        folder, lambda name, t: [] if any(part in name for part in parts) else [(name, t)]
    )


def renamed(rename):
    return lambda folder: change_weights(folder, lambda name, t: [(rename(name), t)])


def configured(**values):
    return lambda folder: edit_json(folder / "config.json", **values)


def with_value(part, value):
    def change(name, tensor):
        if part in name:
            tensor.view(-1)[-1] = value
        return [(name, tensor)]

    return lambda folder: change_weights(folder, change)


def packed_without_a_word(folder):
    change_weights(
        folder, lambda name, t: [(name.replace("proj.weight", "proj.qweight"), t), (f"{name}.g", t)]
    )


def only_bin(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_adapter(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')


def lfs_pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n" * 3)


def cut_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def shard_gone(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    sorted(folder.glob("model-0*"))[1].unlink()


def no_file(*patterns):
    def change(folder):
        for pattern in patterns:
            for file in folder.glob(pattern):
                file.unlink()

    return change


CUSTOM = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XModel"}
FAULTS = {
    "compiled": (renamed(lambda n: f"_orig_mod.{n}"), r"torch\.compile put _orig_mod\. .*MODEL\."),
    "compiled backbone": (
        renamed(lambda n: n.replace("model.layers", "model._orig_mod.layers")),
        r"torch\.compile put _orig_mod\.",
    ),
    "data parallel": (renamed(lambda n: f"module.{n}"), r"DataParallel put module\."),
    "another prefix": (renamed(lambda n: f"student.{n}"), "are not there, and would be drawn"),
    "no LM head": (without("lm_head"), r"lm_head\.weight are not there"),
    "a layer gone": (without("layers.1."), r"layers\.1\..* more are not there"),
    "one bias gone": (without("0.self_attn.k_proj.bias"), r"k_proj\.bias are not there"),
    "more layers asked for": (
        configured(num_hidden_layers=3, layer_types=["full_attention"] * 3),
        "would be drawn at random",
    ),
    "layers that do not add up": (configured(num_hidden_layers=3), r"\(3\) must be equal"),
    "adapters inside": (
        renamed(lambda n: n.replace("q_proj.weight", "q_proj.base_layer.weight")),
        r"q_proj\.weight.* are not there",
    ),
    "another size": (configured(intermediate_size=96), r"_proj\.weight.*is \[.*\] where \[.*\] is"),
    "another vocabulary": (configured(vocab_size=400), r"embed_tokens\.weight.*where \[400, 64\]"),
    "another kind": (configured(model_type="llama"), "k_proj.bias.* would not be used"),
    "GPTQ": (
        configured(quantization_config={"quant_method": "gptq", "bits": 4}),
        r"quantized \(gptq\).*before its quantization",
    ),
    "8 bits": (
        configured(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        r"quantized \(bitsandbytes, 8 bits\)",
    ),
    "packed without a word": (packed_without_a_word, "are quantized .*qweight"),
    "NaN": (with_value("up_proj", float("nan")), r"1 of the 8,192 .*up_proj\.weight are NaN"),
    "infinite": (with_value("norm.weight", float("inf")), r"1 of the 64 .*are NaN or infinite"),
    "only .bin": (only_bin, r"no weights in safetensors.*convert it by"),
    "no weights": (no_file("*.safetensors"), "it has no weights.*copy its model.safetensors"),
    "an adapter": (as_adapter, r"holds adapters and no whole model.*some/base"),
    "no config": (no_file("config.json"), "holds no config.json.: give the folder"),
    "config that is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "fix it"),
    "a Git LFS pointer": (lfs_pointer, "git lfs install"),
    "cut short": (cut_short, "damaged or cut short"),
    "a shard gone": (shard_gone, "fix it, or give another"),
    "code of its own": (configured(model_type="newlm", auto_map=CUSTOM), "trust_remote_code"),
    "a kind of tomorrow": (configured(model_type="newlm"), "newlm.*fix it, or"),
    "no tokenizer": (no_file("token*"), r"has no tokenizer: copy .*tokenizer\.json"),
    "half a tokenizer": (no_file("tokenizer.json"), r"has no tokenizer: copy .*tokenizer\.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_that_is_not_whole_is_refused_in_a_sentence(fault, qwen, tmp_path, capsys):
    folder = copy_of(qwen, tmp_path)
    damage, message = FAULTS[fault]
    damage(folder)
    with pytest.raises(UserError, match=message) as refused:
        settings, *_ = resolve_model(tiny_settings(folder))
        load_tokenizer(settings.model)
    assert "\n" not in str(refused.value) and str(folder) in str(refused.value)
    if "tokenizer" not in fault:  # whoever loads it, not the scripts alone
        with pytest.raises(UserError, match=message):
            load_causal_lm(tiny_settings(folder), CPU)


def test_the_weights_file_itself_is_no_model(qwen):
    with pytest.raises(UserError, match="is a file: give the folder"):
        resolve_model(tiny_settings(qwen / "model.safetensors"))


def sharded(model, folder):
    model.save_pretrained(folder, max_shard_size="100KB")
    assert (folder / "model.safetensors.index.json").exists()


def in_half(model, folder):
    model.to(torch.bfloat16).save_pretrained(folder)


def with_old_tables(model, folder):
    model.save_pretrained(folder)
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    change_weights(folder, lambda name, t: [(name, t), *table.items()])


@pytest.mark.parametrize("save", [sharded, in_half, with_old_tables])
@pytest.mark.parametrize("tied", [True, False])
def test_whole_models_load_to_their_own_weights(save, tied, tmp_path, capsys):
    torch.manual_seed(0)
    sizes = transformers.Qwen2Config(**SIZES, tie_word_embeddings=tied)
    model = transformers.Qwen2ForCausalLM(sizes)
    folder = save_tiny(model, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    save(model, folder)
    found = load_causal_lm(resolve_model(tiny_settings(folder))[0], CPU)
    head, embedding = found.get_output_embeddings().weight, found.get_input_embeddings().weight
    assert (head is embedding) == tied
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor.float(), rtol=0, atol=0)
    assert "NOTE" not in capsys.readouterr().out


def test_weights_of_another_use_are_named_and_left_aside(qwen, tmp_path, capsys):
    folder = copy_of(qwen, tmp_path)
    table = {"v_head.summary.weight": torch.ones(8)}
    change_weights(folder, lambda name, t: [(name, t), *table.items()])
    load_causal_lm(tiny_settings(folder), CPU)
    assert "no part of its causal LM are not used: v_head" in capsys.readouterr().out


def test_a_head_beside_the_embedding_is_read_where_the_folder_has_both(qwen, tmp_path):
    folder = copy_of(qwen, tmp_path)
    edit_json(folder / "config.json", tie_word_embeddings=True)
    found = load_causal_lm(tiny_settings(folder), CPU).get_output_embeddings().weight
    assert torch.equal(found, load_file(folder / "model.safetensors")["lm_head.weight"])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_model_that_is_stored_in_4_bits_is_used_as_it_is(kind, qwen, tmp_path, capsys):
    packing = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.float16
    )
    whole = transformers.AutoModelForCausalLM.from_pretrained(qwen, quantization_config=packing)
    folder = copy_of(qwen, tmp_path)
    whole.save_pretrained(folder)
    settings, *_ = resolve_model(tiny_settings(folder, quantization="nf4"))
    assert "stored in 4 bits, and is used as it is" in capsys.readouterr().out
    assert settings.quantization == "none"
    model = common.build_language_model(arm_of(2), 2, "pooled", settings, CPU)
    layer = model.backbone.layers[0].mlp.up_proj.base_layer
    stored = load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(layer.weight.data, stored) and layer.compute_dtype == torch.float32
    assert layer.weight.quant_state.quant_type == kind


def test_a_token_beyond_the_embedding_is_named_before_a_training(qwen, tmp_path, data_dir, capsys):
    folder = copy_of(qwen, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(40)] + ["superb"])
    tokenizer.save_pretrained(folder)
    encode = load_tokenizer(str(folder))
    assert encode(["good bad"]) == load_tokenizer(str(qwen))(["good bad"])
    with pytest.raises(UserError, match="'a superb film' has the token 'superb' of number"):
        encode(["good", "a superb film"])
    rows = "text,label\n" + "".join(f"film {i} superb,{i % 2}\n" for i in range(20))
    (tmp_path / "own.csv").write_text(rows)
    line = f"--model {folder} --dataset {tmp_path / 'own.csv'} --output-dir {tmp_path / 'out'}"
    error = fails(start_script, capsys, experiment_7b, f"{line} --device cpu --workers 1")
    assert "embedding has 320 rows" in error and not (tmp_path / "out").exists()


def tiny_gguf(file, seed=0):
    """A Llama of two layers as llama.cpp's converters write it, 8-bit weights, with a tokenizer."""
    import gguf

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(config)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_context_length(64)
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(SIZES["vocab_size"])
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *alphabet, "go", "od"]
    tokens += [f"<unused{i}>" for i in range(SIZES["vocab_size"] - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["g o", "o d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SIZES["num_hidden_layers"])
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp rotates other pairs
            heads = SIZES["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        kind = gguf.GGMLQuantizationType.Q8_0 if array.ndim > 1 else gguf.GGMLQuantizationType.F32
        packed = gguf.quants.quantize(array.astype("float32"), kind)
        writer.add_tensor(names.get_name(name, (".weight",)), packed, raw_dtype=kind)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    return model


def test_a_gguf_file_is_a_model(tmp_path, monkeypatch, data_dir):
    monkeypatch.setattr(pretrained, "ROOT", tmp_path)
    (tmp_path / "mine").mkdir()
    file = tmp_path / "mine/tiny.gguf"
    model = tiny_gguf(file)
    settings, name, _ = resolve_model(tiny_settings(file))
    assert name == "tiny"
    found = load_causal_lm(settings, CPU)
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(found.state_dict()[key], tensor, rtol=0, atol=1e-3)
    line = f"--model {file} --data-dir {data_dir} --output-dir {tmp_path / 'out'} --device cpu"
    line += " --workers 1 --epochs 1 --batch-size 8 --max-length 12 --lora-rank 4 --models 2"
    start_script(experiment_7b, f"{line} --classifier-size 10 --engram-size 6")
    classify = common.load_classifier(tmp_path / "out/state/model2-seed42", device="cpu")
    assert classify(["good"]).shape == (1, 2)


def test_gguf_files_of_one_name_and_size_are_not_mixed_up(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "ROOT", tmp_path)
    for number in (0, 1):
        (tmp_path / f"mine{number}").mkdir()
        tiny_gguf(tmp_path / f"mine{number}/tiny.gguf", seed=number)
    resolve_model(tiny_settings(tmp_path / "mine0/tiny.gguf"))
    with pytest.raises(UserError, match="was unpacked from another file"):
        resolve_model(tiny_settings(tmp_path / "mine1/tiny.gguf"))
    with pytest.raises(UserError, match=r"GGUF files: give one of them, as --model .*tiny\.gguf"):
        resolve_model(tiny_settings(tmp_path / "mine0"))
