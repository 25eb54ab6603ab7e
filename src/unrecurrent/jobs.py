"""Training jobs side by side: one process each, one thread each, with progress, resumable."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from unrecurrent.errors import InputError
from unrecurrent.files import write_text
from unrecurrent.progress import Update, progress_bars, updater
from unrecurrent.worker import Job

JOB = "job.json"


def job_folder(root: Path, label: str, fingerprint: str) -> Path:
    """Return a folder of its own for a job: its label, and a digest of all that decides its outcome."""
    digest = hashlib.sha256(fingerprint.encode()).hexdigest()[:10]
    return root / f"{re.sub('[^A-Za-z0-9.=-]+', '_', label)}-{digest}"


def run_jobs(jobs: Sequence[Job], labels: Sequence[str], *, quiet: bool = False) -> list[dict[str, Any]]:
    """Run jobs in as many processes as there are cores; return their results in order.

    A job whose result is on disk already is not run again; one that was interrupted resumes.

    Raises:
        InputError: a job failed; the message is the job's own.
    """
    workers = max(1, (os.cpu_count() or 1) // max(job.threads for job in jobs)) if jobs else 1
    running: set[subprocess.Popen[str]] = set()
    with progress_bars(quiet) as progress, ThreadPoolExecutor(workers) as pool:
        bars = [progress.add_task(label, total=1.0, start=False, info="waiting") for label in labels]
        futures = [pool.submit(_run, job, updater(progress, bar), running) for job, bar in zip(jobs, bars, strict=True)]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            for process in list(running):
                process.terminate()
            raise


def _run(job: Job, update: Update, running: set[subprocess.Popen[str]]) -> dict[str, Any]:
    if not job.result_path.exists():
        _run_process(job, update, running)
    result = json.loads(job.result_path.read_text(encoding="utf-8"))
    update({"fraction": 1.0, "loss": result["valid_loss"], "tokens_per_s": _rate(result)})
    return result


def _rate(result: dict[str, Any]) -> float:
    return result["tokens"] / max(1e-9, 60 * result["minutes"])


def _run_process(job: Job, update: Update, running: set[subprocess.Popen[str]]) -> None:
    folder = Path(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / JOB, job.to_json())
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads)}
    process = subprocess.Popen(
        [sys.executable, "-m", "unrecurrent.worker", str(folder / JOB)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    running.add(process)
    assert process.stdout is not None
    assert process.stderr is not None
    complaints: list[str] = []
    stderr = process.stderr
    reader = threading.Thread(target=lambda: complaints.extend(stderr))
    reader.start()
    for line in process.stdout:
        update(json.loads(line))
    reader.join()
    process.stdout.close()
    stderr.close()
    code = process.wait()
    running.discard(process)
    if code:
        raise _failure(job, code, "".join(complaints).strip())


def _failure(job: Job, code: int, complaint: str) -> Exception:
    if code == 2 and complaint:
        return InputError(complaint.splitlines()[-1])
    return RuntimeError(f"the training process of {job.model!r} ended with code {code}:\n{complaint}")
