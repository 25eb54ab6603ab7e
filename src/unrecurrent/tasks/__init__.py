"""Benchmark tasks by name."""

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from unrecurrent.errors import InputError
from unrecurrent.tasks.adding import AddingTask
from unrecurrent.tasks.atis import ATIS
from unrecurrent.tasks.chorales import Chorales
from unrecurrent.tasks.copy_memory import CopyTask
from unrecurrent.tasks.digits import Digits
from unrecurrent.tasks.generated import GeneratedTask
from unrecurrent.tasks.jsb import jsb_chorales
from unrecurrent.tasks.measured_series import F16, CascadedTanks, ETTh1
from unrecurrent.tasks.mnist import MNIST, PermutedMNIST
from unrecurrent.tasks.multi30k import Multi30k
from unrecurrent.tasks.musedata import musedata
from unrecurrent.tasks.nottingham import nottingham
from unrecurrent.tasks.piano import piano
from unrecurrent.tasks.ptb_char import PTBChar
from unrecurrent.tasks.series import PREFIX as _SERIES
from unrecurrent.tasks.series import SeriesFile
from unrecurrent.tasks.speech import Speech
from unrecurrent.tasks.task import SPLITS, Example, Metric, Source, Split, Task
from unrecurrent.tasks.text import TextTask
from unrecurrent.tasks.wmt14 import WMT14
from unrecurrent.tasks.words import PTB, BillionWord, WikiText2, WikiText103

__all__ = ["SPLITS", "Example", "Metric", "Source", "Split", "Task", "get_task", "task_names"]

_TEXT = "text:"
_TASKS: dict[str, Callable[[Path | None], Task]] = {
    "chorales": lambda data_dir: Chorales(),
    "jsb": jsb_chorales,
    "nottingham": nottingham,
    "musedata": musedata,
    "piano": piano,
    "ptb-char": PTBChar,
    "ptb": PTB,
    "wikitext-2": WikiText2,
    "wikitext-103": WikiText103,
    "billion-word": BillionWord,
    "ETTh1": ETTh1,
    "tanks": CascadedTanks,
    "F16": F16,
    "mnist": MNIST,
    "permuted-mnist": PermutedMNIST,
    "atis": ATIS,
    "multi30k": Multi30k,
    "wmt14": WMT14,
    "digits": Digits,
    "speech": Speech,
    "copy": lambda data_dir: CopyTask("copy"),
    "adding": lambda data_dir: AddingTask("adding"),
}
#: those whose name may be followed by a length
_GENERATED: dict[str, type[GeneratedTask]] = {"copy:": CopyTask, "adding:": AddingTask}


def task_names() -> list[str]:
    """Return the names of the benchmarks, in the order they are shown (files of the user's own are not among them).

    >>> task_names()[:2]
    ['chorales', 'jsb']
    """
    return list(_TASKS)


def get_task(name: str, *, data_dir: Path | None = None) -> Task:
    """Return the task of that name: one of `task_names()`, or a file of the user's own.

    The generated ones take a length, as in `copy:T=500`.
    Files are `text:FILE` and `series:FILE.csv`, the latter with options as in `series:FILE.csv?target=OT&horizon=24`.
    The files of a benchmark are looked for below `data_dir`, else below `UNRECURRENT_DATA`, else in the user's cache.
    A task reads them when it is loaded; a file of the user's own is read at once, for its vocabulary or columns.

    Raises:
        InputError: an unknown name (the message suggests the nearest), or a file that cannot be used.

    >>> get_task("jsb").metric.unit
    'nats a step'
    """
    if not isinstance(name, str):
        raise InputError(f"a task is given by its name, as in 'jsb' or 'text:FILE', not as {name!r}")
    if name.startswith(_TEXT):
        if name == _TEXT:
            raise InputError("the task text: needs a file: write text:FILE with the path of a UTF-8 text file")
        return TextTask(name.removeprefix(_TEXT))
    if name.startswith(_SERIES):
        return SeriesFile(name)
    for prefix, generated in _GENERATED.items():
        if name.startswith(prefix):
            return generated(name)
    if name in _TASKS:
        return _TASKS[name](data_dir)
    raise InputError(
        f"there is no task {name!r}: {_hint(name)}known tasks are {', '.join(_TASKS)}, text:FILE and series:FILE.csv"
    )


def _hint(name: str) -> str:
    folded = {known.lower(): known for known in _TASKS}
    near = [folded[found] for found in get_close_matches(name.lower(), folded, n=1)]
    if not near and Path(name).expanduser().is_file():
        near = [f"{_SERIES if Path(name).suffix.lower() == '.csv' else _TEXT}{name}"]
    return f"did you mean {near[0]!r}? " if near else ""
