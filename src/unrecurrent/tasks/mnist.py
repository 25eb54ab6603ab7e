"""Handwritten digits read pixel by pixel: `mnist` and `permuted-mnist`, 784 steps and one answer (Le et al. 2015)."""

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unrecurrent.digests import tensor_digest
from unrecurrent.errors import InputError
from unrecurrent.tasks.symbols import ACCURACY, SymbolTask
from unrecurrent.tasks.task import SPLITS, Example, Source, Split, data_folder, last_step, missing

_HOME = "https://ossci-datasets.s3.amazonaws.com/mnist"
#: of what is packed: gzip files differ with the program that wrote them
_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
SIDE, CLASSES = 28, 10
#: the last twelfth of the 60,000 training images validates: 5,000
VALID_SHARE = 12


class MNIST(SymbolTask):
    """Which digit is it? Read row by row, one pixel in [0, 1] a step; 55,000 / 5,000 / 10,000 images.

    Inputs float32 `(784, 1)`; the answer is given at the last step, the only one that counts. The loss is its
    cross-entropy, the metric the share of right answers. Published test accuracies: TCN 99.0, LSTM 87.2, RNN 21.5 (Bai,
    Kolter and Koltun 2018, table 1).
    """

    name = "mnist"
    metric = ACCURACY
    features = 1
    outputs = CLASSES
    step_noun = "pixel"
    sources = tuple(
        Source(f"mnist/{file}.gz", f"{_HOME}/{file}.gz", sha256, "CC BY-SA 3.0", packed=True)
        for file, sha256 in _SHA256.items()
    )
    #: the order in which the pixels are read
    order: np.ndarray = np.arange(SIDE * SIDE)

    def __init__(self, data_dir: Path | None = None) -> None:
        """`load` looks for the files below `data_dir`, else in the user's data folder."""
        self.data_dir = data_dir

    @property
    def chance(self) -> float:
        """The share of the most frequent digit, in percent."""
        labels = self._split("test")[1]
        return 100 * float(np.bincount(labels).max()) / len(labels)

    def load(self, split: Split) -> Sequence[Example]:
        """Return the images of a split; raises `InputError` if a file is missing or holds something else."""
        images, labels = self._split(split)
        pixels = torch.from_numpy(images.reshape(-1, SIDE * SIDE)[:, self.order]).float()[..., None] / 255
        answers = torch.from_numpy(labels).long()
        return [Example(x, y.expand(len(x))) for x, y in zip(pixels, answers, strict=True)]

    def digest(self) -> str:
        """Return a fingerprint of images, labels and order, read as bytes."""
        arrays = ((split, array) for split in SPLITS for array in self._split(split))
        named = ((name, torch.from_numpy(array)) for name, array in arrays)
        return tensor_digest([("order", torch.from_numpy(self.order)), *named])

    def _split(self, split: Split) -> tuple[np.ndarray, np.ndarray]:
        """Return images `(N, 28, 28)` and labels `(N,)` of a split, uint8."""
        stem = "t10k" if split == "test" else "train"
        images = self._read(f"{stem}-images-idx3-ubyte", (SIDE, SIDE))
        labels = self._read(f"{stem}-labels-idx1-ubyte", ())
        if len(images) != len(labels) or not len(images):
            raise InputError(
                f"the {stem} files of MNIST hold {len(images)} images but {len(labels)} labels: get them again"
            )
        if labels.max() >= CLASSES:
            raise InputError(f"the {stem} labels of MNIST hold {labels.max()}, which is no digit: get the file again")
        cut = len(images) - len(images) // VALID_SHARE
        part = {"train": slice(cut), "valid": slice(cut, None), "test": slice(None)}[split]
        return images[part], labels[part]

    def mask(self, example: Example) -> Tensor:
        return last_step(example)

    def _read(self, file: str, shape: tuple[int, ...]) -> np.ndarray:
        path = data_folder(self.data_dir) / f"mnist/{file}.gz"
        if not path.is_file():
            raise missing(self.name, path)
        return read_idx(path, shape)


class PermutedMNIST(MNIST):
    """The same with the pixels in one fixed random order, the same for everybody: neighbours are no longer near.

    Published test accuracies: TCN 97.2, LSTM 85.7, RNN 25.3 (Bai, Kolter and Koltun 2018, table 1), with another order.
    """

    name = "permuted-mnist"
    #: NumPy's older generator, whose numbers are the same in every release (NEP 19)
    order = np.random.RandomState(0).permutation(SIDE * SIDE)


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Return the bytes in a gzipped idx file of any number of items of this shape, uint8 `(N, *shape)`.

    Raises:
        InputError: the file is damaged, cut short, or holds items of another shape.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} is no whole gzip file (damaged or cut short): get it again") from error
    start = 4 * (2 + len(shape))
    header = np.frombuffer(content[:start], ">i4")
    # the first number says that bytes follow, in so many dimensions
    if len(content) < start or header[0] != 0x0800 + 1 + len(shape) or tuple(header[2:]) != shape:
        raise InputError(f"{path} is no idx file of bytes of shape (N, {', '.join(map(str, shape))}): get it again")
    if len(content) - start != header[1] * math.prod(shape):
        raise InputError(f"{path} holds another number of bytes than it says: get it again")
    # a copy: torch wants memory that may be written to
    return np.frombuffer(content, np.uint8, offset=start).reshape(-1, *shape).copy()
