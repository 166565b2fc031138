"""Reads a pretrained model with all of its weights, none random; else says what is wrong."""

import contextlib
import functools
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from collapse.config import STANDIN_MODEL
from collapse.utils.errors import DISK_FULL, UserError, is_out_of_memory
from collapse.utils.files import read_json
from collapse.utils.hub import use_cache_if_hub_is_silent


@contextlib.contextmanager
def loading(name: str):
    """Turn errors of transformers about a model that cannot be loaded into a UserError."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    is_path = Path(name).exists()
    silent = not is_path and use_cache_if_hub_is_silent()
    try:
        yield
    except Exception as error:  # each of these libraries raises its own kinds for damaged files
        disk_full = isinstance(error, OSError) and error.errno in DISK_FULL
        if isinstance(error, UserError) or disk_full or is_out_of_memory(error):
            raise
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 240, placeholder=" ...")
        fix = "give a folder or hub name of a causal LM, "
        fix += f"or {STANDIN_MODEL} after `make standin`"
        if "custom code" in str(error):
            reason = "it needs code of its own, by trust_remote_code, which is never run here"
            fix = "choose a model of an architecture that transformers has"
        elif isinstance(error, safetensors.SafetensorError):
            fix = "its weights are damaged or cut short: fetch or copy them again, after "
            fix += "`git lfs install` where git fetched them"
        elif "pytorch_model.bin" in str(error) and not is_path:
            reason, fix = NO_SAFETENSORS, conversion_command(name)
        elif silent or (not is_path and NOT_CONNECTED.search(str(error))):
            reason = "the hub does not answer, and its cache does not hold all of the model"
            fix = "run the same command again when it does, or give a folder"
        elif is_path:
            fix = "fix it, or give another one of a causal LM"
        raise UserError(f"cannot load the model {name} ({reason}): {fix}.") from None


NOT_CONNECTED = re.compile("connect|timed? ?out|offline", re.IGNORECASE)
NO_SAFETENSORS = "it has no weights in safetensors, and other files can run code when they are read"
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.ckpt")


def conversion_command(name: str | Path) -> str:
    script = f"M.from_pretrained('{name}').save_pretrained('NEW')"
    return (
        'where you trust it, convert it by `python -c "from transformers import '
        f"AutoModelForCausalLM as M; {script}\"` and copy its tokenizer's files to NEW"
    )


def check_folder(folder: Path) -> None:
    """Raise UserError for a path that is not the folder of a whole model."""
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: give the folder of a model.")
    if (adapter := folder / "adapter_config.json").exists():
        base = read_json(adapter).get("base_model_name_or_path")
        raise UserError(
            f"{folder} holds adapters and no whole model: give the model that they are for "
            f"({base}), or save the two merged (peft's merge_and_unload) and give that folder."
        )
    if not (folder / "config.json").exists() and (files := sorted(folder.glob("*.gguf"))):
        raise UserError(f"{folder} holds GGUF files: give one of them, as --model {files[0]}.")
    if not (folder / "config.json").exists():
        raise UserError(
            f"cannot load the model {folder} (it holds no config.json): give the folder with a "
            "model's config.json, model.safetensors and tokenizer.json."
        )


def read_config(name: str, revision: str | None) -> Any:
    """The model's configuration. Raises UserError where it cannot be loaded."""
    from transformers import AutoConfig

    if Path(name).exists():
        check_folder(Path(name))
    with loading(name):
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)


def own_quantization(model_config: Any) -> dict[str, Any] | None:
    """The quantization that a model is stored in; None for plain weights.

    Raises UserError for any other than bitsandbytes' 4 bits.
    """
    packing = getattr(model_config, "quantization_config", None)
    if packing is None:
        return None
    packing = dict(packing if isinstance(packing, dict) else packing.to_dict())
    method = packing.get("quant_method", "bitsandbytes" if "load_in_4bit" in packing else "unknown")
    if method == "bitsandbytes" and packing.get("load_in_4bit"):
        return packing
    scheme = "bitsandbytes, 8 bits" if method == "bitsandbytes" else str(method)
    raise UserError(
        f"the weights of {model_config.name_or_path} are quantized ({scheme}), and adapters train "
        "here on plain weights or on bitsandbytes' 4 bits: give the model as it was before its "
        "quantization; --quantization nf4 packs it."
    )


# --------------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------------


def read_causal_lm(name: str | Path, **options: Any) -> nn.Module:
    """The causal LM that transformers' from_pretrained gives for these options.

    transformers initializes missing weights at random; here they raise a UserError, as do weights
    that do not fit config.json.
    """
    from transformers import AutoModelForCausalLM

    options |= {"trust_remote_code": False, "ignore_mismatched_sizes": True}  # refused below
    with loading(str(name)):
        causal_lm, loading_info = AutoModelForCausalLM.from_pretrained(
            name, output_loading_info=True, **options
        )
    modules = {path for path, _ in causal_lm.named_modules()}
    if problem := weights_problem(loading_info, modules):
        raise UserError(
            f"the weights of {name} are not those of a {type(causal_lm).__name__}{problem}"
        )
    if loading_info["unexpected_keys"]:
        unused = listed(loading_info["unexpected_keys"])
        print(f"NOTE: weights of {name} that are no part of its causal LM are not used: {unused}")
    return causal_lm


# Endings of the names of quantized weights and their scales: GPTQ, AWQ, fp8, bitsandbytes, others.
PACKED = ("qweight", "qzeros", "g_idx", "scales", "weight_scale", "weight_scale_inv", "SCB")
PACKED += ("weight_packed", "weight_shape", "absmax", "quant_map", "bitsandbytes__nf4")
PACKED += ("bitsandbytes__fp4", "weight_format", "input_scale")
# Endings of buffers that old files store beside weights: tables of rotations, causal masks.
TABLES = ("inv_freq", ".attn.bias", ".attention.bias", "masked_bias", "position_ids")
# Prefix that a wrapper puts into names -> the wrapper, and what to save instead.
WRAPPERS = {
    "_orig_mod.": ("torch.compile", "the model that was compiled (MODEL._orig_mod)"),
    "_fsdp_wrapped_module.": ("FSDP", "the model inside it"),
    "_checkpoint_wrapped_module.": ("a wrapper of activations", "the model inside it"),
    "module.": ("DataParallel", "the model inside it (MODEL.module)"),
    "base_model.model.": ("peft", "the merged model (MODEL.merge_and_unload())"),
}


def weights_problem(loading_info: dict[str, Any], modules: set[str]) -> str | None:
    """How weights do not fit the model, as the end of a sentence; None if they fit.

    loading_info: what from_pretrained reports; modules: the paths of the model's modules.
    """
    missing, unused = set(loading_info["missing_keys"]), set(loading_info["unexpected_keys"])
    # Unused weights of existing modules: another network than the stored one would compute.
    dropped = {key for key in unused if key.rpartition(".")[0] in modules - {""}}
    dropped = {key for key in dropped if not key.endswith(TABLES)}
    if packed := [key for key in unused if key.endswith(PACKED)]:
        return (
            f": they are quantized ({listed(packed)}), and config.json does not say how; give the "
            "model as it was before its quantization."
        )
    for inside, (cause, instead) in WRAPPERS.items():
        wrapped = {key for key in unused if key.replace(inside, "") in missing}
        if wrapped:
            return (
                f": {cause} put {inside} into their names ({listed(wrapped)}); save {instead} by "
                "its save_pretrained, or take that out of the names."
            )
    if sizes := sorted(loading_info["mismatched_keys"], key=str):
        key, stored, wanted = sizes[0]
        return (
            f" of the sizes in its config.json: {listed({key for key, *_ in sizes})} differ, "
            f"{key} is {list(stored)} where {list(wanted)} is asked for; give config.json and "
            "weights of one model."
        )
    if missing:
        return (
            f": {listed(missing)} are not there, and would be drawn at random; give a folder with "
            "all weights of a causal LM, as its save_pretrained writes them."
        )
    if dropped:
        return (
            f" as config.json describes it: {listed(dropped)} would not be used; give config.json "
            "and weights of one model."
        )
    return None


def listed(names: Iterable[str]) -> str:
    """Up to three of the names, in order, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@functools.lru_cache(maxsize=2)  # a process trains one model many times
def check_weights(name: str, revision: str | None) -> None:
    """Raise UserError where weights are missing, of other sizes, or NaN, before any are loaded."""
    from transformers.utils import cached_file

    if Path(name).exists() and not any(Path(name).glob("*.safetensors")):
        reason, fix = "it has no weights", "fetch or copy its model.safetensors, too"
        if any(file for kind in OTHER_WEIGHTS for file in Path(name).glob(kind)):
            reason, fix = NO_SAFETENSORS, conversion_command(name)
        raise UserError(f"cannot load the model {name} ({reason}): {fix}.")
    if own_quantization(read_config(name, revision)) is None:
        read_causal_lm(name, revision=revision, use_safetensors=True, device_map={"": "meta"})
    with loading(name):
        folder = Path(cached_file(name, "config.json", revision=revision)).parent
        for file in sorted(folder.glob("model*.safetensors")):
            with safetensors.safe_open(file, "pt") as stored:
                names = stored.keys()
                check_finite(((key, stored.get_tensor(key)) for key in names), str(file))


def check_finite(tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Raise UserError naming a weight that is NaN or infinite."""
    for name, tensor in tensors:
        # One pass: a sum is finite only if all its terms are.
        if not tensor.is_floating_point() or tensor.sum(dtype=torch.float32).isfinite():
            continue
        if bad := int((~tensor.float().isfinite()).sum()):
            raise UserError(
                f"{where}: {bad:,} of the {tensor.numel():,} weights of {name} are NaN or "
                "infinite; fetch or copy the file again, or take another checkpoint of the model."
            )
