"""What a benchmark task is: sequences to predict, how they are scored, and where the data come from."""

import math
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor

from unrecurrent.digests import tensor_digest
from unrecurrent.errors import InputError

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
#: beyond this the exponential of a loss is no number worth having
_MOST_NATS = 700.0


@dataclass(frozen=True)
class Metric:
    """The number a task is judged by, in `unit`: `scale` times the mean loss a step, or `exponential`, exp of it.

    >>> Metric("bpc", "lower", "bits a character", scale=1.4427).of(2.0)
    2.8854
    >>> round(Metric("ppl", "lower", "perplexity", exponential=True).of(4.6), 1)
    99.5
    """

    name: str
    direction: Literal["lower", "higher"]
    unit: str
    scale: float = 1.0
    exponential: bool = False

    def of(self, loss: float) -> float:
        """Return the metric of a mean loss in nats a step."""
        return math.exp(min(loss, _MOST_NATS)) if self.exponential else self.scale * loss


@dataclass(frozen=True)
class Source:
    """One file of a data set: its name below the data folder, its public home, and what it must contain.

    Where `member` is set, `url` is a zip or a gzipped tar archive and the file is that member of it; where `by_hand` is
    set, `url` is the page on which a reader finds the file.
    """

    path: str
    url: str
    sha256: str
    licence: str
    member: str | None = None
    by_hand: bool = False


class Example(NamedTuple):
    """One sequence: `inputs` `(T,)` symbols or `(T, D)` features, `targets` with the same first axis."""

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
    #: predictions are one of so many symbols that the logits of a whole batch are never made at once
    large_vocabulary: bool = False
    sources: tuple[Source, ...] = ()
    #: what one step is called in a sentence ("chord", "character")
    step_noun: str = "step"

    @property
    def scales(self) -> dict[str, list[float]] | None:
        """The `mean` and `std` that inputs in their own units are standardised by (`None`: they are not)."""
        return None

    @abstractmethod
    def load(self, split: Split) -> Sequence[Example]:
        """Return the sequences of a split."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss in nats of every step, shape `(B, T)`, from `outputs` `(B, T, outputs)`."""

    def digest(self) -> str:
        """Return a SHA-256 over all splits: what was trained on other data is not the same training."""
        examples = ((split, example) for split in SPLITS for example in self.load(split))
        return tensor_digest((split, tensor) for split, example in examples for tensor in example)


def shifted(sequence: Tensor) -> Example:
    """Return the example that predicts each element of a sequence from those before it."""
    return Example(sequence[:-1], sequence[1:])


def data_folder(given: Path | None = None) -> Path:
    """Return the folder data sets live in: the one given, else `UNRECURRENT_DATA`, else `data` in the cache.

    >>> data_folder(Path("mine")).name
    'mine'
    """
    if given is not None:
        return given
    named = os.environ.get("UNRECURRENT_DATA")
    return Path(named).expanduser() if named else cache_folder() / "data"


def cache_folder() -> Path:
    """Return the user's cache folder: `UNRECURRENT_CACHE` if set, else where the platform keeps caches."""
    named = os.environ.get("UNRECURRENT_CACHE")
    if named:
        return Path(named).expanduser()
    if os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "unrecurrent"


def missing(task: str, path: Path) -> InputError:
    """Return the error for a data file that is not there, which says how to get it and where to put it."""
    return InputError(
        f"the data of {task!r} are missing: run `unrecurrent data get {task}`, or put the file at {path}"
        " (another folder: --data-dir or UNRECURRENT_DATA)"
    )
