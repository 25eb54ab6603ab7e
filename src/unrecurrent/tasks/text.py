"""Any UTF-8 text, character by character: the task `text:FILE`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from unrecurrent.errors import InputError
from unrecurrent.tasks.characters import CharacterTask, read_bytes
from unrecurrent.tasks.task import SPLITS, Example, Split, shifted

#: fewer characters than this leave a validation or test split with nothing to predict
MINIMUM = 40


class TextTask(CharacterTask):
    """Predict the next character of the user's own text.

    The first 90 % of the characters are for training, the next 5 % for validation, the last 5 % for testing. The
    vocabulary is the set of characters of the training part, by code point, and one last symbol for any other
    character; nothing is changed or left out but a byte-order mark.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "rhyme.txt"
    >>> _ = path.write_text("an apple a day " * 20, encoding="utf-8")
    >>> task = TextTask(path)
    >>> task.vocabulary, [len(task.load(split)[0].inputs) for split in SPLITS]
    (9, [269, 14, 14])
    """

    def __init__(self, path: str | Path) -> None:
        """Read the file.

        Raises:
            InputError: the file is missing, empty, too short, binary, or not UTF-8.
        """
        self.name = f"text:{path}"
        codes = read_codes(Path(path).expanduser())
        first, second = len(codes) * 90 // 100, len(codes) * 95 // 100
        parts = codes[:first], codes[first:second], codes[second:]
        self.characters = "".join(map(chr, np.unique(parts[0])))
        self.vocabulary = self.outputs = len(self.characters) + 1
        self._splits = {
            split: [shifted(torch.from_numpy(self._symbols(part)))] for split, part in zip(SPLITS, parts, strict=True)
        }

    def load(self, split: Split) -> Sequence[Example]:
        """Return the one stream of a split."""
        return self._splits[split]

    def encode(self, path: Path) -> Example:
        """Return another text in this one's symbols, as one stream; raises `InputError` as the constructor does."""
        return shifted(torch.from_numpy(self._symbols(read_codes(path))))

    def _symbols(self, codes: np.ndarray) -> np.ndarray:
        known = np.array([ord(character) for character in self.characters])
        table = np.full(max(int(codes.max()), int(known.max())) + 1, len(known), np.int64)
        table[known] = np.arange(len(known))
        return table[codes]


def read_codes(path: Path) -> np.ndarray:
    """Return the code points of a UTF-8 text file, uint32 `(N,)`.

    Raises:
        InputError: the file is missing, empty, too short, binary, or not UTF-8.
    """
    content = read_bytes(path)
    if b"\0" in content:
        raise InputError(f"{path} is a binary file, or text in another encoding than UTF-8: give a UTF-8 text file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start} cannot be decoded): give a text file in UTF-8"
        ) from error
    if len(text) < MINIMUM:
        raise InputError(
            f"{path} has {len(text)} characters: at least {MINIMUM} are needed to train, validate and test"
        )
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)
