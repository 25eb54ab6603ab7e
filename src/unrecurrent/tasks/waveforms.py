"""What the tasks on sound share: 8-bit μ-law samples, predicted one after another, and files one can listen to."""

import math
import wave
from pathlib import Path

import numpy as np

from unrecurrent.errors import InputError
from unrecurrent.files import replacing
from unrecurrent.tasks.symbols import SymbolTask
from unrecurrent.tasks.task import Metric

#: samples a second, and the loudest value of a 16-bit sample
RATE, LOUDEST = 8_000, 32_768
#: levels of a sample, and the μ of its companding
LEVELS, MU = 256, 255


class WaveformTask(SymbolTask):
    """Predict the next sample of a recording, one of 256 levels of 8-bit μ-law at 8 kHz, from those before it.

    The metric is the mean of `−log₂ p` over all samples: bits a sample (van den Oord et al. 2016, "WaveNet").
    """

    metric = Metric("bits_per_sample", "lower", "bits a sample", scale=1 / math.log(2))
    vocabulary: int | None = LEVELS
    outputs = LEVELS
    step_noun = "sample"


def encode(samples: np.ndarray) -> np.ndarray:
    """Return the μ-law level 0 … 255 of samples in [−1, 1]: `sign(x) ln(1 + μ|x|) / ln(1 + μ)`, in equal steps.

    >>> encode(np.array([-1.0, 0.0, 0.01, 1.0])).tolist()
    [0, 128, 157, 255]
    """
    folded = np.sign(samples) * np.log1p(MU * np.abs(samples)) / math.log1p(MU)
    return ((folded + 1) / 2 * MU + 0.5).astype(np.int64)


#: the level of silence, in which a recording begins
SILENCE = int(encode(np.zeros(1))[0])


def decode(levels: np.ndarray) -> np.ndarray:
    """Return the sample in [−1, 1] in the middle of each μ-law level.

    >>> bool((encode(decode(np.arange(256))) == np.arange(256)).all())
    True
    """
    folded = 2 * levels / MU - 1
    return np.sign(folded) * np.expm1(np.abs(folded) * math.log1p(MU)) / MU


def read_wav(path: Path) -> np.ndarray:
    """Return the μ-law levels of a recording, int64 `(T,)`.

    Raises:
        InputError: the file is damaged, cut short, empty, or not 16 bits mono at 8 kHz.
    """
    try:
        with path.open("rb") as content, wave.open(content, "rb") as file:
            form = (file.getnchannels(), file.getsampwidth(), file.getframerate())
            frames, held = file.getnframes(), file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise InputError(f"{path} is no readable wav file (damaged or cut short): get it again") from error
    if form != (1, 2, RATE):
        raise InputError(f"{path} is not a recording of 16 bits, mono, at {RATE:,} Hz: convert it")
    if not frames or len(held) != 2 * frames:
        raise InputError(f"{path} says {frames:,} samples but holds {len(held) // 2:,}: get it again")
    return encode(np.frombuffer(held, "<i2") / LOUDEST)


def write_wav(path: Path, levels: np.ndarray) -> None:
    """Write μ-law levels as a wav file of 16 bits, mono, at 8 kHz; raises `InputError` where that cannot be done."""
    samples = np.clip(np.rint(decode(levels) * LOUDEST), -LOUDEST, LOUDEST - 1).astype("<i2")
    with replacing(path) as temporary, temporary.open("wb") as out, wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples.tobytes())
