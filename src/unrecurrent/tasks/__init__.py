"""Benchmark tasks by name."""

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from unrecurrent.errors import InputError
from unrecurrent.tasks.chorales import Chorales
from unrecurrent.tasks.jsb import jsb_chorales
from unrecurrent.tasks.ptb_char import PTBChar
from unrecurrent.tasks.task import SPLITS, Example, Metric, Source, Split, Task
from unrecurrent.tasks.text import TextTask

__all__ = ["SPLITS", "Example", "Metric", "Source", "Split", "Task", "get_task", "task_names"]

_TEXT = "text:"
_TASKS: dict[str, Callable[[Path | None], Task]] = {
    "chorales": lambda data_dir: Chorales(),
    "jsb": jsb_chorales,
    "ptb-char": PTBChar,
}


def task_names() -> list[str]:
    """Return the names of the benchmarks, in the order they are shown (`text:FILE` is not among them).

    >>> task_names()[:2]
    ['chorales', 'jsb']
    """
    return list(_TASKS)


def get_task(name: str, *, data_dir: Path | None = None) -> Task:
    """Return the task of that name: one of `task_names()`, or `text:FILE` for a text file of the user's own.

    The files of a benchmark are looked for below `data_dir`, else below `UNRECURRENT_DATA`, else in the user's cache.
    A task reads them when it is loaded; a text file is read at once, for its vocabulary.

    Raises:
        InputError: an unknown name (the message suggests the nearest), or a text file that cannot be used.

    >>> get_task("jsb").metric.unit
    'nats a step'
    """
    if name.startswith(_TEXT):
        if name == _TEXT:
            raise InputError("the task text: needs a file: write text:FILE with the path of a UTF-8 text file")
        return TextTask(name.removeprefix(_TEXT))
    if name in _TASKS:
        return _TASKS[name](data_dir)
    raise InputError(f"there is no task {name!r}: {_hint(name)}known tasks are {', '.join(_TASKS)} and text:FILE")


def _hint(name: str) -> str:
    near = get_close_matches(name.lower(), _TASKS, n=1)
    if not near and Path(name).expanduser().is_file():
        near = [f"{_TEXT}{name}"]
    return f"did you mean {near[0]!r}? " if near else ""
