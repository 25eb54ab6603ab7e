"""What a benchmark task is: sequences to predict, how a prediction is scored, and where the data come from."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")


@dataclass(frozen=True)
class Metric:
    """The number a task is judged by: `scale` times the mean loss a step, in `unit`.

    >>> Metric("bpc", "lower", "bits a character", scale=1.4427).direction
    'lower'
    """

    name: str
    direction: Literal["lower", "higher"]
    unit: str
    scale: float = 1.0


@dataclass(frozen=True)
class Source:
    """One file of a data set: its name below the data folder, its public home, and what it must contain."""

    path: str
    url: str
    sha256: str
    licence: str


class Example(NamedTuple):
    """One sequence: `inputs` `(T,)` symbols or `(T, D)` features, and `targets` whose first axis is `T` too."""

    inputs: Tensor
    targets: Tensor


class Task(ABC):
    """A benchmark: `load` gives sequences, `loss` scores predictions, `metric` names the number reported.

    Exactly one of `vocabulary` (inputs are symbols `0 … vocabulary − 1`) and `features` (inputs are real
    vectors of that width) is set; `outputs` is the width of the prediction. A task whose splits are one long
    sequence each is a stream (`stream = True`): it is trained with carried state over consecutive pieces.
    """

    name: str
    metric: Metric
    vocabulary: int | None = None
    features: int | None = None
    outputs: int
    stream: bool = False
    sources: ClassVar[tuple[Source, ...]] = ()
    #: what one step is called in a sentence ("chord", "character")
    step_noun: str = "step"

    @abstractmethod
    def load(self, split: Split) -> Sequence[Example]:
        """Return the sequences of a split."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss in nats of every step, shape `(B, T)`, from `outputs` `(B, T, outputs)`."""


def shifted(sequence: Tensor) -> Example:
    """Return the example that predicts each element of a sequence from those before it."""
    return Example(sequence[:-1], sequence[1:])


def data_folder(given: Path | None = None) -> Path | None:
    """Return the folder the user keeps data in: the one given, else `UNRECURRENT_DATA`, else `None`."""
    import os

    if given is not None:
        return given
    named = os.environ.get("UNRECURRENT_DATA")
    return Path(named) if named else None
