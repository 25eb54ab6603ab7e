"""Measured results as flat records with the same keys everywhere, so that tables and checks read them alike."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from unrecurrent.errors import InputError
from unrecurrent.files import write_text

Record = dict[str, Any]

#: keys every record has, in this order; a key that does not apply is `None`
KEYS = ("task", "model", "variant", "k", "metric", "split", "mean", "std", "seeds")


def make_record(*, command: str, **measured: Any) -> Record:
    """Return a record with every required key, the command that made it, and where and when it was made.

    >>> record = make_record(command="make demo", task="jsb", model="lstm", metric="nll", split="test",
    ...                      mean=8.5, std=0.02, seeds=3)
    >>> record["variant"] is None and record["command"]
    'make demo'
    """
    record = {key: measured.pop(key, None) for key in KEYS}
    return {**record, **measured, "command": command, **provenance()}


def provenance() -> dict[str, str]:
    """Return the commit, the machine and the date of a measurement."""
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    return {"commit": commit(), "machine": machine(), "date": date}


@cache
def machine() -> str:
    """Return the number of cores, the processor's name and the widest instructions torch uses on it."""
    names = [platform.processor() or platform.machine()]
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")] or names
    return f"{os.cpu_count()} cores, {names[0]}, {torch.backends.cpu.get_cpu_capability()}"


@cache
def commit() -> str:
    """Return the commit of the checkout this package runs from, or its version where it is installed.

    It is looked up once: a long run asks for it when it begins, since it may end after the next commit.
    """
    tracked = _git("ls-files", "--error-unmatch", str(Path(__file__).resolve()))
    return _git("rev-parse", "--short", "HEAD") if tracked else f"version {version('unrecurrent')}"


def _git(*words: str) -> str:
    """Return what git says, or nothing where there is no git or no checkout."""
    here = Path(__file__).resolve().parent
    try:
        ran = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return ran.stdout.strip() if ran.returncode == 0 else ""


def command_line() -> str:
    """Return the command that started this process, as one would type it."""
    program = Path(sys.argv[0])
    start = ["python", f"{program.parent.name}/{program.name}"] if program.suffix == ".py" else [program.name]
    return shlex.join([*start, *sys.argv[1:]])


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records to a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(r, ensure_ascii=False, allow_nan=False) for r in records)
    write_text(path, f"[\n{lines}\n]\n")


def read_records(path: Path) -> list[Record]:
    """Read a file of records; one that is damaged or lacks a required key is an `InputError`."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        missing = {key for record in records for key in KEYS if key not in record}
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} is no file of results: restore it, or make it again by its command") from error
    if missing:
        raise InputError(f"the results in {path} lack {', '.join(sorted(missing))}: make them again")
    return records
