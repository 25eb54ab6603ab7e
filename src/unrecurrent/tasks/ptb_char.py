"""Penn Treebank, character level: Mikolov's preparation, 49 symbols and the end of a line."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from unrecurrent.errors import InputError
from unrecurrent.tasks.characters import CharacterTask, read_bytes
from unrecurrent.tasks.task import Example, Source, Split, data_folder, missing, shifted

#: the symbols in the order of their numbers; the last ends a line, `_` stands for a blank
ALPHABET = "#$&'*-./0123456789<>N\\_abcdefghijklmnopqrstuvwxyz\n"

_HOME = "http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz"
_SHA256: dict[Split, str] = {
    "train": "e313d91425e06c4f0a8fb6e881dcce0c291f2a0e9f4dda54833069b122f91da9",
    "valid": "21661f63ec355085879458b6524644d4add5573541b4be14fb52ab2e2e995eb8",
    "test": "1ef5607ac3c463b16e38bfe7900dd3bfc91de5a96e0f21e7eab5188b465b8ebe",
}
_BLANK, _END = ord(" "), ord("\n")


class PTBChar(CharacterTask):
    """The Penn Treebank by characters: 5,017,482 / 393,042 / 442,423 symbols, ends of lines included.

    Published test scores, bits a character: RNN 1.48, LSTM 1.36, TCN 1.31 (Bai, Kolter and Koltun 2018, table 1).
    """

    name = "ptb-char"
    vocabulary = outputs = len(ALPHABET)
    sources = tuple(
        Source(
            f"ptb-char/ptb.char.{split}.txt",
            _HOME,
            sha256,
            "research use (Penn Treebank, LDC)",
            member=f"simple-examples/data/ptb.char.{split}.txt",
        )
        for split, sha256 in _SHA256.items()
    )

    def __init__(self, data_dir: Path | None = None) -> None:
        """`load` looks for the files below `data_dir`, else in the user's data folder."""
        self.data_dir = data_dir

    def load(self, split: Split) -> Sequence[Example]:
        """Return the one stream of a split; raises `InputError` if its file is missing or holds something else."""
        path = data_folder(self.data_dir) / f"ptb-char/ptb.char.{split}.txt"
        if not path.is_file():
            raise missing(self.name, path)
        return [self.encode(path)]

    def encode(self, path: Path) -> Example:
        """Return a file of the same form as one stream; raises `InputError` if it holds something else."""
        return shifted(torch.from_numpy(read_symbols(path)))


def read_symbols(path: Path) -> np.ndarray:
    """Return the symbols of a file, int64 `(N,)`: characters separated by blanks, one sentence a line.

    Raises:
        InputError: the file is empty, is not separated into characters, or has a character outside the alphabet.
    """
    raw = np.frombuffer(read_bytes(path), np.uint8)
    printed = (raw != _BLANK) & (raw != _END)
    if (printed[1:] & printed[:-1]).any():
        raise InputError(f"{path} is not character-level Penn Treebank: its characters must be separated by blanks")
    kept = raw[raw != _BLANK]
    if kept[-1] != _END:
        kept = np.append(kept, np.uint8(_END))
    table = np.full(256, -1, np.int64)
    table[[ord(character) for character in ALPHABET]] = np.arange(len(ALPHABET))
    symbols = table[kept]
    if (symbols < 0).any():
        strange = bytes(kept[symbols < 0][:1]).decode("latin-1")
        raise InputError(f"{path} is not character-level Penn Treebank: it holds {strange!r}, which is no symbol of it")
    return symbols
