"""What all character-level tasks share: one long stream a split, predicted character by character."""

import math
from pathlib import Path

from unrecurrent.errors import InputError
from unrecurrent.tasks.symbols import SymbolTask
from unrecurrent.tasks.task import Metric


class CharacterTask(SymbolTask):
    """Predict the next character of a text from those before it.

    A split is one stream of symbols `s_1 … s_N`; inputs are `s_1 … s_{N−1}`, targets `s_2 … s_N`, int64 `(N − 1,)`.
    The loss of a step is `−log p(s_{t+1})` in nats; the metric is its mean over all predicted characters divided by
    ln 2: bits a character (Mikolov et al. 2012, "Subword language modeling with neural networks").
    """

    metric = Metric("bpc", "lower", "bits a character", scale=1 / math.log(2))
    stream = True
    step_noun = "character"


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
