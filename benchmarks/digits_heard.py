"""Can what a model says be understood? A classifier of real spoken digits hears digits drawn from trained models.

    unrecurrent compare digits --models lstm,wavenet …          # trains the models (results/README.md)
    python benchmarks/digits_heard.py --runs runs --listen runs/digits

The classifier is a support vector machine of scikit-learn on spectrograms, trained on the 400 real takes the models
were trained on; the 50 real takes of the test set say how well it hears. Each model speaks every digit `--takes` times,
each as long as the median real take of that digit. Records go to results/digits_heard.json: metric "recognised", per
cent, chance 10. With `--listen` the first take of each digit is kept as a wav file.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.signal import spectrogram
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from certificates import chosen_runs
from unrecurrent.checkpoint import load_model
from unrecurrent.models import parameter_count
from unrecurrent.records import Record, command_line, make_record, write_records
from unrecurrent.sampling import sample_many
from unrecurrent.tasks.digits import DIGITS, Digits
from unrecurrent.tasks.task import Split
from unrecurrent.tasks.waveforms import RATE, decode, write_wav

OUTPUT = Path(__file__).resolve().parent.parent / "results" / "digits_heard.json"
#: of the spectrogram: samples of a window, bands, and the frames a recording of any length is brought to
WINDOW, BANDS, FRAMES = 256, 32, 24
TEMPERATURE = 0.9


def features(levels: np.ndarray) -> np.ndarray:
    """Return a loudness for each band and moment of a recording, `(BANDS · FRAMES,)`."""
    _, _, power = spectrogram(decode(levels), RATE, nperseg=WINDOW, noverlap=WINDOW // 2)
    bands = np.add.reduceat(power[: 4 * BANDS], np.arange(0, 4 * BANDS, 4))
    loudness = np.log(bands + 1e-10)
    moments = np.linspace(0, loudness.shape[1] - 1, FRAMES)
    return np.concatenate([np.interp(moments, np.arange(loudness.shape[1]), band) for band in loudness])


def heard(recordings: Sequence[np.ndarray]) -> np.ndarray:
    """Return the features of recordings, one row each."""
    return np.stack([features(levels) for levels in recordings])


def takes(task: Digits, split: Split) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the recordings of a split and the digit each says."""
    examples = task.load(split)
    spoken = [int(example.inputs[0, 1:].argmax()) for example in examples]
    return [example.targets.numpy() for example in examples], np.array(spoken)


def classifier(recordings: Sequence[np.ndarray], spoken: np.ndarray) -> Pipeline:
    """Return a classifier trained on recordings."""
    return make_pipeline(StandardScaler(), SVC(C=10)).fit(heard(recordings), spoken)


def share_heard(listener: Pipeline, recordings: Sequence[np.ndarray], spoken: np.ndarray) -> float:
    """Return how many per cent of the recordings are heard as what they say."""
    return 100 * float(listener.score(heard(recordings), spoken))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--takes", type=int, default=20)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--listen", type=Path, help="keep the first take of each digit as a wav file in this folder")
    arguments = parser.parse_args()
    task = Digits()
    real, said = takes(task, "train")
    listener = classifier(real, said)
    lengths = [
        int(np.median([len(r) for r, d in zip(real, said, strict=True) if d == digit])) for digit in range(DIGITS)
    ]
    wanted = np.repeat(np.arange(DIGITS), arguments.takes)

    def record(model: str, share: float, count: int, **about: object) -> Record:
        about |= {"std": None, "metric": "recognised", "recordings": count}
        return make_record(task="digits", model=model, split="test", mean=share, command=command_line(), **about)

    held_out, held_said = takes(task, "test")
    share = share_heard(listener, held_out, held_said)
    records = [record("real takes", share, len(held_out), seeds=None)]
    for name, folders in chosen_runs(arguments.runs, task).items():
        model, _ = load_model(folders[0])
        drawn = sample_many(model, max(lengths), wanted.tolist(), temperature=TEMPERATURE)
        spoken = [levels[: lengths[digit]] for levels, digit in zip(drawn, wanted, strict=True)]
        share = share_heard(listener, spoken, wanted)
        about = {"seeds": 1, "params": parameter_count(model), "temperature": TEMPERATURE}
        records.append(record(name, share, len(spoken), **about))
        if arguments.listen is not None:
            arguments.listen.mkdir(parents=True, exist_ok=True)
            for digit in range(DIGITS):
                write_wav(arguments.listen / f"{name}-{digit}.wav", spoken[digit * arguments.takes])
    write_records(arguments.output, records)
    table = Table("who speaks", "recordings", "recognised, per cent (chance 10)")
    for each in records:
        table.add_row(each["model"], str(each["recordings"]), f"{each['mean']:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
