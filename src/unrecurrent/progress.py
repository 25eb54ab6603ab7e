"""Progress bars on stderr, with loss, speed and time left."""

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

Update = Callable[[dict[str, Any]], None]


def progress_bars(quiet: bool = False) -> Progress:
    """Return the bars; `quiet` shows none. Add a task with `info=''` for each."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[info]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=quiet,
    )


def updater(progress: Progress, bar: TaskID) -> Update:
    """Return what moves a bar: call it with the `fraction` done, the `loss` and `tokens_per_s`."""
    started = False

    def update(state: dict[str, Any]) -> None:
        nonlocal started
        if not started:
            progress.start_task(bar)
            started = True
        info = f"loss {state['loss']:.3f}  {state['tokens_per_s']:,.0f} tokens/s"
        progress.update(bar, completed=state["fraction"], info=info)

    return update
