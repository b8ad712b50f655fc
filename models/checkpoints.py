"""What a run leaves, as safetensors: the weights, and beside them all that the next step depends on."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Config = TypeVar("Config")


def read_config(config_class: type[Config], values: dict[str, Any]) -> Config:
    """The configuration whose fields ``values`` holds; others are left out. Raises: ValueError for a value that is
    negative, or not of the type of the field's default."""
    known = {field.name: field.default for field in fields(config_class)}  # type: ignore[arg-type]
    for name, default in known.items():
        value = values.get(name, default)
        numbers = (int, float) if default is None or isinstance(default, float) else type(default)
        fits = isinstance(value, numbers) and isinstance(value, bool) == isinstance(default, bool)
        if not (fits and (isinstance(value, str) or value >= 0)) and not (value is None and default is None):
            raise ValueError(f"{name} cannot be {value!r}")
    return config_class(**{name: value for name, value in values.items() if name in known})


def save_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, scaler: Any) -> None:
    """Writes model.safetensors and training.safetensors; an interruption, whenever it comes, leaves two of one step
    (see `finish_saving`)."""
    folder.mkdir(parents=True, exist_ok=True)
    state: dict[str, Tensor] = {}
    for index, values in optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{index}.{name}": tensor.contiguous() for name, tensor in values.items()}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    metadata = {"step": str(step), "scaler": json.dumps(scaler.state_dict()), "trained": json.dumps(trained)}
    files = {"model.safetensors": (unique_tensors(model), {}), "training.safetensors": (state, metadata)}
    for name, (tensors, facts) in files.items():
        try:
            save_file(tensors, folder / f"{name}.partial", facts)
        except SafetensorError as error:  # what a full disk raises
            raise OSError(f"{folder / name} cannot be written: {error}.") from error
    # Both are whole before either replaces its predecessor, the model first.
    for name in files:
        os.replace(folder / f"{name}.partial", folder / name)


def finish_saving(folder: Path) -> None:
    """Puts training.safetensors in its place where ``save_checkpoint`` was ended with the model in its own."""
    partial = folder / "training.safetensors.partial"
    if partial.exists() and not (folder / "model.safetensors.partial").exists():
        with suppress(FileNotFoundError):  # another process of the run has done it
            os.replace(partial, folder / "training.safetensors")


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with tied tensors once, under their first name."""
    unique: dict[int, str] = {}
    state = model.state_dict()
    return {
        name: tensor.detach().contiguous()
        for name, tensor in state.items()
        if unique.setdefault(tensor.data_ptr() if tensor.numel() else id(tensor), name) == name
    }


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads what ``unique_tensors`` gave. Raises: ValueError if the file is not whole, or not of such a model."""
    tensors, expected = _read(path), set(unique_tensors(model))
    if set(tensors) != expected:
        different = ", ".join(sorted(set(tensors) ^ expected)[:3])
        raise ValueError(f"{path} is not a checkpoint of this {type(model).__name__}: they differ in {different}, …")
    try:
        model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{path} is a checkpoint of another size: {str(error).splitlines()[-1].strip()}") from error


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path} is missing, or no file.")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged, or not in the safetensors format: {error}.") from error


def resume_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any) -> int:
    """Restores what ``save_checkpoint`` wrote; returns the step to go on with."""
    path = folder / "training.safetensors"
    state = _read(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if not {"step", "scaler", "trained"} <= set(metadata):
        raise ValueError(f"{path} is not what training left to go on from.")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if json.loads(metadata["trained"]) != trained:
        raise ValueError(f"{path} is of a run that trained other parameters (--tune): --resume needs the same.")
    load_weights(model, folder / "model.safetensors")
    scaler.load_state_dict(json.loads(metadata["scaler"]))
    saved = optimizer.state_dict()
    entries: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        index, _, field = name.removeprefix("optimizer.").partition(".")
        entries.setdefault(int(index), {})[field] = tensor
    optimizer.load_state_dict({**saved, "state": entries})
    return int(metadata["step"])
