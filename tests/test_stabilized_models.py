"""Ordinary LSTMs held at a certified rate while they train on symbols or features."""

import copy
import pickle

import pytest
import torch

from unrecurrent.models import Interface, build_model

INTERFACES = {"symbols": Interface(11, None, 11), "features": Interface(None, 5, 5)}


def inputs(kind, batch=4, steps=9):
    generator = torch.Generator().manual_seed(0)
    if kind == "symbols":
        return torch.randint(11, (batch, steps), generator=generator)
    return torch.rand(batch, steps, 5, generator=generator) * 2 - 1


def train(model, x, steps):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().neg().backward()
        optimizer.step()
        model.project()


@pytest.mark.parametrize("kind", INTERFACES)
@pytest.mark.parametrize("name", ["certified-lstm-plain", "certified-lstm-coupled"])
def test_a_trained_model_is_certified_once_settled(name, kind):
    torch.manual_seed(0)
    model = build_model(name, INTERFACES[kind], {"hidden_size": 6, "rate": 0.9})
    train(model, inputs(kind), 7)
    model.settle()
    covered = {} if kind == "symbols" else {"input_bound": 1.0}
    assert model.certificate(**covered).rate <= 0.9
    coupled = torch.equal(model.recurrence.weight_hh_l0[:6], -model.recurrence.weight_hh_l0[6:12])
    assert coupled == (name == "certified-lstm-coupled")


def test_a_copy_keeps_its_own_weights():
    torch.manual_seed(0)
    model = build_model("certified-lstm-plain", INTERFACES["symbols"], {"hidden_size": 6})
    model.project()
    before = copy.deepcopy(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        train(other, inputs("symbols"), 3)
        assert other.constraint is not model.constraint
        assert not torch.equal(other.recurrence.weight_hh_l0, model.recurrence.weight_hh_l0)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])


def test_weights_that_are_loaded_are_constrained_anew():
    torch.manual_seed(0)
    model, other = (build_model("certified-lstm-plain", INTERFACES["symbols"], {"hidden_size": 6}) for _ in range(2))
    held = model.constraint
    model.load_state_dict(other.state_dict())
    assert model.constraint is not held
