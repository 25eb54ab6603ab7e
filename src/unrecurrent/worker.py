"""One training job in a process of its own: `python -m unrecurrent.worker JOB.json`.

The process gives the job its own threads and an honest peak of memory. Progress goes to stdout, a JSON object
a line; the result is written to `result.json` in the job's folder.
"""

import fcntl
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from unrecurrent.errors import Diverged, InputError
from unrecurrent.files import write_text
from unrecurrent.models import parameter_count
from unrecurrent.tasks import get_task
from unrecurrent.training import TrainingConfig, TrainingRun, assess

RESULT = "result.json"
RESULT_KEYS = {"model", "seed", "parameters", "valid_loss", "test_loss", "tokens", "minutes", "history"}
#: seconds between two lines of progress
REPORT_EVERY = 0.25


@dataclass(frozen=True)
class Job:
    """A model to train on a task and to score on its validation and test data."""

    task: str
    data_dir: str | None
    model: str
    settings: dict[str, Any]
    training: TrainingConfig
    folder: str
    threads: int = 1
    device: str = "cpu"

    @property
    def result_path(self) -> Path:
        return Path(self.folder) / RESULT

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Job":
        fields = json.loads(text)
        return cls(**{**fields, "training": TrainingConfig(**fields["training"])})


def run_job(job: Job) -> dict[str, Any]:
    """Train (or resume) the job and return its result; one that another process finished meanwhile is read."""
    with _alone(Path(job.folder)):
        if not job.result_path.exists():
            try:
                result = _train(job)
            except Diverged as error:
                result = {"diverged": str(error)}
            write_text(job.result_path, json.dumps(result))
    return read_result(job)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process works in the folder; the lock goes with the process, however it ends."""
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def read_result(job: Job) -> dict[str, Any]:
    """Return the result of a finished job, and in `folder` where it lies."""
    try:
        result = json.loads(job.result_path.read_text(encoding="utf-8"))
        if "diverged" not in result and not set(result) >= RESULT_KEYS:
            raise ValueError("missing keys")
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{job.result_path} is damaged: delete the folder to train again") from error
    return {**result, "folder": job.folder}


def _train(job: Job) -> dict[str, Any]:
    torch.set_num_threads(job.threads)
    task = get_task(job.task, data_dir=Path(job.data_dir) if job.data_dir else None)
    run = TrainingRun(task, job.model, job.settings, job.training, Path(job.folder), job.device)
    model = run.run(_Printer())
    return {
        "model": job.model,
        "seed": job.training.seed,
        "parameters": parameter_count(model),
        **assess(model, task, task.load("valid")).named("valid"),
        **assess(model, task, task.load("test")).named("test"),
        "epochs": min(run.progress.epoch, job.training.epochs),
        "best_epoch": run.progress.best_epoch,
        "tokens": run.progress.tokens,
        "minutes": run.progress.seconds / 60,
        "peak_memory_mib": peak_memory_mib(),
        "history": run.progress.history,
    }


def peak_memory_mib() -> float | None:
    """Return the largest resident memory this process has had, in MiB (`None` where the system does not say).

    Linux keeps it as VmHWM. `getrusage` would not do: its figure survives the start of a program, and so would be at
    least that of the process that started this one.
    """
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    peaks = [int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM")]
    return peaks[0] if peaks else None


class _Printer:
    """Prints progress a few times a second."""

    def __init__(self) -> None:
        self.last = 0.0

    def __call__(self, state: dict[str, Any]) -> None:
        if state["finished"] or time.monotonic() - self.last > REPORT_EVERY:
            self.last = time.monotonic()
            print(json.dumps(state), flush=True)


def main() -> int:
    """Run the job named on the command line; an error a user should read goes to stderr, exit code 2."""
    try:
        run_job(Job.from_json(Path(sys.argv[1]).read_text(encoding="utf-8")))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"cannot write to the folder of the runs ({error.strerror}): mend that and run again", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
