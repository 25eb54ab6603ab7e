"""Ten million steps, read from a memory-mapped file and written to another, in bounded memory.

    python benchmarks/long_stream.py [--folder FOLDER]

Runs `run_parallel` on a GRU (32 inputs, 64 units, as torch makes it) over 1 and over 10 million steps, each in a
process of its own. Records seconds, and how much the process's own memory (not the pages of the files, which the system
may drop) grew at its peak, in results/long_stream.json. The files take 4 GB while it runs.
"""

import argparse
import multiprocessing
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from unrecurrent import run_parallel
from unrecurrent.records import make_record, write_records

OUTPUT = Path(__file__).resolve().parent.parent / "results" / "long_stream.json"
LENGTHS = (1_000_000, 10_000_000)
FEATURES, HIDDEN, BLOCK = 32, 64, 1_000_000


def own_memory_mib() -> float:
    """Return the anonymous resident memory of this process in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


class Watch:
    """A module in the place of another that notes the largest memory at each of its calls."""

    def __init__(self, module: nn.Module) -> None:
        self.peak = own_memory_mib()
        module.register_forward_hook(self.look)

    def look(self, *_: object) -> None:
        self.peak = max(self.peak, own_memory_mib())


def run(folder: str, steps: int, answer: "multiprocessing.Queue[dict[str, object]]") -> None:
    """Make the input file, run over it, and send what was measured."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    path = Path(folder) / "x.f32"
    x = np.memmap(path, np.float32, "w+", shape=(steps, 1, FEATURES))
    for start in range(0, steps, BLOCK):
        x[start : start + BLOCK] = rng.standard_normal((min(BLOCK, steps - start), 1, FEATURES), np.float32)
    x.flush()
    del x
    x = np.memmap(path, np.float32, "r", shape=(steps, 1, FEATURES))
    y = np.memmap(Path(folder) / "y.f32", np.float32, "w+", shape=(steps, 1, HIDDEN))
    gru = nn.GRU(FEATURES, HIDDEN).eval()
    before, watch = own_memory_mib(), Watch(gru)
    began = time.perf_counter()
    with torch.no_grad():
        _, _, evidence = run_parallel(gru, x, out=y)
    seconds = time.perf_counter() - began
    tail = slice(steps - 2_000, steps)
    with torch.no_grad():
        expected = gru(torch.from_numpy(x[tail].copy()))[0][-100:]
    error = float(np.abs(y[steps - 100 :] - expected.numpy()).max())
    answer.put({"seconds": seconds, "grew": watch.peak - before, "error": error, "evidence": str(evidence)})


def main() -> None:
    """Measure both lengths and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=None, help="where the files are put meanwhile")
    options = parser.parse_args()
    records = []
    for steps in LENGTHS:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            context = multiprocessing.get_context("spawn")
            answer: multiprocessing.Queue[dict[str, object]] = context.Queue()
            process = context.Process(target=run, args=(folder, steps, answer))
            process.start()
            got = answer.get()
            process.join()
        print(f"{steps:,} steps: {got}")
        about = {"task": "random-stream", "model": "gru", "variant": f"{steps:,} steps", "split": "test", "seeds": 1}
        about |= {"hidden_size": HIDDEN, "command": "python benchmarks/long_stream.py", "evidence": got["evidence"]}
        for metric in ("seconds", "error", "grew"):
            name = "memory_growth_mib" if metric == "grew" else metric
            records.append(make_record(metric=name, mean=got[metric], **about))
    write_records(OUTPUT, records)


if __name__ == "__main__":
    main()
