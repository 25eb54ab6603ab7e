import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from late_look import LooksLate, late_inputs
from unrecurrent.errors import InputError
from unrecurrent.sharded import _largest_of, accumulated, run_sharded
from unrecurrent.speed import one_thread

RANKS, STEPS = 2, 2400
SCRIPT = """
import sys
import numpy as np, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from test_sharded import CASES, RANKS, STEPS, inputs, make
from unrecurrent.errors import InputError
from unrecurrent.sharded import run_sharded
torch.set_num_threads(1)
dist.init_process_group("gloo")
for name, (kind, options) in CASES.items():
    module, (x, h0) = make(kind), inputs(kind)
    y, state, evidence = run_sharded(module, x, h0, **options)
    kept = {"y": y, "state": state, "evidence": evidence.to_dict()}
    torch.save(kept, f"{sys.argv[2]}/{name}-{dist.get_rank()}.pt")
x, _ = inputs("gru")
x[-1] = float("nan")  # on the last rank alone
said = []
for options in ({"chunks": 4, "warmup": 60}, {}, {"chunks": 1}):
    try:
        run_sharded(make("gru"), x, **options)
    except InputError as error:
        said.append(str(error))
torch.save(said, f"{sys.argv[2]}/missing-{dist.get_rank()}.pt")
x = np.memmap(sys.argv[2] + "/x", np.float32, "r", shape=(STEPS, 1, 3))
out = np.memmap(sys.argv[2] + "/out", np.float32, "r+", shape=(STEPS, 1, 8))
run_sharded(make("gru"), x, chunks=4, warmup=60, out=out)
out.flush()
dist.destroy_process_group()
"""
CASES = {
    "contracting": ("gru", {"chunks": 4, "warmup": 60}),
    "auto": ("lstm", {}),
    "swept": ("gru", {"chunks": 4, "warmup": 2, "verify": "outputs"}),
    "chaotic": ("chaotic", {}),
    "chaotic-insisted": ("chaotic", {"chunks": 4, "warmup": 50}),
    "late": ("late", {"chunks": 8, "warmup": 80, "tol": 1e-2}),
    "late-outputs": ("late", {"chunks": 8, "warmup": 80, "tol": 1e-2, "verify": "outputs"}),
}


def make(kind):
    torch.manual_seed(0)
    if kind == "late":
        return LooksLate()
    module = nn.GRU(3, 8) if kind == "gru" else nn.LSTM(3, 8) if kind == "lstm" else nn.LSTM(3, 32)
    if kind == "chaotic":
        with torch.no_grad():
            module.weight_hh_l0.mul_(8)
    return module


def inputs(kind):
    generator = torch.Generator().manual_seed(1)
    if kind == "late":
        return late_inputs(STEPS, STEPS // RANKS, generator), None
    x = torch.randn(STEPS, 1, 3, generator=generator)
    h0 = None if kind != "gru" else torch.full((1, 1, 8), 0.9)
    return x, h0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    inputs("gru")[0].numpy().tofile(folder / "x")
    np.zeros((STEPS, 1, 8), np.float32).tofile(folder / "out")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    here = os.path.dirname(__file__)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    ran = subprocess.run(
        [*command, str(script), here, str(folder)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return folder


def sequential(kind):
    """In one call; for the chaotic module in one call a rank, since its trajectory shows how a product was blocked."""
    module, (x, state) = make(kind), inputs(kind)
    outputs = []
    with torch.no_grad(), one_thread():
        for part in x.chunk(RANKS if kind == "chaotic" else 1):
            y, state = module(part, state)
            outputs.append(y)
    return torch.cat(outputs), state


@pytest.mark.parametrize("name", CASES)
def test_ranks_together_give_the_sequential_answer(folder, name):
    kind, options = CASES[name]
    y, state = sequential(kind)
    shards = [torch.load(folder / f"{name}-{rank}.pt") for rank in range(RANKS)]
    atol = 0 if kind == "chaotic" else options.get("tol", 1e-4)
    torch.testing.assert_close(torch.cat([shard["y"] for shard in shards]), y, atol=atol, rtol=0)
    for shard in shards:
        torch.testing.assert_close(shard["state"], state, atol=atol, rtol=0)
        evidence = shard["evidence"]
        assert evidence["max_mismatch"] <= 1e-4
        if kind in ("chaotic", "late"):
            assert evidence["mode"] == "sequential"
            assert evidence["fallback"]
        elif options:
            assert evidence["mode"] == "parallel"
            assert (evidence["sweeps"] > 0) == (name == "swept")


def test_missing_values_on_one_rank_are_an_error_on_all(folder):
    """None of them waits for one that has stopped."""
    first, last = (torch.load(folder / f"missing-{rank}.pt") for rank in range(RANKS))
    assert len(first) == len(last) == 3
    assert all("another rank" in said for said in first)
    assert all("NaN" in said for said in last)


def test_errors_add_up_over_ranks():
    """A rank whose own boundary agrees is still off by what is left of the errors before it."""
    errors = accumulated([(0.0, 1.5, 0.9, 0.1), (0.05, 1.5, 0.9, 0.1), (0.0, 1.5, 0.9, 0.1)])
    assert errors == pytest.approx([0.1, 0.325, 0.1 + 1.5 * (0.1 + 0.9 * 0.15)])


def test_no_number_is_no_agreement():
    assert _largest_of([0.0, float("nan")]) == float("inf")
    assert _largest_of([0.0, 2.0]) == 2.0


def test_ranks_write_into_one_memory_map(folder):
    out = np.fromfile(folder / "out", np.float32).reshape(STEPS, 1, 8)
    with torch.no_grad():
        y, _ = make("gru")(inputs("gru")[0])
    np.testing.assert_allclose(out, y.numpy(), atol=1e-4)


def test_one_process_is_one_rank():
    module, (x, h0) = make("gru"), inputs("gru")
    y, state, evidence = run_sharded(module, x, h0, chunks=4, warmup=60)
    with torch.no_grad():
        own, own_state = module(x, h0)
    torch.testing.assert_close(y, own, atol=1e-4, rtol=0)
    torch.testing.assert_close(state, own_state, atol=1e-4, rtol=0)
    assert evidence.mode == "parallel"


def test_bidirectional_is_refused_in_one_sentence():
    with pytest.raises(InputError, match="bidirectional"):
        run_sharded(nn.GRU(3, 8, bidirectional=True), torch.randn(10, 1, 3))


def test_a_module_whose_state_does_not_carry_all_cannot_be_shared():
    class Sum(nn.LSTM):
        def forward(self, x, hx=None):
            y, state = super().forward(x, hx)
            return y.cumsum(0), state

    with pytest.raises(InputError, match="cannot be shared by ranks"):
        run_sharded(Sum(3, 8), torch.rand(400, 1, 3), chunks=4, warmup=60)
