"""New recordings from a model that was trained on waveforms."""

from pathlib import Path

import numpy as np
import torch

from unrecurrent.errors import InputError
from unrecurrent.models import SequenceModel
from unrecurrent.tasks.waveforms import LEVELS, RATE, encode, write_wav

#: a stream of recordings begins in silence
SILENCE = int(encode(np.zeros(1))[0])


@torch.no_grad()
def sample_levels(
    model: SequenceModel, steps: int, *, start: int = SILENCE, temperature: float = 1.0, seed: int = 0
) -> np.ndarray:
    """Return `steps` μ-law levels, int64, drawn one after another, each from the prediction after those before.

    `start` is the first symbol read: for `digits` that of the digit (`Digits.start(7)`). Logits are divided by
    `temperature` before they are drawn from.

    Raises:
        InputError: a model that does not predict levels, or a setting out of range.
    """
    vocabulary, outputs = model.interface.vocabulary, model.interface.outputs
    if vocabulary is None or outputs != LEVELS:
        raise InputError("only a model trained on waveforms can be sampled from: train it on digits or speech")
    if not (0 <= start < vocabulary and steps >= 1 and temperature > 0):
        raise InputError(
            f"start must be one of the model's {vocabulary} symbols, steps at least 1 and temperature above 0,"
            f" not {start}, {steps} and {temperature}"
        )
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    cache, symbol, drawn = model.init_cache(1), torch.tensor([start]), []
    for _ in range(steps):
        logits, cache = model.step(symbol.to(model.device), cache)
        chances = (logits[0].double().cpu() / temperature).softmax(-1)
        symbol = torch.multinomial(chances, 1, generator=generator)
        drawn.append(int(symbol))
    return np.array(drawn, np.int64)


def sample_wav(
    model: SequenceModel,
    path: str | Path,
    *,
    seconds: float = 0.5,
    start: int = SILENCE,
    temperature: float = 1.0,
    seed: int = 0,
) -> None:
    """Write a recording drawn from a trained model as a wav file to listen to; arguments as for `sample_levels`.

    With a model trained on `digits`, loaded by `unrecurrent.checkpoint.load_model`, a seven:
    `sample_wav(model, "seven.wav", start=Digits.start(7))`.
    """
    levels = sample_levels(model, round(seconds * RATE), start=start, temperature=temperature, seed=seed)
    write_wav(Path(path), levels)
