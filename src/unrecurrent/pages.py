"""Memory for large results on huge pages, made at once: its first use then costs no page faults in a run."""

import ctypes
import mmap
import sys
from functools import cache
from typing import Any

from torch import Tensor

#: blocks below this many bytes stay as they are
LEAST = 1 << 22
#: of Linux 5.14 and later, which Python has no name for; where it is not known, pages are made as they are touched
POPULATE_WRITE = 23


def new_empty(like: Tensor, *shape: int) -> Tensor:
    """Return `like.new_empty(shape)`; of a large one on the processor Linux is asked to make huge pages, now."""
    tensor = like.new_empty(shape)
    advise = _madvise()
    size = tensor.numel() * tensor.element_size()
    if advise is not None and tensor.device.type == "cpu" and size >= LEAST:
        page = mmap.PAGESIZE
        begin = -(-tensor.data_ptr() // page) * page
        end = (tensor.data_ptr() + size) // page * page
        for advice in (mmap.MADV_HUGEPAGE, POPULATE_WRITE):  # advice: whether it is taken changes no number
            advise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)
    return tensor


@cache
def _madvise() -> Any:
    """The C library's `madvise`, where there is one that knows of huge pages."""
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    return getattr(ctypes.CDLL(None), "madvise", None)
