"""What all character-level tasks share: one long stream a split, predicted character by character."""

import math
from pathlib import Path

from torch import Tensor
from torch.nn.functional import cross_entropy

from unrecurrent.errors import InputError
from unrecurrent.tasks.task import Metric, Task


class CharacterTask(Task):
    """Predict the next character of a text from those before it.

    A split is one stream of symbols `s_1 … s_N`; inputs are `s_1 … s_{N−1}`, targets `s_2 … s_N`, int64 `(N − 1,)`.
    The loss of a step is `−log p(s_{t+1})` in nats; the metric is its mean over all predicted characters divided by
    ln 2: bits a character (Mikolov et al. 2012, "Subword language modeling with neural networks").
    """

    metric = Metric("bpc", "lower", "bits a character", scale=1 / math.log(2))
    stream = True
    step_noun = "character"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the nats of every step `(B, T)` from logits `(B, T, V)` and symbols `(B, T)`.

        >>> import torch
        >>> from unrecurrent.tasks import get_task
        >>> get_task("ptb-char").loss(torch.zeros(1, 2, 50), torch.tensor([[7, 49]])).exp().round()
        tensor([[50., 50.]])
        """
        return cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def read_bytes(path: Path) -> bytes:
    """Return the content of a file; raises `InputError` if it cannot be read or is empty."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}: give the path of a text file") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give the path of a text file") from error
    if not content.strip():
        raise InputError(f"{path} is empty: give a file with text in it")
    return content
