"""The transformer's attention against the plain one, its positions, and what a long stream costs it."""

import pytest
import torch

from unrecurrent.models import Interface, build_model
from unrecurrent.models.transformer import attend, attend_reference, rotate, rotations
from unrecurrent.training import TrainingConfig, TrainingRun

PIANO = Interface(None, 5, 4)


@pytest.mark.parametrize("window", [None, 1, 5, 20, 100])
@pytest.mark.parametrize("behind", [0, 1, 19])
@pytest.mark.parametrize("block", [1, 8, 128])
@pytest.mark.parametrize("steps", [1, 63])
def test_fused_attention_in_blocks_is_the_plain_one(window, behind, block, steps):
    shapes = [(2, 3, steps, 6), *2 * [(2, 3, behind + steps, 6)]]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    fast, plain = attend(*leaves, window, block), attend_reference(*leaves, window)
    torch.testing.assert_close(fast, plain)
    weights = torch.randn_like(plain)
    torch.testing.assert_close(*(torch.autograd.grad((out * weights).sum(), leaves) for out in (fast, plain)))


def test_scores_depend_on_distances_alone():
    rotation = rotations(50, 6, torch.zeros(1, dtype=torch.float64))
    query, key = torch.randn(2, 6, dtype=torch.float64)
    scores = (rotate(query.expand(50, 6), rotation) @ rotate(key.expand(50, 6), rotation).T).diagonal(3)
    torch.testing.assert_close(scores, scores[:1].expand(47))
    other = (rotate(query.expand(50, 6), rotation) @ rotate(key.expand(50, 6), rotation).T).diagonal(4)
    assert (other[0] - scores[0]).abs() > 1e-3


def test_order_matters_to_attention():
    model = build_model("transformer", PIANO, {"hidden_size": 5, "layers": 1}).eval()
    inputs = torch.randn(1, 7, 5)
    swapped = inputs[:, [1, 0, 2, 3, 4, 5, 6]]
    assert not torch.allclose(model(inputs)[0, -1], model(swapped)[0, -1], atol=1e-6)


def test_far_along_a_stream_the_same_inputs_give_the_same_outputs():
    model = build_model("transformer", PIANO, {"hidden_size": 5, "layers": 2, "window": 9}).eval()
    inputs, cache = torch.randn(1, 17, 5).repeat(1, 60, 1), model.init_cache(1)
    with torch.no_grad():
        whole = model(inputs)
        for piece in inputs.split(51, 1):
            outputs, cache = model.advance(piece, cache)
            sizes = {part.shape[2] for part in cache}
            assert sizes == {8}
    torch.testing.assert_close(outputs[:, -17:], whole[:, 34:51], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole[:, -17:], whole[:, 34:51], rtol=1e-4, atol=1e-5)


def test_training_on_a_stream_resumes_from_its_cache(tiny_stream, tmp_path):
    """The cache of keys and values is part of the checkpoint, and never longer than the window."""
    settings = {"hidden_size": 6, "layers": 2, "heads": 2, "head_size": 4, "window": 10, "embedding_size": 4}
    config = TrainingConfig(epochs=2, batch_size=3, piece=7)
    whole = TrainingRun(tiny_stream, "transformer", settings, config, tmp_path / "whole")
    wanted = whole.run()
    assert {part.shape for part in whole.cache} == {(3, 2, 9, 4)}

    def stop(state):
        if state["fraction"] > 0.6:
            raise KeyboardInterrupt

    run = TrainingRun(tiny_stream, "transformer", settings, config, tmp_path / "stopped", checkpoint_steps=11)
    with pytest.raises(KeyboardInterrupt):
        run.run(stop)
    resumed = TrainingRun(tiny_stream, "transformer", settings, config, tmp_path / "stopped", checkpoint_steps=11).run()
    assert all(
        torch.equal(a, b) for a, b in zip(wanted.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
