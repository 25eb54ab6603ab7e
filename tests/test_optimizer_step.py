"""The optimizer's step: sparse gradients of large tables must lead where dense ones do."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from unrecurrent.batches import Batch
from unrecurrent.models import Interface, build_model
from unrecurrent.optimizer_step import OptimizerStep
from unrecurrent.softmax import WordSampler, sampled_reference
from unrecurrent.training import TrainingConfig, make_optimizer, sparse_embedding, training_loss

WORDS = 50


class Tables(nn.Module):
    """A table of words that is read twice, and one that is read once; `as_matrix`: all of the first, besides."""

    def __init__(self, sparse, as_matrix=False):
        super().__init__()
        self.as_matrix = as_matrix
        self.tied = nn.Embedding(WORDS, 6, sparse=sparse)
        self.other = nn.Embedding(WORDS, 6, sparse=sparse)
        self.mix = nn.Linear(6, 6)

    def forward(self, words):
        read = (self.mix(self.tied(words) + self.other(words.flip(0))) * self.tied(words.flip(0))).square().sum()
        return read + self.tied.weight.cos().sum() if self.as_matrix else read


def plain_step(model, optimizer, loss, clip_norm):
    """Return the norm of the gradients before they were clipped."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    return norm


@pytest.mark.parametrize("as_matrix", [False, True])
@pytest.mark.parametrize("clip_norm", [1e-2, 1e6])
@pytest.mark.parametrize("optimizer", [{"optimizer": "adamw"}, {"optimizer": "sgd", "momentum": 0.9}])
def test_sparse_gradients_lead_where_dense_ones_do(optimizer, clip_norm, as_matrix):
    torch.manual_seed(0)
    config = TrainingConfig(**optimizer, learning_rate=0.02, clip_norm=clip_norm, weight_decay=0.1)
    dense, sparse = (Tables(each, as_matrix).double() for each in (False, True))
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


def test_nothing_of_a_step_is_left_for_the_next():
    model = Tables(True)
    optimizer = make_optimizer(model, TrainingConfig())
    step = OptimizerStep(optimizer, 1.0)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = optimizer.register_step_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        step(model(torch.arange(4)))
    hook.remove()
    step(model(torch.arange(5, 7)))
    assert len(step.tables) == 2
    assert not any(table.any() for table in step.tables.values())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_over_sampled_words_the_tables_have_sparse_gradients_with_the_values_of_dense_ones(tied):
    settings = {"hidden_size": 4, "embedding_size": 4, "tied": tied}
    model = build_model("lstm", Interface(WORDS, None, WORDS), settings)
    words = torch.randint(WORDS, (2, 5), generator=torch.Generator().manual_seed(0))
    batch = Batch(words, words.roll(-1, 1), None, fresh=True)
    sampler = WordSampler(torch.arange(WORDS, 0, -1), 8)
    task, config = SimpleNamespace(large_vocabulary=True), TrainingConfig(sampled_words=8)

    torch.manual_seed(1)
    training_loss(model, task, batch, model.init_cache(2), config, sampler)[0].backward()
    tables = {"embedding.weight", "readout.weight"}
    assert {name for name, p in model.named_parameters(remove_duplicate=False) if p.grad.is_sparse} == tables
    found = [p.grad.to_dense() for p in model.parameters()]

    torch.manual_seed(1)
    sample = sampler.draw()
    hidden, _ = model.advance_hidden(words, model.init_cache(2))
    readout = model.readout
    losses = sampled_reference(hidden.flatten(0, 1), readout.weight, readout.bias, batch.targets.flatten(), sample)
    wanted = torch.autograd.grad(losses.mean(), list(model.parameters()))
    torch.testing.assert_close(found, list(wanted), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("before", [False, True])
def test_the_embedding_is_sparse_inside_only(before):
    model = build_model("lstm", Interface(9, None, 9), {"hidden_size": 4, "embedding_size": 3})
    model.embedding.sparse = before
    with sparse_embedding(model, not before):
        assert model.embedding.sparse is not before
    with pytest.raises(KeyError), sparse_embedding(model, not before):
        raise KeyError
    assert model.embedding.sparse is before
