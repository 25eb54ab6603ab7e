"""Checkpoints: named tensors and a JSON text in one safetensors file, whole or not there, checked when read."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from unrecurrent.digests import tensor_digest
from unrecurrent.errors import InputError
from unrecurrent.files import replacing, write_text
from unrecurrent.models import Interface, SequenceModel, build_model

CONFIG, WEIGHTS, TRAINING = "config.json", "model.safetensors", "training.safetensors"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and a JSON-safe mapping to one file with a checksum over both."""
    whole = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    text = json.dumps(about)
    metadata = {"about": text, "sha256": tensor_digest(sorted(whole.items()), text)}
    with replacing(path) as temporary:
        try:
            save_file(whole, temporary, metadata=metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Raises:
        InputError: the file is missing, is no safetensors file, or does not match its checksum.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}: name the folder of a finished or interrupted training run")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies lie in aligned memory as freshly made tensors do: kernels then round alike, which resuming needs.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, struct.error, ValueError) as error:
        raise _damaged(path) from error
    if metadata.get("sha256") != tensor_digest(sorted(tensors.items()), metadata.get("about", "")):
        raise _damaged(path)
    return tensors, json.loads(metadata["about"])


def _damaged(path: Path) -> InputError:
    return InputError(f"{path} is damaged (its contents do not match its checksum): restore or delete it")


def save_model(folder: Path, model_state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write a checkpoint folder: `config.json` (what to build) and `model.safetensors` (its weights)."""
    save_tensors(folder / WEIGHTS, model_state, {"model": config["model"]})
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def load_config(folder: Path) -> dict[str, Any]:
    """Read the `config.json` of a checkpoint folder."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise InputError(f"{folder} is no checkpoint (it holds no {CONFIG}): name the folder of a training run")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not {"model", "interface", "settings", "task"} <= set(config):
            raise ValueError("missing keys")
    except ValueError as error:
        raise InputError(f"{path} is damaged: restore or delete the checkpoint") from error
    return config


def load_model(folder: Path) -> tuple[SequenceModel, dict[str, Any]]:
    """Return the model of a checkpoint folder, in evaluation mode, and its configuration.

    Raises:
        InputError: the folder is no checkpoint, is damaged, or its weights do not fit its configuration.
    """
    config = load_config(folder)
    tensors, _ = load_tensors(Path(folder) / WEIGHTS)
    model = build_model(config["model"], Interface(**config["interface"]), config["settings"])
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(f"the weights in {folder} do not fit its {CONFIG}: restore both from one run") from error
    return model.eval(), config
