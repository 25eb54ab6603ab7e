"""The house stays as it was drawn: the analysis core knows nothing of tasks, models, training or the command line."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "unrecurrent"
CORE = (
    "cells", "certificate", "stability", "stable_lstm", "self_keeping", "feasible", "projections", "kernels",
    "memory", "bands", "lyapunov", "layer_memory", "trajectories", "reading", "parallel", "engines",
    "chunks", "pilot", "agreement", "evidence", "stock",
    "sharded", "truncation", "onnx_graph", "onednn", "digests",
)  # fmt: skip
OUTSIDE = ("tasks", "models", "batches", "training", "checkpoint", "worker", "jobs", "speed", "recipes", "search",
           "comparison", "verdict", "lookback", "data", "task_memory", "cli")  # fmt: skip


def imported(path):
    """Return the modules of the package that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("unrecurrent.")}


@pytest.mark.parametrize("name", CORE)
def test_analysis_core_stands_alone(name):
    assert not imported(PACKAGE / f"{name}.py") & set(OUTSIDE)


def test_tasks_and_models_do_not_know_each_other():
    for path in (PACKAGE / "tasks").glob("*.py"):
        assert not imported(path) & {"models", "training", "comparison", "cli"}
    for path in (PACKAGE / "models").glob("*.py"):
        assert not imported(path) & {"tasks", "training", "comparison", "cli"}


def test_every_module_says_what_it_is():
    for path in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
