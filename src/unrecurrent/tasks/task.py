"""What a benchmark task is: sequences to predict, how they are scored, and where the data come from."""

import math
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from unrecurrent.digests import tensor_digest, text_digest
from unrecurrent.errors import InputError

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
#: beyond this the exponential of a loss is no number worth having
_MOST_NATS = 700.0


@dataclass(frozen=True)
class Metric:
    """The number a task is judged by, in `unit`: `scale` times the mean loss a step, or `exponential`, exp of it.

    With `of_predictions` it is no function of the loss: `Task.judge` computes it from what was predicted.

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
    of_predictions: bool = False

    def of(self, loss: float) -> float:
        """Return the metric of a mean loss in nats a step; where predictions are judged, the loss itself."""
        return math.exp(min(loss, _MOST_NATS)) if self.exponential else self.scale * loss

    def read(self, scores: Mapping[str, float], split: str) -> float:
        """Return the metric of a split from `{split}_loss` and, where predictions are judged, `{split}_metric`.

        >>> accuracy = Metric("acc", "higher", "percent", of_predictions=True)
        >>> accuracy.read({"test_loss": 0.1, "test_metric": 97.0}, "test")
        97.0
        """
        return scores[f"{split}_metric"] if self.of_predictions else self.of(scores[f"{split}_loss"])


@dataclass(frozen=True)
class Source:
    """One file of a data set: its name below the data folder, its public home, and what it must contain.

    Where `member` is set, `url` is a zip or a gzipped tar archive and the file is that member of it; where `by_hand` is
    set, `url` is the page on which a reader finds the file. Where `packed` is set, `sha256` is that of the content of a
    gzip file, which differs with the program that wrote it.

    With `files` above 1 it is so many files at once: the last parts of `path` and `member` are patterns such as
    `*.wav`, and `sha256` is that of what `LC_ALL=C sha256sum PATTERN` prints in their folder.
    """

    path: str
    url: str
    sha256: str
    licence: str
    member: str | None = None
    by_hand: bool = False
    packed: bool = False
    files: int = 1

    def found(self, root: Path) -> list[Path]:
        """Return the files that are there below a data folder, by name."""
        path = root / self.path
        return sorted(path.parent.glob(path.name)) if self.files > 1 else [path] * path.is_file()


class Example(NamedTuple):
    """One sequence: `inputs` `(T,)` symbols or `(T, D)` features, `targets` with the same first axis."""

    inputs: Tensor
    targets: Tensor


class Write(Protocol):
    """What a model writes after each of the prompts `(N, M)`: symbols up to `end`, at most so many, none forbidden."""

    def __call__(self, prompts: Tensor, *, end: int, most: int, forbidden: tuple[int, ...] = ()) -> list[list[int]]: ...


class Task(ABC):
    """A benchmark: `load` gives sequences, `loss` scores predictions, `metric` names the number reported.

    Exactly one of `vocabulary` (inputs are symbols `0 … vocabulary − 1`) and `features` (inputs are real
    vectors of that width) is set; `outputs` is the width of the prediction. A task whose splits are one long
    sequence each is a stream (`stream = True`): it is trained with carried state over consecutive pieces.

    A task may count some steps only (`mask`), as one that asks for a single answer at the end does, and may be judged
    by what is predicted (`judge`) where its metric is no function of the loss.
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
    #: drawn from a seed rather than read from files
    generated: bool = False
    #: what one step is called in a sentence ("chord", "character")
    step_noun: str = "step"
    #: the symbol between what is read and what is written, of a task in two parts
    separator: int | None = None
    #: judged by what a model writes after the separator (`judge_written`), not by single predictions
    writes: bool = False
    #: the best epoch is the one with the best validation metric, not the one with the lowest validation loss
    selected_by_metric: bool = False

    @property
    def scales(self) -> dict[str, list[float]] | None:
        """The `mean` and `std` that inputs in their own units are standardised by (`None`: they are not)."""
        return None

    @property
    def chance(self) -> float | None:
        """The metric, on test data, of the best answer that reads nothing (`None`: not known)."""
        return None

    @abstractmethod
    def load(self, split: Split) -> Sequence[Example]:
        """Return the sequences of a split."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss in nats of every step, shape `(B, T)`, from `outputs` `(B, T, outputs)`."""

    def mask(self, example: Example) -> Tensor | None:
        """Return which steps of a sequence count, bool `(T,)`; `None` for every sequence: all do, as in a stream."""
        return None

    def judge(self, predicted: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
        """Return the metric from the most probable symbol and the right one at the steps that count.

        Both hold one tensor a sequence. Only asked where `metric.of_predictions` says so.
        """
        raise NotImplementedError

    def judge_written(self, write: Write, examples: Sequence[Example]) -> float:
        """Return the metric of what is written after the separator of each example, where the task `writes`."""
        raise NotImplementedError

    def criterion(self, scores: Mapping[str, float]) -> float:
        """Return what training and tuning keep the least of: the validation loss, or the metric where stated."""
        if not self.selected_by_metric:
            return scores["valid_loss"]
        return (1 if self.metric.direction == "lower" else -1) * self.metric.read(scores, "valid")

    def digest(self) -> str:
        """Return a SHA-256 over all splits: what was trained on other data is not the same training."""
        examples = ((split, example) for split in SPLITS for example in self.load(split))
        return tensor_digest((split, tensor) for split, example in examples for tensor in example)


def shifted(sequence: Tensor) -> Example:
    """Return the example that predicts each element of a sequence from those before it."""
    return Example(sequence[:-1], sequence[1:])


def drawn_by_name(names: Sequence[str], seed: str) -> list[str]:
    """Return names in the order of their hashes with a seed: a draw that no release of any library changes.

    >>> drawn_by_name(["a", "b", "c"], "chorales")
    ['b', 'c', 'a']
    """
    return sorted(names, key=lambda name: text_digest(f"{seed} {name}"))


def last_step(example: Example) -> Tensor:
    """Return the mask of a task that asks for one answer, after the whole sequence.

    >>> last_step(Example(torch.zeros(3, 1), torch.zeros(3)))
    tensor([False, False,  True])
    """
    return torch.arange(len(example.inputs)) == len(example.inputs) - 1


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the squared error of every step, `(B, T)`, averaged over what is predicted there, `(B, T, outputs)`."""
    return (outputs - targets).square().mean(-1)


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
