"""Models of two sequences: whole, piecewise and step by step alike, each row as if it were alone; beam search."""

import copy
import pickle

import pytest
import torch

from unrecurrent import certify
from unrecurrent.beam_search import beam_search, beam_search_reference
from unrecurrent.errors import InputError
from unrecurrent.models import Interface, build_model, match_parameters, model_names, parameter_count

SEPARATOR, END = 2, 3
PAIRS = Interface(19, None, 19, SEPARATOR)
MODELS = [name for name in model_names() if "seq2seq" in name]
SMALL = {
    "seq2seq-conv": {"hidden_size": 6, "layers": 2, "kernel_size": 4, "heads": 2},
    "seq2seq-transformer": {"hidden_size": 6, "layers": 2, "heads": 3, "head_size": 2},
}


def small_model(name, **extra):
    settings = SMALL.get(name, {"hidden_size": 7, "heads": 2})
    return build_model(name, PAIRS, {"embedding_size": 5, "dropout": 0.3, **settings, **extra}).eval()


def pairs(batch, steps, places):
    """Symbols of which one a row is the separator, at the given places."""
    symbols = torch.randint(4, 19, (batch, steps))
    symbols[torch.arange(batch), torch.tensor(places)] = SEPARATOR
    return symbols


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("extra", [{}, {"tied": True}], ids=["free", "tied"])
@pytest.mark.parametrize("place", [0, 9, 31])
def test_step_and_pieces_agree_with_forward(name, extra, place):
    model, inputs = small_model(name, **extra), pairs(3, 31 if place < 31 else 32, [place] * 3)
    whole = model(inputs)
    assert whole.shape == (*inputs.shape, 19)
    for sizes in ([1] * inputs.shape[1], [7, 2, 5, inputs.shape[1] - 14]):
        cache, outputs = model.init_cache(3), []
        for piece in inputs.split(sizes, 1):
            output, cache = model.advance(piece, cache)
            outputs.append(output)
        torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_row_does_not_depend_on_the_others_nor_on_what_pads_it(name):
    model, places = small_model(name), [3, 11, 17]
    inputs = pairs(3, 29, places)
    together = model(inputs)
    for row, place in enumerate(places):
        alone = model(inputs[row : row + 1, : place + 8])
        torch.testing.assert_close(together[row, place : place + 8], alone[0, place:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_an_output_sees_the_whole_source_and_what_was_written_and_nothing_later(name):
    model = small_model(name)
    seen = []
    model.embedding.register_forward_hook(lambda module, given, out: seen.append(out))
    inputs = pairs(1, 21, [8])
    gradients = torch.autograd.grad(model(inputs)[0, 15].square().sum(), seen)
    source, written = (gradient[0].abs().sum(1) for gradient in gradients)
    assert (source > 0).all()
    assert len(source) == 9
    assert written.nonzero().flatten().max() == 15 - 8


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_a_batch_are_those_of_its_rows(name):
    model, inputs = small_model(name), pairs(3, 17, [2, 9, 9])
    counts = (inputs == SEPARATOR).cumsum(1) > 0

    def gradients(*rows):
        model.zero_grad()
        sum(model(inputs[row])[counts[row]].square().sum() for row in rows).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    together, apart = gradients(slice(0, 3)), gradients(slice(0, 1), slice(1, 2), slice(2, 3))
    assert together.keys() == apart.keys()
    for key, gradient in together.items():
        torch.testing.assert_close(gradient, apart[key], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_models_can_be_copied_and_meet_a_budget(name):
    model, inputs = small_model(name), pairs(2, 9, [4, 4])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(inputs), model(inputs))
    count = parameter_count(build_model(name, PAIRS, match_parameters(name, PAIRS, {}, 300_000)))
    assert abs(count / 300_000 - 1) < 0.05


@pytest.mark.parametrize("name", MODELS)
def test_other_tasks_and_ragged_rows_get_one_sentence(name):
    with pytest.raises(InputError, match="needs a task of pairs"):
        build_model(name, Interface(None, 88, 88), {})
    model = small_model(name)
    _, cache = model.advance(pairs(2, 9, [3, 5]), model.init_cache(2))
    with pytest.raises(InputError, match="read them on one by one"):
        model.step(torch.tensor([4, 4]), cache)


def test_stable_layers_hold_their_conditions_after_a_wild_step():
    paper = small_model("stable-seq2seq-lstm")
    with torch.no_grad():
        for parameter in paper.parameters():
            parameter.mul_(20)
    paper.project()
    for layer in (*paper.readers, paper.asker, paper.writer):
        assert certify(layer, method="miller-hardt", input_bound=paper.input_bound).stable
    kept = small_model("certified-seq2seq-lstm", rate=0.9)
    with torch.no_grad():
        for parameter in kept.parameters():
            parameter.mul_(20)
    kept(pairs(1, 9, [4]))
    proofs = kept.layer_certificates()
    assert list(proofs) == ["reader", "reader backwards", "asker", "writer"]
    assert all(proof.rate <= 0.9 + 1e-6 for proof in proofs.values())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("beams", [1, 3])
def test_beam_search_finds_what_the_plain_one_finds(name, beams):
    model = small_model(name)
    with torch.no_grad():  # answers that are sharp enough to end, and to differ
        model.readout.weight.mul_(6)
        model.readout.bias[END] += 1.5
    prompts = pairs(4, 6, [5] * 4)
    together = beam_search(model, prompts, END, most=9, beams=beams, forbidden=(0, SEPARATOR))
    apart = [beam_search_reference(model, row, END, most=9, beams=beams, forbidden=(0, SEPARATOR)) for row in prompts]
    assert together == apart
    assert all(not {0, SEPARATOR, END} & set(row) for row in together)


@pytest.mark.parametrize("name", [name for name in model_names() if "seq2seq" not in name])
def test_beam_search_works_with_models_of_one_sequence(name):
    model = build_model(name, PAIRS, {"hidden_size": 7}).eval()
    prompts = pairs(3, 5, [4] * 3)
    apart = [beam_search_reference(model, row, END, most=6, beams=2) for row in prompts]
    assert beam_search(model, prompts, END, most=6, beams=2) == apart


def test_unusable_prompts_are_one_sentence():
    model = small_model("seq2seq-lstm")
    for beams, prompts, message in ((0, pairs(1, 5, [4]), "beams"), (1, torch.zeros(2, 0, dtype=torch.long), "empty")):
        with pytest.raises(InputError, match=message):
            beam_search(model, prompts, END, most=3, beams=beams)
    with pytest.raises(InputError, match="must hold the separator"):
        beam_search(model, torch.full((1, 4), 5), END, most=3)
