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
from unrecurrent.errors import InputError, as_number, checked_whole
from unrecurrent.files import replacing, write_text
from unrecurrent.models import Interface, SequenceModel, build_model

CONFIG, WEIGHTS, TRAINING = "config.json", "model.safetensors", "training.safetensors"
#: what a configuration must hold
_FORMS = {"model": (str, "text"), "interface": (dict, "table"), "settings": (dict, "table"), "task": (str, "text")}


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
        _check_forms(config)
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): restore or delete the checkpoint") from error
    return config


def _check_forms(config: Any) -> None:
    """Raise a `ValueError` where a configuration does not hold what `save_model` is given."""
    if not isinstance(config, dict):
        raise ValueError("it holds no keys")
    for key, (form, noun) in _FORMS.items():
        if not isinstance(config.get(key), form):
            raise ValueError(f"its {key!r} is no {noun}")
    _check_interface(config["interface"])
    scales = config.get("scales")
    if scales is not None and not _are_scales(scales):
        raise ValueError("its 'scales' are no lists of numbers, 'mean' and 'std'")


def _check_interface(interface: Mapping[str, Any]) -> None:
    """Raise a `ValueError` where a model cannot have such an interface: whole numbers, symbols or features in."""
    needed = set(Interface._fields) - set(Interface._field_defaults)
    if not needed <= set(interface) <= set(Interface._fields):
        raise ValueError(f"its 'interface' must hold {', '.join(Interface._fields)}")
    if (interface["vocabulary"] is None) == (interface["features"] is None):
        raise ValueError("its 'interface' must have either a vocabulary or features")
    for name, size in interface.items():
        if size is not None or name == "outputs":
            checked_whole(name, size, 0 if name == "separator" else 1)


def _are_scales(scales: Any) -> bool:
    mean, std = (scales.get(name) if isinstance(scales, dict) else None for name in ("mean", "std"))
    if not isinstance(mean, list) or not isinstance(std, list):
        return False
    return len(mean) == len(std) and None not in map(as_number, mean + std)


def load_model(folder: Path) -> tuple[SequenceModel, dict[str, Any]]:
    """Return the model of a checkpoint folder, in evaluation mode, and its configuration.

    Raises:
        InputError: the folder is no checkpoint, is damaged, or its weights do not fit its configuration.
    """
    config = load_config(folder)
    tensors, _ = load_tensors(Path(folder) / WEIGHTS)
    try:
        model = build_model(config["model"], Interface(**config["interface"]), config["settings"])
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(f"the weights in {folder} do not fit its {CONFIG}: restore both from one run") from error
    return model.eval(), config
