"""New recordings from a model that was trained on waveforms."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unrecurrent.errors import InputError, is_whole
from unrecurrent.models import SequenceModel
from unrecurrent.tasks.digits import Digits
from unrecurrent.tasks.waveforms import LEVELS, RATE, SILENCE, write_wav


def sample_levels(
    model: SequenceModel, steps: int, *, digit: int | None = None, temperature: float = 1.0, seed: int = 0
) -> np.ndarray:
    """Return `steps` μ-law levels, int64, drawn one after another, each from the prediction after those before.

    The recording begins in silence. `digit` is what a model trained on `digits` is to say; one trained on `speech` is
    told nothing. Logits are divided by `temperature` before they are drawn from.

    Raises:
        InputError: a model that does not predict levels, a digit to a model that takes none or the other way round, or
            a setting out of range.
    """
    return sample_many(model, steps, [digit], temperature=temperature, seed=seed)[0]


@torch.no_grad()
def sample_many(
    model: SequenceModel, steps: int, digits: Sequence[int | None], *, temperature: float = 1.0, seed: int = 0
) -> np.ndarray:
    """Return a recording for each entry of `digits`, `(len(digits), steps)`, all drawn side by side."""
    for digit in digits:
        _check(model, digit)
    if not (is_whole(steps) and steps >= 1 and temperature > 0 and len(digits)):
        raise InputError(
            f"steps must be a whole number of at least 1, temperature above 0 and digits not empty, not {steps!r},"
            f" {temperature!r} and {list(digits)}"
        )
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    cache, levels, drawn = model.init_cache(len(digits)), torch.full((len(digits),), SILENCE), []
    for _ in range(steps):
        logits, cache = model.step(_heard(digits, levels).to(model.device), cache)
        logits = logits.double().cpu()
        chances = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
        levels = torch.multinomial(chances, 1, generator=generator)[:, 0]
        drawn.append(levels)
    return torch.stack(drawn, 1).numpy()


def _heard(digits: Sequence[int | None], levels: Tensor) -> Tensor:
    told = [Digits.inputs(digit, level[None]) for digit, level in zip(digits, levels, strict=True) if digit is not None]
    return torch.cat(told) if told else levels


def _check(model: SequenceModel, digit: int | None) -> None:
    vocabulary, features, outputs, _ = model.interface
    if outputs != LEVELS or (vocabulary, features) not in ((LEVELS, None), (None, Digits.features)):
        raise InputError("only a model trained on waveforms can be sampled from: train it on digits or speech")
    if features is not None and digit is None:
        raise InputError("this model was trained on digits: say which one it is to speak, such as digit=7")
    if features is None and digit is not None:
        raise InputError("this model was trained on speech and knows no digits: leave digit out")


def sample_wav(
    model: SequenceModel,
    path: str | Path,
    *,
    seconds: float = 0.5,
    digit: int | None = None,
    temperature: float = 1.0,
    seed: int = 0,
) -> None:
    """Write a recording drawn from a trained model as a wav file to listen to; arguments as for `sample_levels`.

    With a model trained on `digits`, loaded by `unrecurrent.checkpoint.load_model`, a seven:
    `sample_wav(model, "seven.wav", digit=7)`.
    """
    if not 0 < seconds < math.inf:
        raise InputError(f"seconds must be above 0 and finite, not {seconds}")
    steps = max(1, round(seconds * RATE))
    levels = sample_levels(model, steps, digit=digit, temperature=temperature, seed=seed)
    write_wav(Path(path), levels)
