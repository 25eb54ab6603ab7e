"""What the tasks made by a generator share: a length in the name, and the same sequences on every machine."""

import zlib
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from unrecurrent.digests import text_digest
from unrecurrent.errors import InputError
from unrecurrent.tasks.task import Example, Split, Task

#: raised whenever other sequences are drawn under the same names
_FORM = 1


class GeneratedTask(Task):
    """Sequences drawn from a seed that depends on name, length and split alone: the same for everybody.

    The name is that of the task and optionally its length, as in `copy:T=500`.
    """

    base: str
    #: the length where the name gives none
    default: int
    #: the shortest length there is a task for
    least: int = 2
    #: how many sequences a split has
    sizes: ClassVar[dict[Split, int]]
    generated = True

    def __init__(self, name: str) -> None:
        """Read the length from the name; raises `InputError` if it is not one."""
        self.length = self._length(name)
        self.name = f"{self.base}:T={self.length}"
        self._splits: dict[Split, Sequence[Example]] = {}

    def _length(self, name: str) -> int:
        base, colon, option = name.partition(":")
        if not colon:
            return self.default
        key, _, text = option.partition("=")
        if key != "T" or not text.isdecimal() or int(text) < self.least:
            raise InputError(
                f"cannot read {option!r} in {name!r}: write {base}:T=LENGTH with a length of at least {self.least}"
            )
        return int(text)

    def load(self, split: Split) -> Sequence[Example]:
        """Return the sequences of a split, drawn when they are first asked for."""
        if split not in self._splits:
            self._splits[split] = self.draw(self.sizes[split], _random(f"{self.name} {split}"))
        return self._splits[split]

    def digest(self) -> str:
        """Return a fingerprint of what decides the sequences, without drawing them."""
        return text_digest(f"{_FORM} {self.name} {self.sizes}")

    @abstractmethod
    def draw(self, count: int, random: np.random.RandomState) -> Sequence[Example]:
        """Return so many sequences."""


def _random(name: str) -> np.random.RandomState:
    """Return a generator seeded by a name: NumPy's older one, whose numbers are the same in every release (NEP 19)."""
    return np.random.RandomState(zlib.crc32(name.encode()))
