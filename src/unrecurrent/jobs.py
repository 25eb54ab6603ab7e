"""Training jobs side by side: one process each, one thread each, with progress, resumable."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from unrecurrent.errors import InputError
from unrecurrent.files import make_folder, write_text
from unrecurrent.progress import Update, progress_bars, updater
from unrecurrent.worker import Job, read_result

JOB = "job.json"


def job_folder(root: Path, label: str, fingerprint: str) -> Path:
    """Return a folder of its own for a job: its label, and a digest of all that decides its outcome."""
    digest = hashlib.sha256(fingerprint.encode()).hexdigest()[:10]
    return root / f"{re.sub('[^A-Za-z0-9.=-]+', '_', label)}-{digest}"


class _Processes:
    """The training processes under way; once stopped, none is started any more."""

    def __init__(self) -> None:
        self._lock, self._running, self._stopped = threading.Lock(), set[subprocess.Popen[str]](), False

    def start(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen[str] | None:
        """Start a process, or return `None` after `stop`."""
        with self._lock:
            if self._stopped:
                return None
            pipe = subprocess.PIPE
            process = subprocess.Popen(
                command, stdout=pipe, stderr=pipe, stdin=subprocess.DEVNULL, text=True, env=environment
            )
            self._running.add(process)
            return process

    def ended(self, process: subprocess.Popen[str]) -> None:
        with self._lock:
            self._running.discard(process)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()


def run_jobs(jobs: Sequence[Job], labels: Sequence[str], *, quiet: bool = False) -> list[dict[str, Any]]:
    """Run jobs in as many processes as there are cores; return their results in order.

    A job whose result is on disk already is not run again; one that was interrupted resumes. A training that diverged
    has a result with the key `diverged` and its message; any other says in `folder` where its checkpoint lies.

    Raises:
        InputError: a job failed; the message is the job's own, and the others are stopped.
    """
    workers = max(1, (os.cpu_count() or 1) // max(job.threads for job in jobs)) if jobs else 1
    processes = _Processes()
    with progress_bars(quiet) as progress, ThreadPoolExecutor(workers) as pool:
        bars = [progress.add_task(label, total=1.0, start=False, info="waiting") for label in labels]
        pairs = zip(jobs, bars, strict=True)
        futures = [pool.submit(_run, job, updater(progress, bar), processes) for job, bar in pairs]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            return [future.result() for future in futures]
        except BaseException:
            processes.stop()
            raise


def refuse_diverged(results: Sequence[dict[str, Any]]) -> None:
    """Raise the `InputError` of the first training that diverged, if one did."""
    for result in results:
        if "diverged" in result:
            raise InputError(result["diverged"])


def _run(job: Job, update: Update, processes: _Processes) -> dict[str, Any]:
    if not job.result_path.exists():
        _run_process(job, update, processes)
    result = read_result(job)
    if "diverged" not in result:
        rate = result["tokens"] / max(1e-9, 60 * result["minutes"])
        update({"fraction": 1.0, "loss": result["valid_loss"], "tokens_per_s": rate})
    return result


#: glibc keeps large blocks it has had, which a training step asks for again and again: without this the pages of each
#: are made anew, a third of the time of a step over a large vocabulary
MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}


def _run_process(job: Job, update: Update, processes: _Processes) -> None:
    folder = Path(job.folder)
    make_folder(folder)
    write_text(folder / JOB, job.to_json())
    environment = {**MEMORY, **os.environ, "OMP_NUM_THREADS": str(job.threads)}
    process = processes.start([sys.executable, "-m", "unrecurrent.worker", str(folder / JOB)], environment)
    if process is None:
        raise CancelledError
    with process:
        complaints = _follow(process, update)
    processes.ended(process)
    if process.returncode == 2 and complaints:
        raise InputError(complaints.strip().splitlines()[-1])
    if process.returncode:
        code = process.returncode
        raise RuntimeError(f"the training process of {job.model!r} ended with code {code}:\n{complaints}")


def _follow(process: subprocess.Popen[str], update: Update) -> str:
    """Pass the progress on until the process ends; return what it complained about."""
    assert process.stdout is not None
    assert process.stderr is not None
    complaints: list[str] = []
    reader = threading.Thread(target=complaints.extend, args=(process.stderr,))
    reader.start()
    for line in process.stdout:
        update(json.loads(line))
    reader.join()
    return "".join(complaints)
