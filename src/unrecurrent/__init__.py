"""Find out whether a recurrent model needs to be recurrent.

Where it does not: keep it provably stable, run it in parallel over time, or replace it by a feed-forward network.
"""

from unrecurrent.cells import Cell
from unrecurrent.certificate import Certificate, certify
from unrecurrent.comparison import compare
from unrecurrent.errors import InputError
from unrecurrent.memory import MemoryProfile, measure_memory
from unrecurrent.parallel import Parallel, run_parallel
from unrecurrent.stability import StableGRU, StableLSTM, StableRNN, stabilize
from unrecurrent.truncation import truncate

__all__ = [
    "Cell",
    "Certificate",
    "InputError",
    "MemoryProfile",
    "Parallel",
    "StableGRU",
    "StableLSTM",
    "StableRNN",
    "certify",
    "compare",
    "measure_memory",
    "run_parallel",
    "stabilize",
    "truncate",
]
