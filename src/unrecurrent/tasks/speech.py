"""Speech, sample by sample: the prompts of a telephone system, all by one speaker."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from unrecurrent.errors import InputError
from unrecurrent.tasks.task import Example, Source, Split, data_folder, drawn_by_name, missing, shifted
from unrecurrent.tasks.waveforms import WaveformTask, read_wav

_SPLIT_SEED = "unrecurrent speech 1"
#: fewer recordings than this leave a split without any
FEWEST = 8


class Speech(WaveformTask):
    """60 English prompts of Asterisk, 227 seconds at 8 kHz: a split is one stream, its recordings one after another.

    The recordings are drawn by name: the first eighth tests, the second validates, the rest trains.
    """

    name = "speech"
    stream = True
    sources = (
        Source(
            "speech/*.wav",
            "https://downloads.asterisk.org/pub/telephony/sounds/",
            "cf2c6658cbc83c5534b614faeb1851147b9681755aa119769da56d5bb571cbec",
            "CC BY-SA 3.0",
            by_hand=True,
            files=60,
        ),
    )

    def __init__(self, data_dir: Path | None = None) -> None:
        """`load` looks for the files below `data_dir`, else in the user's data folder."""
        self.data_dir = data_dir

    def load(self, split: Split) -> Sequence[Example]:
        """Return the one stream of a split; raises `InputError` if there are no recordings or one is damaged."""
        root = data_folder(self.data_dir)
        paths = {path.name: path for path in self.sources[0].found(root)}
        if not paths:
            raise missing(self.name, root / self.sources[0].path)
        if len(paths) < FEWEST:
            raise InputError(f"{root / 'speech'} holds {len(paths)} recordings: at least {FEWEST} are needed")
        drawn = drawn_by_name(list(paths), _SPLIT_SEED)
        share = len(drawn) // 8
        part = {"test": slice(share), "valid": slice(share, 2 * share), "train": slice(2 * share, None)}[split]
        return [shifted(torch.from_numpy(np.concatenate([read_wav(paths[name]) for name in drawn[part]])))]
