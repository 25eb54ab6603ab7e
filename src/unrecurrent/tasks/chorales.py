"""The chorales of J. S. Bach that ship with music21, as piano rolls at quarter-note steps.

What is taken, how it is split and what is left out is described in docs/data.md.
"""

import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import IO

import numpy as np
import torch

from unrecurrent.errors import InputError
from unrecurrent.files import replacing
from unrecurrent.tasks import chorale_worker
from unrecurrent.tasks.polyphony import KEYS, LOWEST_PITCH, PolyphonicTask
from unrecurrent.tasks.task import SPLITS, Example, Split, cache_folder, drawn_by_name, shifted

#: raised whenever the rolls change for the same scores, so that no older cache is taken for a newer one
FORMAT = 1
#: music21's release the published numbers were made with, and the digest of what it gives (see `Rolls.digest`)
PUBLISHED = ("10.5.1", "54ee8c89824b936153cdd5435600c0e03c6870eaf6653cda6f8979ad6748e920")

SHARES: dict[Split, float] = {"train": 0.70, "valid": 0.15, "test": 0.15}
_SPLIT_SEED = "unrecurrent chorales 1"

#: settings that also appear under another number (at most transposed, or with a repeat written out): one is kept,
#: so that no test chorale is a training chorale
REPEATED = frozenset(
    [
        "bwv18.5-lz",
        "bwv20.7",
        "bwv59.3",
        "bwv112.5-sc",
        "bwv120.8-a",
        "bwv171.6",
        "bwv190.7-inst",
        "bwv197.7-a",
        "bwv227.1",
        "bwv245.37",
        "bwv248.35-3c",
        "bwv274",
        "bwv279",
        "bwv414",
    ]
)
#: movements in which instruments play whole bars between the lines, and a prelude
NOT_CHORALES = frozenset(["bwv79.3", "bwv248.9-1", "bwv248.23-2", "bwv248.42-4", "bwv248.64-6", "bwv846"])

Note = tuple[int, float, float]
Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class Rolls:
    """All chorales: their names, and for each a roll `(T, 88)` of uint8 zeros and ones."""

    names: tuple[str, ...]
    rolls: tuple[np.ndarray, ...]

    def digest(self) -> str:
        """Return the SHA-256 of names and rolls: the same on every machine for the same chorales."""
        running = hashlib.sha256()
        for name, roll in zip(self.names, self.rolls, strict=True):
            running.update(f"{name} {len(roll)}\n".encode())
            running.update(np.packbits(roll).tobytes())
        return running.hexdigest()


class Chorales(PolyphonicTask):
    """390 chorales of J. S. Bach, quarter-note steps, split 70 : 15 : 15 by chorale.

    The first `load` parses the scores inside the package music21 (extra `music`), in two processes with a progress
    bar on the error stream, and keeps the rolls in the user's cache folder.
    """

    name = "chorales"

    def __init__(self) -> None:
        """Read nothing yet."""
        self._splits: dict[Split, list[Example]] | None = None

    def load(self, split: Split) -> Sequence[Example]:
        """Return the chorales of a split.

        Raises:
            InputError: music21 is missing, the cache is damaged, or the cache folder cannot be written.
        """
        if self._splits is None:
            chorales = load_rolls()
            parts = split_names(chorales.names)
            examples = {
                name: shifted(torch.from_numpy(roll).float())
                for name, roll in zip(chorales.names, chorales.rolls, strict=True)
            }
            self._splits = {part: [examples[name] for name in parts[part]] for part in SPLITS}
        return self._splits[split]


def load_rolls(*, show_progress: bool = True) -> Rolls:
    """Return the chorales from the cache, or parse them and fill it.

    Raises:
        InputError: music21 is missing, the cache is damaged, or the cache folder cannot be written.
    """
    path = cache_path()
    if path.exists():
        return read_cache(path)
    make_folder(path.parent)
    chorales = parse_corpus(show_progress=show_progress)
    write_cache(path, chorales)
    return chorales


def music21_version() -> str:
    """Return the installed release of music21, whose scores these are."""
    try:
        return metadata.version("music21")
    except metadata.PackageNotFoundError as error:
        raise InputError(
            "the chorales are read from the package music21, which is not installed:"
            " run `pip install 'unrecurrent[music]'`"
        ) from error


def cache_path() -> Path:
    """Return where the parsed chorales are kept; another release of music21 has a file of its own."""
    return cache_folder() / f"chorales-{FORMAT}-music21-{music21_version()}.npz"


def make_folder(folder: Path) -> None:
    """Create the cache folder; raises `InputError` if that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"the cache folder {folder} cannot be made ({error.strerror}): set UNRECURRENT_CACHE to another one"
        ) from error


# --- the scores -------------------------------------------------------------------------------------------------


def corpus_files() -> list[Path]:
    """Return the scores that are parsed, by name."""
    music21_version()
    package = util.find_spec("music21")
    home = Path(next(iter(package.submodule_search_locations or ()))) if package else Path()
    folder = home / "corpus" / "bach"
    skipped = REPEATED | NOT_CHORALES
    files = sorted(
        (path for path in folder.glob("bwv*") if path.suffix in (".mxl", ".xml") and path.stem not in skipped),
        key=lambda path: path.stem,
    )
    if not files:
        raise InputError(
            f"music21 is installed without its scores ({folder} holds none):"
            " run `pip install --force-reinstall music21`"
        )
    return files


def parse_corpus(*, show_progress: bool = True) -> Rolls:
    """Parse every chorale with music21 in two processes; about 15 s on two cores."""
    files = corpus_files()
    with ExitStack() as stack:
        advance = stack.enter_context(_ProgressBar(len(files))).advance if show_progress else None
        notes = parse_files(files, advance=advance)
    rolls = {path.stem: to_roll(found) for path, found in notes.items()}
    names = tuple(sorted(rolls))
    return Rolls(names, tuple(rolls[name] for name in names))


def to_roll(notes: Iterable[Note]) -> np.ndarray:
    """Return the roll `(T, 88)`, uint8: step t holds the keys that sound at quarter note t of the score.

    A note from `start` up to, not including, `end` sounds at every whole quarter in between. Silence before the
    first and after the last chord is cut off; keys outside MIDI 21 … 108 do not occur on a piano and are dropped.

    >>> to_roll([(60, 0.0, 2.0), (64, 1.0, 1.5), (67, 1.5, 2.0)])[:, 60 - 21:].nonzero()  # C, then C and E
    (array([0, 1, 1]), array([0, 0, 4]))
    """
    cells = [
        (step, pitch - LOWEST_PITCH)
        for pitch, start, end in notes
        for step in range(math.ceil(round(start, 6)), math.ceil(round(end, 6)))
        if 0 <= pitch - LOWEST_PITCH < KEYS
    ]
    if not cells:
        return np.zeros((0, KEYS), np.uint8)
    steps, keys = np.array(cells).T
    roll = np.zeros((steps.max() - steps.min() + 1, KEYS), np.uint8)
    roll[steps - steps.min(), keys] = 1
    return roll


def split_names(names: Sequence[str]) -> dict[Split, list[str]]:
    """Return the names of each split: an order drawn once, cut at 70 and 85 per cent."""
    drawn = drawn_by_name(names, _SPLIT_SEED)
    first = round(SHARES["train"] * len(drawn))
    second = first + round(SHARES["valid"] * len(drawn))
    return {"train": drawn[:first], "valid": drawn[first:second], "test": drawn[second:]}


# --- two processes ----------------------------------------------------------------------------------------------


def parse_files(files: Sequence[Path], *, workers: int = 2, advance: Advance | None = None) -> dict[Path, list[Note]]:
    """Return the notes of each score, parsed by `workers` processes; `advance(done, total)` after each.

    Raises:
        InputError: music21 could not read a score.
    """
    by_size = sorted(files, key=lambda path: -path.stat().st_size)  # an even share of the long ones for everybody
    shares = [share for i in range(workers) if (share := by_size[i::workers])]
    answers: SimpleQueue[str | None] = SimpleQueue()
    notes: dict[Path, list[Note]] = {}
    with ExitStack() as stack:
        errors = [stack.enter_context(tempfile.TemporaryFile()) for _ in shares]
        processes = [stack.enter_context(_process(s, e)) for s, e in zip(shares, errors, strict=True)]
        readers = [Thread(target=_forward, args=(p.stdout, answers), daemon=True) for p in processes]
        for reader in readers:
            reader.start()
        stack.callback(_stop, processes, readers)
        for line in _lines(answers, len(processes)):
            path, found = json.loads(line)
            notes[Path(path)] = [(pitch, start, end) for pitch, start, end in found]
            if advance is not None:
                advance(len(notes), len(files))
        for process, share, error in zip(processes, shares, errors, strict=True):
            if process.wait() != 0:
                raise _failure(next(path for path in share if path not in notes), process.returncode, error)
    return notes


def _process(share: Sequence[Path], error: IO[bytes]) -> subprocess.Popen[str]:
    # -P: the folder of the worker holds modules called `text` and `task`, which must not shadow others
    command = [sys.executable, "-P", chorale_worker.__file__, *map(str, share)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=error, encoding="utf-8", env=_environment())


def _environment() -> dict[str, str]:
    # one thread each: two processes already fill two cores
    return os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def _forward(stream: IO[str] | None, answers: "SimpleQueue[str | None]") -> None:
    if stream is not None:
        for line in stream:
            if line.endswith("\n"):  # a worker that was killed leaves half a line
                answers.put(line)
    answers.put(None)


def _lines(answers: "SimpleQueue[str | None]", writers: int) -> Iterator[str]:
    while writers:
        line = answers.get()
        if line is None:
            writers -= 1
        else:
            yield line


def _stop(processes: Iterable[subprocess.Popen[str]], readers: Iterable[Thread]) -> None:
    for process in processes:
        process.terminate()
    for reader in readers:
        reader.join()


def _failure(path: Path, code: int, error: IO[bytes]) -> InputError:
    error.seek(0)
    lines = error.read().decode(errors="replace").strip().splitlines()
    reason = lines[-1] if lines else f"exit code {code}"
    return InputError(f"music21 could not read {path.name} ({reason}): run `pip install --force-reinstall music21`")


class _ProgressBar:
    """A bar on the error stream, so that the output of a command stays clean."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task("reading the chorales (once)", total=total)

    def __enter__(self) -> "_ProgressBar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)


# --- the cache --------------------------------------------------------------------------------------------------


def write_cache(path: Path, chorales: Rolls) -> None:
    """Write the compressed rolls and their digest, whole or not at all."""
    lengths = np.array([len(roll) for roll in chorales.rolls], np.int64)
    packed = np.packbits(np.concatenate(chorales.rolls), axis=1)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file, names=np.array(chorales.names), lengths=lengths, rolls=packed, digest=np.array(chorales.digest())
        )


def read_cache(path: Path) -> Rolls:
    """Return the chorales from a cache file.

    Raises:
        InputError: the file is damaged (its digest does not match); it is left as it is.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            names, lengths, packed, digest = (stored[key] for key in ("names", "lengths", "rolls", "digest"))
            rolls = np.unpackbits(packed, axis=1, count=KEYS)
            chorales = Rolls(tuple(names.tolist()), tuple(np.split(rolls, np.cumsum(lengths)[:-1])))
            intact = chorales.digest() == str(digest)
    except PermissionError as error:
        raise InputError(f"the cached chorales at {path} cannot be read ({error.strerror})") from error
    except Exception as error:  # a damaged archive fails in zipfile, zlib and numpy in a dozen ways
        raise _damaged(path) from error
    if not intact:
        raise _damaged(path)
    return chorales


def _damaged(path: Path) -> InputError:
    return InputError(
        f"the cached chorales at {path} are damaged: delete that file, and the next run reads the scores again"
    )
