"""A causal LM of Qwen2.5-7B's shape with random weights: as a folder, or packed on a device.

The folder looks like a download of the real model: config.json, weights in bfloat16 in several
safetensors files, a tokenizer. With it the whole 7B training can be tried without a download:

    python studies/random_checkpoint.py --folder mine/random-7b
    python experiment_7b.py --model mine/random-7b ...

At full size it takes 15.2 GB of disk and as much memory as its largest file. In small
(`--width 64 --depth 2`) it runs in CI.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
import tyro
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from collapse.models.four_bits import compute_unpacked
from collapse.utils.errors import UserError, run_script
from collapse.utils.files import write_json

QWEN = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152_064,
    "tie_word_embeddings": False,
}
TINY = QWEN | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000}


@dataclass
class Config:
    """Settings of the checkpoint; the comment above a field is its --help text."""

    # Folder to create.
    folder: Path
    # Hidden size; the feed-forward size is in proportion, heads have 128 dimensions (16 below 512).
    width: int = QWEN["hidden_size"]
    # Layers.
    depth: int = QWEN["num_hidden_layers"]
    # Largest size of a weights file, in GB.
    shard_gb: float = 4.0
    # Folder with a tokenizer to copy. Default: a new one with 320 byte-level tokens.
    tokenizer: Path | None = None
    # Rows of the embedding and LM head.
    vocabulary: int = QWEN["vocab_size"]


def sizes_of(config: Config) -> dict[str, Any]:
    """Arguments of Qwen2Config. Raises UserError for a width that is no multiple of a head."""
    head = 128 if config.width >= 512 else 16
    if config.width % head:
        raise UserError(f"--width {config.width} is no multiple of {head}, the size of a head.")
    heads = config.width // head
    keys = next(n for n in (4, 2, 1) if heads % n == 0)
    ratio = QWEN["intermediate_size"] / QWEN["hidden_size"]
    sizes = QWEN | {"hidden_size": config.width, "num_hidden_layers": config.depth}
    sizes |= {"intermediate_size": round(config.width * ratio), "num_attention_heads": heads}
    return sizes | {"num_key_value_heads": keys, "vocab_size": config.vocabulary}


def write_checkpoint(config: Config) -> None:
    """Write the folder; only the weights of one file are in memory at a time."""
    if config.folder.exists():
        raise UserError(f"{config.folder} is there: give --folder a new one.")
    model_config = transformers.Qwen2Config(
        **sizes_of(config), rope_theta=1e6, rms_norm_eps=1e-6, dtype="bfloat16"
    )
    model_config.architectures = ["Qwen2ForCausalLM"]
    with torch.device("meta"):
        weights = transformers.Qwen2ForCausalLM(model_config).to(torch.bfloat16).state_dict()
    shards = split_torch_state_dict_into_shards(weights, max_shard_size=int(config.shard_gb * 1e9))
    config.folder.mkdir(parents=True)
    model_config.save_pretrained(config.folder)
    save_tokenizer(config)
    torch.manual_seed(0)
    for file, names in tqdm(shards.filename_to_tensors.items(), "files", disable=None):
        tensors = {name: random_tensor(name, weights[name].shape) for name in names}
        save_file(tensors, config.folder / file, {"format": "pt"})
    index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
    write_json(config.folder / "model.safetensors.index.json", index)


def random_tensor(name: str, shape: torch.Size, **where: Any) -> torch.Tensor:
    """Random weights: norms are ones, biases zeros, matrices small."""
    where = {"dtype": torch.bfloat16} | where
    if len(shape) == 1:
        return (torch.zeros if name.endswith("bias") else torch.ones)(shape, **where)
    return torch.randn(shape, **where).mul_(0.02)


def save_tokenizer(config: Config) -> None:
    if config.tokenizer is None:
        bytewise = tokenizers.ByteLevelBPETokenizer()
        text = ["good bad world sports business science the film is a"]
        bytewise.train_from_iterator(text * 9, 320, show_progress=False)
        bytewise = bytewise._tokenizer
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bytewise)
    else:
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.tokenizer)
    if len(tokenizer) > config.vocabulary:
        raise UserError(
            f"--vocabulary {config.vocabulary} is below the tokenizer's {len(tokenizer)}."
        )
    tokenizer.save_pretrained(config.folder)


def random_language_model(
    sizes: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """A random Qwen2 of these sizes, quantized as load_causal_lm does.

    Layers are quantized one after another, so that the model never exists unpacked.
    """
    config = transformers.Qwen2Config(**sizes, rope_theta=1e6, rms_norm_eps=1e-6, use_cache=False)
    with torch.device("meta"):
        causal_lm = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    causal_lm.model.rotary_emb = type(causal_lm.model.rotary_emb)(config).to(device)
    for name, module in [*causal_lm.named_modules()]:
        if isinstance(module, nn.Linear) and name != "lm_head":
            has_bias = module.bias is not None
            shape = module.out_features, module.in_features
            causal_lm.set_submodule(name, random_packed(shape, has_bias, dtype, device))
    for module in causal_lm.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                values = random_tensor(name, parameter.shape, dtype=dtype, device=device)
                setattr(module, name, nn.Parameter(values))
    causal_lm.is_loaded_in_4bit = True  # as transformers sets it, for peft
    return causal_lm.requires_grad_(False)


def random_packed(
    shape: tuple[int, int], has_bias: bool, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """A linear layer in NF4; shape (O, I) as of a weight."""
    import bitsandbytes

    # on "meta", because otherwise it first fills an fp32 matrix on the CPU
    options = {"compute_dtype": dtype, "quant_type": "nf4", "device": "meta"}
    packed = bitsandbytes.nn.Linear4bit(*reversed(shape), has_bias, **options)
    values = random_tensor("weight", shape, dtype=dtype, device=device)
    weight = bitsandbytes.nn.Params4bit(values, requires_grad=False, quant_type="nf4")
    packed.weight = weight.to(device)
    if device.type == "cpu":
        compute_unpacked(packed)
    if has_bias:
        packed.bias = nn.Parameter(torch.zeros(shape[0], dtype=dtype, device=device))
    return packed


def main() -> None:
    write_checkpoint(tyro.cli(Config, description=__doc__))


if __name__ == "__main__":
    run_script(main)
