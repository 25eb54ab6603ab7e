"""Memory of what lies on disk: a checkpoint on a task, a text or an array; the recurrent nodes of an ONNX file."""

import tokenize
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unrecurrent.checkpoint import load_model
from unrecurrent.errors import InputError
from unrecurrent.memory import MemoryProfile, measure_memory
from unrecurrent.models import SequenceModel
from unrecurrent.onnx_graph import measure_graph, output_change
from unrecurrent.task_memory import measure_on_task, memory_data
from unrecurrent.tasks import Example, Task, get_task
from unrecurrent.tasks.csv_table import read_csv

ARRAYS = (".npy", ".npz", ".csv")
#: what NumPy raises for files that are no arrays, or damaged ones
_DAMAGED = (
    *(ValueError, OSError, EOFError, KeyError, MemoryError, OverflowError, SyntaxError),
    *(tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)


def measure_file(
    path: Path, data: str | None, *, data_dir: Path | None = None, **settings: Any
) -> dict[str, MemoryProfile]:
    """Measure a checkpoint folder or an ONNX file; the profiles by the name of what was measured.

    `data` is a task, a text file, or inputs in a .npy, .npz or .csv file; a checkpoint has its own task by default.
    `settings` go to `measure_memory`.

    Raises:
        InputError: no such file, or data that do not fit the model.
    """
    if Path(path).suffix == ".onnx":
        if data is None:
            raise InputError(f"{path} needs inputs to be measured on: add --data with a .npy file")
        if Path(data).suffix not in ARRAYS:
            raise InputError(f"an ONNX model reads arrays, not {data!r}: give its inputs in a .npy or .npz file")
        return measure_graph(path, load_arrays(Path(data)), **settings)
    return {Path(path).name: measure_checkpoint(path, data, data_dir=data_dir, **settings)}


def measure_checkpoint(
    folder: Path, data: str | None = None, *, data_dir: Path | None = None, **settings: Any
) -> MemoryProfile:
    """Measure the model of a checkpoint folder on test data of a task, on a text, or on inputs alone.

    On inputs alone there are no targets: the loss is then the mean squared change of the model's outputs, and k*(δ) the
    smallest k that changes them by at most δ of their variance.
    """
    model, config = load_model(folder)
    name = data or config["task"]
    if model.interface.separator is not None:
        raise InputError(
            f"what this model of {config['task']!r} reads has two parts, and the last inputs alone would leave out what"
            " is to be answered: how much of them it uses cannot be measured this way"
        )
    if Path(name).suffix in ARRAYS and ":" not in name:
        inputs = _sequences(_scaled(load_arrays(Path(name)), config.get("scales")), model, name)
        targets = _outputs(model, inputs)
        scale = float(torch.cat(targets).var(0, correction=0).mean())
        pairs = [Example(x, y) for x, y in zip(inputs, targets, strict=True)]
        return measure_memory(model, pairs, output_change(None), scale=scale, **settings)
    if model.interface.vocabulary is None and name.startswith("text:"):
        raise InputError(
            f"the model reads {model.interface.features} features a step, not text: give a task or an array"
        )
    task, examples = _task_data(name, config["task"], data_dir)
    _check_interface(examples, model, name)
    _check_targets(examples, model, name)
    return measure_on_task(model, task, examples, **settings)


def _task_data(name: str, trained_on: str, data_dir: Path | None) -> tuple[Task, Sequence[Example]]:
    """A task and its test data; of a text file the whole of it, in the symbols of the task the model was trained on."""
    path = Path(name.removeprefix("text:"))
    is_text = name != trained_on and path.is_file()
    task = get_task(trained_on if is_text else name, data_dir=data_dir)
    if not is_text:
        return task, memory_data(task)
    encode = getattr(task, "encode", None)
    if encode is None:
        raise InputError(f"the model was trained on {trained_on!r}, which is no text: give a task or a .npy file")
    return task, [encode(path)]


def _check_interface(examples: Sequence[Example], model: SequenceModel, name: str) -> None:
    inputs, interface = examples[0].inputs, model.interface
    if interface.vocabulary is not None:
        if inputs.is_floating_point():
            raise InputError(f"the model reads {interface.vocabulary} symbols, but {name!r} holds real numbers")
        smallest = min(int(x.min()) for x, _ in examples if len(x))
        largest = max(int(x.max()) for x, _ in examples if len(x))
        if smallest < 0:
            raise InputError(f"{name!r} holds the number {smallest}, but symbols are numbered from 0: correct it")
        if largest >= interface.vocabulary:
            raise InputError(
                f"{name!r} has at least {largest + 1} symbols, but the model was trained with {interface.vocabulary}:"
                " measure it on the task it was trained on"
            )
    elif inputs.dim() != 2 or inputs.shape[1] != interface.features:
        raise InputError(f"the model reads {interface.features} features, but {name!r} does not hold that many")


def _check_targets(examples: Sequence[Example], model: SequenceModel, name: str) -> None:
    """Refuse targets that the model's outputs cannot be compared with."""
    targets, outputs = examples[0].targets, model.interface.outputs
    if targets.dim() > 1 and targets.shape[1] != outputs:
        raise InputError(
            f"{name!r} has {targets.shape[1]} targets a step, but the model predicts {outputs}: measure it on the task"
            " it was trained on"
        )


_Arrays = dict[str, np.ndarray] | np.ndarray


def _scaled(array: _Arrays, scales: dict[str, list[float]] | None) -> _Arrays:
    """Inputs in the units of their file, standardised in float64 as those the model was trained on were."""
    if scales is None or isinstance(array, dict) or array.shape[-1:] != (len(scales["mean"]),):
        return array
    with np.errstate(over="ignore"):  # what is too large becomes infinite, which is refused later
        return (array.astype(np.float64) - scales["mean"]) / scales["std"]


def load_arrays(path: Path) -> _Arrays:
    """Read a .npy array, the arrays of an .npz file by name, or the numeric columns of a .csv file with a header.

    Raises:
        InputError: no such file, not of that form, or objects in place of numbers.
    """
    if not path.is_file():
        raise InputError(f"there is no file {path}: give inputs in a .npy, .npz or .csv file")
    try:
        if path.suffix == ".csv":
            table = read_csv(path)
            columns = [table.numbers(name) for name in table.columns if table.is_numeric(name)]
            if not columns:
                raise InputError(f"{path} has no column of numbers: give a file with the model's inputs")
            return np.stack(columns, 1)
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            arrays = {"": loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except InputError:
        raise
    except _DAMAGED as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} cannot be read as numbers ({reason}): write it again") from error
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub":
            of = f"the array {name!r} of {path}" if name else str(path)
            raise InputError(f"{of} holds {array.dtype}, not real numbers: write it again")
    return loaded if isinstance(loaded, np.ndarray) else arrays


def _sequences(array: _Arrays, model: SequenceModel, name: str) -> list[Tensor]:
    """One tensor (T, D), or (T,) for symbols, for each sequence of an array (T, …) or (N, T, …)."""
    if isinstance(array, dict):
        raise InputError(f"a checkpoint reads one array, but {name} holds {len(array)}: give a .npy file")
    width = 1 if model.interface.vocabulary is not None else 2
    whole = np.issubdtype(array.dtype, np.integer)
    if array.ndim not in (width, width + 1) or (width == 1) != whole:
        kind = (
            "whole numbers (T,) or (N, T)" if width == 1 else f"numbers (T, {model.interface.features}) or (N, T, ...)"
        )
        raise InputError(f"{name} has shape {array.shape} of {array.dtype}, but the model reads {kind}")
    rows = array[None] if array.ndim == width else array
    if not len(rows) or not rows.shape[1]:
        raise InputError(f"{name} is empty: give at least one step")
    with np.errstate(over="ignore"):  # what is too large for a float32 becomes infinite, which is refused later
        tensors = [torch.as_tensor(np.array(row, np.int64 if width == 1 else np.float32)) for row in rows]
    _check_interface([Example(x, x) for x in tensors], model, name)
    return tensors


@torch.no_grad()
def _outputs(model: SequenceModel, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The model's outputs along each sequence, read in pieces."""
    found = []
    for sequence in inputs:
        cache, parts = model.init_cache(1), []
        for piece in sequence.split(512):
            outputs, cache = model.advance(piece[None], cache)
            parts.append(outputs[0])
        found.append(torch.cat(parts))
    return found
