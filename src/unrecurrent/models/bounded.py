"""Inputs whose entries are bounded, which some certificates need: clipped features, projected embeddings."""

from typing import Any

import torch
from torch import Tensor

from unrecurrent.errors import InputError
from unrecurrent.models.sequence_model import Cache, Interface, SequenceModel


class BoundedInputs(SequenceModel):
    """Mixed into a model whose recurrence must see no input entry larger than `input_bound` in evaluation mode.

    Embeddings are clipped after each optimizer step, features as they arrive; a bound of 1 leaves piano rolls as
    they are. Input dropout scales what it keeps by `1/(1−p)` in training only, where no certificate is claimed.
    """

    input_bound: float = 1.0

    def __init__(self, interface: Interface, **settings: Any):
        if settings.get("input_kernel", 1) > 1:
            raise InputError(
                "a convolution in front of the recurrence would leave its inputs without a bound: leave out"
                " input_kernel, or take certified-lstm, which needs none"
            )
        super().__init__(interface, **settings)

    @torch.no_grad()
    def clip_embedding(self) -> None:
        """Move the embedding table to the nearest one within the bound."""
        if self.embedding is not None:
            self.embedding.weight.clamp_(-self.input_bound, self.input_bound)

    def layer_inputs(self, encoded: Tensor, queues: Cache) -> tuple[Tensor, Cache]:
        """Return features clipped to the bound in evaluation mode; anything else as it is."""
        if self.embedding is None and not self.training:
            encoded = encoded.clamp(-self.input_bound, self.input_bound)
        return encoded, queues
