"""A training on disk: weights, adapters, the optimizer's state. A model here is a DualHeadModel."""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from collapse.models.pretrained import adapter_tensors
from collapse.utils.errors import UserError
from collapse.utils.files import read_tensors, write_tensors


def save_weights(job: Path, kind: Literal["best", "final"], model: nn.Module, epoch: int) -> None:
    """Store what was trained as KIND.safetensors; adapters apart, as a peft folder KIND-adapter."""
    tensors = dict(model.trainable())
    if model.adapters is not None:
        folder = job / f"{kind}-adapter"
        folder.mkdir(exist_ok=True)
        tensors = {name: t for name, t in tensors.items() if not name.startswith("backbone.")}
        adapter = adapter_tensors(model.adapters)
        write_tensors(folder / "adapter_model.safetensors", adapter, {"epoch": epoch})
        model.adapters.peft_config["default"].save_pretrained(folder)
    write_tensors(job / f"{kind}.safetensors", tensors, {"epoch": epoch})


def load_weights(job: Path, kind: Literal["best", "final"], model: nn.Module) -> None:
    """Put back what save_weights stored.

    Raises UserError when a file is damaged, missing, or of another model.
    """
    tensors, metadata = read_tensors(job / f"{kind}.safetensors")
    wanted: dict[str, Tensor] = model.trainable()
    if model.adapters is not None:
        file = job / f"{kind}-adapter" / "adapter_model.safetensors"
        adapter, adapter_metadata = read_tensors(file, job)
        if adapter_metadata != metadata:
            raise UserError(
                f"{job} holds {kind} adapters and heads of different epochs: "
                "delete it, and run the experiment again."
            )
        heads = {name: p for name, p in wanted.items() if not name.startswith("backbone.")}
        tensors, wanted = tensors | adapter, heads | adapter_tensors(model.adapters)
    for name, tensor in wanted.items():
        stored = tensors.get(name)
        if stored is None or stored.shape != tensor.shape:
            raise UserError(
                f"{job} holds no {kind} weights of this model ({name} differs): "
                "use the settings that made them."
            )
        tensor.data.copy_(stored)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Trainable weights, AdamW's moments and the generators' states under flat names."""
    tensors = {"rng.cpu": torch.get_rng_state()}
    if next(model.parameters()).is_cuda:
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    for name, parameter in model.trainable().items():
        tensors[f"weight.{name}"] = parameter
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value
    return tensors


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Put back what optimizer_tensors gave."""
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and next(model.parameters()).is_cuda:
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    for name, parameter in model.trainable().items():
        parameter.data.copy_(tensors[f"weight.{name}"])
        if f"step.{name}" in tensors:  # absent while a parameter has had no gradient
            optimizer.state[parameter] = {
                key: tensors[f"{key}.{name}"].to(parameter.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
