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


_MUSIC = TrainingConfig(epochs=60, learning_rate=4e-3, batch_size=8, schedule="cosine", weight_decay=0.1)
_MUSIC_SETTINGS: dict[str, Settings] = {
    "rnn": {"dropout": 0.4, "input_dropout": 0.0},
    "lstm": {"dropout": 0.4, "input_dropout": 0.0},
    "gru": {"dropout": 0.4, "input_dropout": 0.0},
    "window": {"dropout": 0.3, "input_dropout": 0.1, "k": 4},
    "tcn": {"dropout": 0.3, "input_dropout": 0.1, "layers": 2, "kernel_size": 3},
    "gated-conv": {"dropout": 0.3, "input_dropout": 0.0, "layers": 3, "kernel_size": 2},
}
_STREAM = TrainingConfig(epochs=3, learning_rate=3e-3, batch_size=32, piece=64, schedule="cosine")
_STREAM_SETTINGS: dict[str, Settings] = {
    "rnn": {"dropout": 0.1},
    "lstm": {"dropout": 0.1},
    "gru": {"dropout": 0.1},
    "window": {"dropout": 0.1, "k": 16},
    "tcn": {"dropout": 0.1, "layers": 4, "kernel_size": 3},
    "gated-conv": {"dropout": 0.1, "layers": 6, "kernel_size": 5},
}


def find_recipe(task: Task, model: str, epochs: int | None = None) -> Recipe:
    """Return how `model` is trained on `task`, with the number of epochs the user asked for."""
    training, settings = (_STREAM, _STREAM_SETTINGS) if task.stream else (_MUSIC, _MUSIC_SETTINGS)
    if epochs is not None:
        training = replace(training, epochs=epochs)
    return Recipe(dict(settings.get(twin(model), {})), training)


def default_parameters(task: Task) -> int:
    """Return the number of parameters every model gets when the user names none."""
    return 300_000 if task.features is not None else 200_000


def default_models(task: Task) -> tuple[str, ...]:
    """Return the models compared when the user names none."""
    return ("rnn", "lstm", "stable-lstm", "window", "gated-conv", "tcn")
