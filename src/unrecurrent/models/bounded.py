"""Inputs whose entries are bounded, which some certificates need: clipped features, projected embeddings."""

import torch
from torch import Tensor

from unrecurrent.models.sequence_model import SequenceModel


class BoundedInputs(SequenceModel):
    """Mixed into a model whose recurrence must see no input entry larger than `input_bound` in evaluation mode.

    Embeddings are clipped after each optimizer step, features as they arrive; a bound of 1 leaves piano rolls as
    they are. Input dropout scales what it keeps by `1/(1−p)` in training only, where no certificate is claimed.
    """

    input_bound: float = 1.0

    @torch.no_grad()
    def clip_embedding(self) -> None:
        """Move the embedding table to the nearest one within the bound."""
        if self.embedding is not None:
            self.embedding.weight.clamp_(-self.input_bound, self.input_bound)

    def clipped(self, encoded: Tensor) -> Tensor:
        """Return features clipped to the bound in evaluation mode; anything else as it is."""
        if self.embedding is not None or self.training:
            return encoded
        return encoded.clamp(-self.input_bound, self.input_bound)
