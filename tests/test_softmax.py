"""The fused loss of a large vocabulary against its plain references, and what the sampling of words promises."""

import pytest
import torch

from unrecurrent import softmax
from unrecurrent.errors import InputError
from unrecurrent.softmax import (
    WordSample,
    WordSampler,
    cross_entropy_reference,
    inclusion_chances,
    linear_cross_entropy,
    linear_losses,
    sampled_reference,
)


def problem(rows, width, words, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(words, width, generator=generator, dtype=dtype).requires_grad_()
    bias = torch.randn(words, generator=generator, dtype=dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(words, (rows,), generator=generator)


def gradients(loss, *leaves):
    return torch.autograd.grad(3.0 * loss, leaves)


@pytest.mark.parametrize(("rows", "width", "words"), [(1, 1, 1), (7, 5, 3), (33, 9, 101)])
@pytest.mark.parametrize("chunk", [1, 64, 1 << 24])
@pytest.mark.parametrize("biased", [True, False])
def test_the_exact_loss_and_its_gradients_are_the_plain_ones(monkeypatch, rows, width, words, chunk, biased):
    monkeypatch.setattr(softmax, "CHUNK_NUMBERS", chunk)
    hidden, weight, bias, targets = problem(rows, width, words)
    bias = bias if biased else None
    leaves = (hidden, weight, bias) if biased else (hidden, weight)
    fast, plain = (
        linear_cross_entropy(hidden, weight, bias, targets),
        cross_entropy_reference(hidden, weight, bias, targets),
    )
    torch.testing.assert_close(fast, plain.mean())
    torch.testing.assert_close(gradients(fast, *leaves), gradients(plain.mean(), *leaves))


@pytest.mark.parametrize(("rows", "width", "words"), [(0, 2, 3), (1, 1, 1), (7, 5, 3), (33, 9, 101)])
@pytest.mark.parametrize("tile", [1, 2, 10, 33, 1024])
@pytest.mark.parametrize("biased", [True, False])
def test_losses_from_tiles_of_logits_are_the_plain_ones(monkeypatch, rows, width, words, tile, biased):
    """Also where a tile holds no word but the target, and where logits lie far apart."""
    monkeypatch.setattr(softmax, "TILE", tile)
    hidden, weight, bias, targets = problem(rows, width, words)
    for scale in (1, 300):
        arguments = (scale * hidden, weight, bias if biased else None, targets)
        plain = cross_entropy_reference(*arguments).detach()
        torch.testing.assert_close(linear_losses(*arguments), plain)


def test_losses_in_bfloat16_are_near_and_keep_the_target_exact(monkeypatch):
    monkeypatch.setattr(softmax, "TILE", 16)
    hidden, weight, bias, targets = problem(64, 8, 101, torch.float32)
    near = linear_losses(hidden, weight, bias, targets, torch.bfloat16)
    plain = cross_entropy_reference(hidden, weight, bias, targets).detach()
    assert near.dtype == torch.float32
    assert 0 < (near - plain).abs().max() < 0.05


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (20, 13), (50, 101)])
def test_the_sampled_loss_and_its_gradients_are_the_plain_ones(rows, size):
    hidden, weight, bias, targets = problem(rows, 7, 101)
    sample = WordSampler(torch.arange(101, 0, -1), size).draw()
    assert rows < 50 or bool(torch.isin(targets, sample.words).any())
    fast = linear_cross_entropy(hidden, weight, bias, targets, sample)
    plain = sampled_reference(hidden, weight, bias, targets, sample).mean()
    torch.testing.assert_close(fast, plain)
    torch.testing.assert_close(gradients(fast, hidden, weight, bias), gradients(plain, hidden, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [64, 1 << 24])
def test_sparse_gradients_are_the_dense_ones(monkeypatch, dtype, chunk):
    monkeypatch.setattr(softmax, "CHUNK_NUMBERS", chunk)
    hidden, weight, bias, targets = problem(31, 7, 101, torch.float32)
    sample = WordSampler(torch.arange(101, 0, -1), 20).draw()
    both = []
    for sparse in (False, True):
        loss = linear_cross_entropy(hidden, weight, bias, targets, sample, dtype, sparse)
        both.append(gradients(loss, hidden, weight, bias))
    (hidden_dense, dense, bias_dense), (hidden_sparse, rows, bias_sparse) = both
    assert rows.is_sparse
    assert len(rows.coalesce().indices()[0]) < 101
    torch.testing.assert_close(rows.to_dense(), dense, rtol=1e-5, atol=1e-7)  # terms of a row in another order
    assert torch.equal(hidden_dense, hidden_sparse)
    assert torch.equal(bias_dense, bias_sparse)


def test_sparse_gradients_need_a_sample():
    with pytest.raises(InputError, match="needs a sample"):
        linear_cross_entropy(*problem(3, 4, 9), sparse=True)


def test_a_sample_of_all_words_is_exact():
    hidden, weight, bias, targets = problem(12, 5, 40)
    sample = WordSampler(torch.arange(1, 41), 99).draw()
    exact = cross_entropy_reference(hidden, weight, bias, targets).mean()
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, bias, targets, sample), exact)


def test_bfloat16_products_stay_near_and_losses_are_summed_in_full():
    hidden, weight, bias, targets = problem(64, 32, 300, torch.float32)
    near = linear_cross_entropy(hidden, weight, bias, targets, dtype=torch.bfloat16)
    exact = linear_cross_entropy(hidden, weight, bias, targets)
    assert near.dtype == torch.float32
    assert abs(near.item() / exact.item() - 1) < 2e-3
    for rough, fine in zip(gradients(near, hidden, weight, bias), gradients(exact, hidden, weight, bias), strict=True):
        assert (rough - fine).norm() < 0.02 * fine.norm()


@pytest.mark.parametrize("size", [1, 5, 60, 99, 100])
def test_chances_add_up_to_the_size_and_frequent_words_are_certain(size):
    weights = torch.arange(100, 0, -1).double() ** 2
    chance = inclusion_chances(weights, size)
    assert float(chance.sum()) == pytest.approx(size)
    assert bool(((chance > 0) & (chance <= 1)).all())
    rest = chance < 1
    if bool(rest.any()):
        ratio = chance[rest] / weights[rest]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


def test_words_are_drawn_as_often_as_their_chance_says_and_never_twice():
    torch.manual_seed(0)
    sampler = WordSampler(torch.tensor([400, 90, 30, 9, 9, 5, 2, 1, 0]), 4)
    draws = [sampler.draw().words for _ in range(4000)]
    assert all(len(words.unique()) == 4 for words in draws)
    often = torch.bincount(torch.cat(draws), minlength=9) / len(draws)
    assert float((often - sampler.chance).abs().max()) < 0.03


def test_the_estimated_normaliser_is_unbiased_for_any_target():
    torch.manual_seed(1)
    hidden, weight, bias, targets = problem(6, 4, 30)
    sampler = WordSampler(torch.arange(30, 0, -1) ** 2, 12)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    own = logits.gather(1, targets[:, None]).squeeze(1)

    def normaliser(sample: WordSample):
        return (sampled_reference(hidden, weight, bias, targets, sample) + own).exp()

    with torch.no_grad():
        estimates = torch.stack([normaliser(sampler.draw()) for _ in range(3000)])
        error = estimates.std(0) / 3000**0.5
        assert bool(((estimates.mean(0) - logits.exp().sum(1)).abs() < 5 * error + 1e-9).all())
