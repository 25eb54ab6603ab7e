"""Every model has a recipe for sequences and for streams, and a width that spends the budget."""

import pytest

from unrecurrent.models import build_model, match_parameters, model_names
from unrecurrent.recipes import default_parameters, find_recipe
from unrecurrent.training import task_interface


@pytest.mark.parametrize("name", model_names())
@pytest.mark.parametrize("kind", ["tiny_music", "tiny_stream"])
def test_recipes_spend_the_default_budget(name, kind, request):
    task = request.getfixturevalue(kind)
    settings = find_recipe(task, name).settings
    match_parameters(name, task_interface(task), settings, default_parameters(task), tolerance=0.025)


def test_attention_on_a_stream_has_a_window_so_that_its_cost_is_bounded(tiny_stream):
    model = build_model("transformer", task_interface(tiny_stream), find_recipe(tiny_stream, "transformer").settings)
    assert model.receptive_field is not None
