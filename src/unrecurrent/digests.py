"""Checksums over named tensors: what a checkpoint holds, what a task's data are, which weights a proof is about."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def tensor_digest(tensors: Iterable[tuple[str, Tensor]], text: str = "") -> str:
    """Return the SHA-256 of a text and of tensors in the order given: their names, types, shapes and bytes.

    >>> one = tensor_digest([("a", torch.ones(2))])
    >>> one == tensor_digest([("a", torch.ones(2))]), one == tensor_digest([("a", torch.ones(2, 1))])
    (True, False)
    """
    digest = hashlib.sha256(text.encode())
    for name, tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def text_digest(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()
