"""Benchmark tasks by name."""

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path

from unrecurrent.errors import InputError
from unrecurrent.tasks.chorales import Chorales
from unrecurrent.tasks.jsb import jsb
from unrecurrent.tasks.task import SPLITS, Example, Metric, Source, Split, Task

__all__ = ["SPLITS", "Example", "Metric", "Source", "Split", "Task", "get_task", "task_names"]

_TASKS: dict[str, Callable[[Path | None], Task]] = {
    "chorales": lambda data_dir: Chorales(),
    "jsb": jsb,
}


def task_names() -> list[str]:
    """Return the names `get_task` knows, in the order they are shown.

    >>> "jsb" in task_names()
    True
    """
    return list(_TASKS)


def get_task(name: str, *, data_dir: Path | None = None) -> Task:
    """Return the task of that name; its files are looked for below `data_dir`, else the user's data folder.

    Raises `InputError` for an unknown name, with the nearest known one.

    >>> get_task("jsb").metric.unit
    'nats a step'
    """
    if name in _TASKS:
        return _TASKS[name](data_dir)
    near = get_close_matches(name.lower(), task_names(), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise InputError(f"there is no task {name!r}: {hint}known tasks are {', '.join(task_names())}")
