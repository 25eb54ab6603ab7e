"""How each model is trained on each kind of task when nothing else is said: the outcome of equal tuning.

The figures for music come from `compare jsb --trials`, the same draws for every model (`results/README.md`).
A stable model is trained with the settings of its unconstrained twin, the protocol of Miller and Hardt (2019).
"""

from dataclasses import dataclass, field, replace

from unrecurrent.models import Settings
from unrecurrent.tasks.task import Task
from unrecurrent.training import TrainingConfig


@dataclass(frozen=True)
class Recipe:
    """The settings of a model (but its width, which the budget decides) and of its training."""

    settings: Settings = field(default_factory=dict)
    training: TrainingConfig = field(default_factory=TrainingConfig)


def twin(model: str) -> str:
    """Return the unconstrained model whose settings a stable model takes over.

    >>> twin("stable-lstm"), twin("tcn")
    ('lstm', 'tcn')
    """
    return model.removeprefix("stable-")


_MUSIC = TrainingConfig(epochs=50, learning_rate=3e-3, batch_size=4, schedule="cosine", weight_decay=0.1)
_FAST = replace(_MUSIC, learning_rate=1e-2)
_MUSIC_RECIPES = {
    "rnn": Recipe({"dropout": 0.3}, replace(_MUSIC, learning_rate=2e-3)),
    "lstm": Recipe({"dropout": 0.3}, _FAST),
    "gru": Recipe({"dropout": 0.3}, _FAST),
    "window": Recipe({"dropout": 0.3, "k": 4}, _MUSIC),
    "tcn": Recipe({"dropout": 0.3, "layers": 2, "kernel_size": 3}, _MUSIC),
    "gated-conv": Recipe({"dropout": 0.3, "layers": 3, "kernel_size": 2}, _MUSIC),
}
_STREAM = TrainingConfig(epochs=3, learning_rate=3e-3, batch_size=32, piece=64, schedule="cosine")
_STREAM_RECIPES = {
    "rnn": Recipe({"dropout": 0.1}, replace(_STREAM, learning_rate=1e-3)),
    "lstm": Recipe({"dropout": 0.1}, _STREAM),
    "gru": Recipe({"dropout": 0.1}, _STREAM),
    "window": Recipe({"dropout": 0.1, "k": 16}, _STREAM),
    "tcn": Recipe({"dropout": 0.1, "layers": 4, "kernel_size": 3}, _STREAM),
    "gated-conv": Recipe({"dropout": 0.1, "layers": 6, "kernel_size": 5}, _STREAM),
}


def find_recipe(task: Task, model: str, epochs: int | None = None) -> Recipe:
    """Return how `model` is trained on `task`, with the number of epochs the user asked for."""
    recipe = (_STREAM_RECIPES if task.stream else _MUSIC_RECIPES)[twin(model)]
    return recipe if epochs is None else replace(recipe, training=replace(recipe.training, epochs=epochs))


def default_parameters(task: Task) -> int:
    """Return the number of parameters every model gets when the user names none."""
    return 150_000 if task.features is not None else 200_000


def default_models(task: Task) -> tuple[str, ...]:
    """Return the models compared when the user names none."""
    return ("rnn", "lstm", "stable-lstm", "window", "gated-conv", "tcn")
