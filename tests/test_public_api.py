"""The public names and their signatures: a change here is a change for every user."""

import inspect

import unrecurrent as ur

SIGNATURES = {
    "certify": ["module", "inputs", "input_bound", "embedding", "h0", "readout", "method"],
    "stabilize": ["module", "rate", "method", "inputs", "input_bound", "embedding", "coupled", "optimizer"],
    "measure_memory": [
        *("model", "data", "loss_fn", "ks", "longest", "positions", "delta", "seed"),
        *("scale", "exponential", "masks", "layers", "exponents", "steps", "progress"),
    ],
    "run_parallel": ["module", "x", "h0", "tol", "chunks", "warmup", "verify", "certificate", "out"],
    "truncate": ["module", "k"],
    "compare": [
        "task",
        "models",
        "seeds",
        "parameters",
        "epochs",
        "minutes",
        "trials",
        "data_dir",
        "folder",
        "positions",
        "command",
        "progress",
    ],
}
CLASSES = {
    "Cell", "Certificate", "InputError", "MemoryProfile", "Parallel", "StableGRU", "StableLSTM", "StableRNN",
}  # fmt: skip


def test_names_are_few_and_pinned():
    assert set(ur.__all__) == CLASSES | set(SIGNATURES)
    assert len(ur.__all__) <= 15


def test_signatures_are_pinned():
    for name, parameters in SIGNATURES.items():
        assert list(inspect.signature(getattr(ur, name)).parameters) == parameters


def test_every_public_name_has_a_docstring_with_an_example():
    for name in ur.__all__:
        assert ">>> " in (getattr(ur, name).__doc__ or ""), name  # its own: a parent's does not show how to use it
