"""Models as people fine-tune them: a whole checkpoint or an adapter, and the base it came from."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils.peft_utils import find_adapter_config_file

from collapse.models.architectures import check_is_text_decoder
from collapse.models.four_bits import compute_unpacked
from collapse.models.pretrained import find_model
from collapse.models.weights import listed, loading
from collapse.utils.device import pick_device
from collapse.utils.errors import UserError
from collapse.utils.files import read_json

LOGIN = "a gated or private model needs `hf auth login`"
# First values of an adapter (peft's init_lora_weights) that leave the base's weights as they are.
BESIDE_THE_BASE = (True, False, "gaussian", "eva")
NEW_HEADS = ("score.", "classifier.", "pre_classifier.")  # an adapter for classes brings its own


def is_adapted(model: nn.Module) -> bool:
    """Whether it is peft's model around one of transformers, which peft marks as well."""
    return hasattr(model, "get_base_model")


def core_of(model: nn.Module) -> Any:
    """The transformers model, inside peft's where adapters are."""
    return model.get_base_model() if is_adapted(model) else model


def has_lm_head(model: nn.Module) -> bool:
    return type(core_of(model)).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def what_its_head_reads(model: nn.Module) -> str:
    """Classifiers of decoders read the `last` token, of encoders the `first`; others: `mean`."""
    core = core_of(model)
    if not type(core).__name__.endswith("ForSequenceClassification"):
        return "mean"
    return "first" if core.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES else "last"


def pooling_of_training(name: str) -> str | None:
    """What the classifier of one of our experiments reads, given its adapter's folder."""
    settings = Path(name).expanduser().resolve().parent.parent / "settings.json"
    ours = Path(name).name in ("best-adapter", "final-adapter") and settings.exists()
    return read_json(settings)["config"].get("pooling") if ours else None


def load_fine_tuned(name: str, base: str | None, dtype: str) -> tuple[nn.Module, str | None]:
    """The model, with its adapter where `name` is one; what its base is called, if that is known.

    base: where the base is, if it is not where adapter or model card say.
    """
    place = find_model(name)
    with loading(name):
        file = find_adapter_config_file(place)
    if file is None:
        if inside := sorted(Path(place).glob("*/adapter_config.json")):
            adapters = " or ".join(str(Path(name) / one.parent.name) for one in inside)
            raise UserError(f"{name} is no adapter, but holds some: give {adapters}.")
        return load_whole(name, dtype), base or _base_of_card(name)
    try:
        import peft
    except ImportError:
        raise UserError(f"{name} is an adapter: pip install peft.") from None
    settings = read_json(Path(file))
    base = base or settings["base_model_name_or_path"]
    task = "SequenceClassification" if settings.get("task_type") == "SEQ_CLS" else "CausalLM"
    whole = load_whole(base, dtype, f"AutoModelFor{task}")
    with loading(name), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of renamed methods, and of unmatched keys, reported below
        model = peft.PeftModel.from_pretrained(whole, place, ignore_mismatched_sizes=True)
        # The same weights again: from_pretrained does not report unmatched keys.
        loaded = model.load_adapter(place, "default", ignore_mismatched_sizes=True)
    for keys in (loaded.unexpected_keys, loaded.missing_keys):
        if lacking := [key for key in keys if not any(f".{head}" in key for head in NEW_HEADS)]:
            raise UserError(
                f"the adapter {name} does not fit {base}: {listed(lacking)} would be left out. "
                "Name the base that it was trained on by --base; where a wrapper put a word into "
                "these names (_orig_mod: torch.compile), save the adapter of the model inside it."
            )
    return model, base


def load_whole(name: str, dtype: str, kind: str | None = None) -> nn.Module:
    """A model of text without adapters on its device. kind: its auto class; None: by its config.

    dtype: fp32, bf16, 4bit (NF4), or auto: fp32 on a CPU, else as it is stored. Weights may be NaN.
    Raises UserError for another kind of model, and for one that is not at hand or not whole.
    """
    device, options, place = pick_device("auto"), {}, find_model(name)
    types = {"bf16": torch.bfloat16, "auto": torch.float32 if device.type == "cpu" else "auto"}
    if dtype == "4bit":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4"
        )
    try:
        with loading(place):
            config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False)
            check_is_text_decoder(config, name)
            kind = kind or _kind_of((config.architectures or [""])[0])
            model, found = getattr(transformers, kind).from_pretrained(
                place,
                dtype=types.get(dtype, torch.float32),
                output_loading_info=True,
                trust_remote_code=False,
                **options,
            )
    except UserError as error:
        if Path(place).exists():
            raise
        raise UserError(f"{str(error).removesuffix('.')}; {LOGIN}.") from None
    lacking = {k for k in found["missing_keys"] if not k.startswith(NEW_HEADS)}
    if lacking := sorted(key for key in lacking if "pooler" not in key):
        raise UserError(f"{name} lacks weights ({', '.join(lacking[:3])}): copy it whole.")
    if dtype != "4bit":
        return model.to(device)
    if device.type == "cpu":
        compute_unpacked(model)
    return model


def _kind_of(architecture: str) -> str:
    if architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "AutoModelForCausalLM"
    of_classes = architecture.endswith("ForSequenceClassification")
    return "AutoModelForSequenceClassification" if of_classes else "AutoModel"


def _base_of_card(name: str) -> str | None:
    """`base_model` of a model's card; None where it says nothing."""
    found = None
    with contextlib.suppress(Exception):  # no card, or no hub: the caller asks for a name
        from huggingface_hub import ModelCard

        file = Path(name) / "README.md"
        found = ModelCard.load(file if file.exists() else name).data.base_model
    return found[0] if isinstance(found, list) else found


def can_be_off(model: nn.Module) -> bool:
    """Whether a model with its adapter off is the base.

    It is not with a trained bias, a prompt, a merged adapter, or one that took its first values out
    of the base's weights (PiSSA, OLoRA, LoftQ ...).
    """
    configs = model.peft_config.values() if is_adapted(model) else ()
    merged = any(getattr(module, "merged", False) for module in model.modules())
    plain = all(getattr(c, "bias", "none") == "none" and not c.is_prompt_learning for c in configs)
    beside = all(getattr(c, "init_lora_weights", True) in BESIDE_THE_BASE for c in configs)
    return bool(configs) and plain and beside and not merged


@contextlib.contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """As peft's disable_adapter, which would make parameters trainable that were not."""
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with model.disable_adapter():
        yield
    for parameter, was in trainable:
        parameter.requires_grad_(was)
