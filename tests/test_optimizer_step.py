"""The optimizer's step: sparse gradients of large tables must lead where dense ones do."""

import copy

import pytest
import torch
from torch import nn

from unrecurrent.models import Interface, build_model
from unrecurrent.optimizer_step import OptimizerStep
from unrecurrent.training import TrainingConfig, make_optimizer, sparse_embedding

WORDS = 50


class Tables(nn.Module):
    """A table of words, read by number and as a matrix, and one that is only read by number."""

    def __init__(self, sparse):
        super().__init__()
        self.tied = nn.Embedding(WORDS, 6, sparse=sparse)
        self.other = nn.Embedding(WORDS, 6, sparse=sparse)
        self.mix = nn.Linear(6, 6)

    def forward(self, words):
        return (self.mix(self.tied(words) + self.other(words.flip(0))) * self.tied(words.flip(0))).square().sum()


def plain_step(model, optimizer, loss, clip_norm):
    """Return the norm of the gradients before they were clipped."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    return norm


@pytest.mark.parametrize("clip_norm", [1e-2, 1e6])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_sparse_gradients_lead_where_dense_ones_do(clip_norm, optimizer):
    torch.manual_seed(0)
    config = TrainingConfig(optimizer=optimizer, learning_rate=0.02, clip_norm=clip_norm, weight_decay=0.1)
    dense, sparse = Tables(False).double(), Tables(True).double()
    sparse.load_state_dict(dense.state_dict())
    by_hand = make_optimizer(dense, config)
    step = OptimizerStep(make_optimizer(sparse, config), clip_norm)
    for size in (7, 3, 11, 1, 20):  # other rows every time, some of them twice
        words = torch.randint(WORDS, (size,))
        norm = plain_step(dense, by_hand, dense(words), clip_norm)
        assert (float(norm) > clip_norm) == (clip_norm < 1)
        step(sparse(words))
        for one, other in zip(dense.parameters(), sparse.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_dense_gradients_take_the_plain_step_bit_for_bit():
    torch.manual_seed(0)
    model = Tables(False)
    other = copy.deepcopy(model)
    config = TrainingConfig(clip_norm=0.5)
    optimizer, step = make_optimizer(model, config), OptimizerStep(make_optimizer(other, config), 0.5)
    for _ in range(5):
        words = torch.randint(WORDS, (9,))
        plain_step(model, optimizer, model(words), 0.5)
        step(other(words))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_step_leaves_no_zeros_in_place_of_a_sparse_gradient():
    model = Tables(True)
    step = OptimizerStep(make_optimizer(model, TrainingConfig()), 1.0)
    step(model(torch.arange(4)))
    assert model.tied.weight.grad is None
    assert all(not table.any() for table in step.tables.values())


@pytest.mark.parametrize("before", [False, True])
def test_the_embedding_is_sparse_inside_only(before):
    model = build_model("lstm", Interface(9, None, 9), {"hidden_size": 4, "embedding_size": 3})
    model.embedding.sparse = before
    with sparse_embedding(model, not before):
        assert model.embedding.sparse is not before
    with pytest.raises(KeyError), sparse_embedding(model, not before):
        raise KeyError
    assert model.embedding.sparse is before
