"""Every model can be trained on every task without being told how, at a width that spends the budget."""

import pytest

from unrecurrent.models import build_model, match_parameters, model_names
from unrecurrent.recipes import default_models, default_parameters, find_recipe
from unrecurrent.tasks import get_task
from unrecurrent.training import task_interface

#: one task of each kind that needs no file to be asked for its recipe
TASKS = ("jsb", "nottingham", "copy", "adding:T=200", "mnist", "permuted-mnist", "digits", "speech")


#: models of one sequence, which every task has
MODELS = [name for name in model_names() if "seq2seq" not in name]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["tiny_music", "tiny_stream"])
def test_recipes_spend_the_default_budget(name, kind, request):
    task = request.getfixturevalue(kind)
    settings = find_recipe(task, name).settings
    match_parameters(name, task_interface(task), settings, default_parameters(task), tolerance=0.025)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("model", [name for name in MODELS if not name.startswith(("stable", "certified"))])
def test_recipes_can_be_built_at_the_default_budget(name, model):
    task = get_task(name)
    recipe = find_recipe(task, model, epochs=7)
    assert recipe.training.epochs == 7
    settings = match_parameters(model, task_interface(task), recipe.settings, default_parameters(task), 0.025)
    build_model(model, task_interface(task), settings)


def test_stable_models_take_over_the_recipe_of_their_twin():
    for name in TASKS:
        assert find_recipe(get_task(name), "certified-lstm-plain") == find_recipe(get_task(name), "lstm")
        assert set(default_models(get_task(name))) <= set(model_names())


def test_convolutions_see_the_whole_of_a_task_that_asks_at_its_end():
    for name, length in (("copy:T=1000", 1020), ("adding:T=600", 600), ("mnist", 784)):
        task = get_task(name)
        settings = find_recipe(task, "tcn").settings
        assert build_model("tcn", task_interface(task), {**settings, "hidden_size": 2}).receptive_field >= length


def test_attention_on_a_stream_has_a_window_so_that_its_cost_is_bounded(tiny_stream):
    model = build_model("transformer", task_interface(tiny_stream), find_recipe(tiny_stream, "transformer").settings)
    assert model.receptive_field is not None


def test_whole_passes_are_the_same_run_however_they_are_written():
    given = [find_recipe(get_task("jsb"), "lstm", epochs).training.epochs for epochs in (6, 6.0, 0.5)]
    assert [repr(epochs) for epochs in given] == ["6", "6", "0.5"]
