"""Spoken digits, sample by sample: one speaker of the Free Spoken Digit Dataset."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unrecurrent.errors import InputError, is_whole
from unrecurrent.tasks.task import Example, Source, Split, data_folder, missing
from unrecurrent.tasks.waveforms import LEVELS, SILENCE, WaveformTask, read_wav

DIGITS = 10
#: the first take of each split and the first one after it; 0 to 4 are the official test set
_TAKES: dict[Split, range] = {"test": range(0, 5), "valid": range(5, 10), "train": range(10, 50)}


class Digits(WaveformTask):
    """The ten digits spoken by jackson, takes 10–49 / 5–9 / 0–4: 400 / 50 / 50 recordings of half a second.

    A recording `s_1 … s_N` is predicted from inputs `(N, 11)` (`Digits.inputs`): the sample before, in [−1, 1] as μ-law
    has it, then a one for the digit that is spoken among nine zeros. The digit is said at every step (the "global
    conditioning" of WaveNet), since a model that sees a limited past would soon have forgotten a first symbol.
    """

    name = "digits"
    vocabulary, features = None, 1 + DIGITS
    sources = (
        Source(
            "digits/*_jackson_*.wav",
            "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/tags/v1.0.10.zip",
            "422e32a8d1b20006e18ea0bcdcce21860ec13781d91f1786b18ba266c9d6de01",
            "CC BY-SA 4.0",
            member="free-spoken-digit-dataset-1.0.10/recordings/*_jackson_*.wav",
            files=500,
        ),
    )

    def __init__(self, data_dir: Path | None = None) -> None:
        """`load` looks for the files below `data_dir`, else in the user's data folder."""
        self.data_dir = data_dir

    def load(self, split: Split) -> Sequence[Example]:
        """Return the recordings of a split, digit by digit; raises `InputError` if one is missing or damaged."""
        folder = data_folder(self.data_dir) / "digits"
        takes = [(digit, folder / f"{digit}_jackson_{take}.wav") for digit in range(DIGITS) for take in _TAKES[split]]
        for _, path in takes:
            if not path.is_file():
                raise missing(self.name, path)
        return [self._example(digit, read_wav(path)) for digit, path in takes]

    @staticmethod
    def inputs(digit: int, levels: Tensor) -> Tensor:
        """Return what a model reads when `digit` is spoken and the samples heard have these μ-law levels, `(T, 11)`."""
        if not is_whole(digit) or digit not in range(DIGITS):
            raise InputError(f"{digit!r} is no digit from 0 to 9: name one")
        inputs = torch.zeros(len(levels), 1 + DIGITS)
        inputs[:, 0] = 2 * levels / (LEVELS - 1) - 1
        inputs[:, 1 + digit] = 1
        return inputs

    def _example(self, digit: int, levels: np.ndarray) -> Example:
        targets = torch.from_numpy(levels)
        before = torch.cat([torch.tensor([SILENCE]), targets[:-1]])
        return Example(self.inputs(digit, before), targets)
