"""How each model is trained on each kind of task when nothing else is said: the outcome of equal tuning.

The figures for music come from `compare jsb --trials`, the same draws for every model (`results/README.md`).
A stable model is trained with the settings of its unconstrained twin, the protocol of Miller and Hardt (2019).
"""

from dataclasses import dataclass, field, replace

from unrecurrent.errors import as_number
from unrecurrent.models import Settings
from unrecurrent.tasks.series import SeriesTask
from unrecurrent.tasks.task import Task
from unrecurrent.training import TrainingConfig, train_steps


@dataclass(frozen=True)
class Recipe:
    """The settings of a model (but its width, which the budget decides) and of its training."""

    settings: Settings = field(default_factory=dict)
    training: TrainingConfig = field(default_factory=TrainingConfig)


def twin(model: str) -> str:
    """Return the unconstrained model whose settings a stable model takes over.

    >>> twin("stable-lstm"), twin("certified-lstm-plain"), twin("tcn")
    ('lstm', 'lstm', 'tcn')
    """
    return _TWINS.get(model, model.removeprefix("stable-").removeprefix("certified-"))


#: stable models whose twin is not the rest of their name
_TWINS = {"certified-lstm-plain": "lstm", "certified-lstm-coupled": "lstm"}


_MUSIC = TrainingConfig(epochs=50, learning_rate=3e-3, batch_size=4, schedule="cosine", weight_decay=0.1)
_FAST = replace(_MUSIC, learning_rate=1e-2)
# Not tuned, here and below: `wavenet` is trained as `gated-conv`, `ngram-lstm` as `lstm`, `transformer` at a rate usual
# for its size. On streams attention has a window, so that its cache, and the cost of a step, stay bounded.
_MUSIC_RECIPES = {
    "rnn": Recipe({"dropout": 0.3}, replace(_MUSIC, learning_rate=2e-3)),
    "lstm": Recipe({"dropout": 0.3}, _FAST),
    "gru": Recipe({"dropout": 0.3}, _FAST),
    "mingru": Recipe({"dropout": 0.3, "layers": 2}, _FAST),
    "window": Recipe({"dropout": 0.3, "k": 4}, _MUSIC),
    "tcn": Recipe({"dropout": 0.3, "layers": 2, "kernel_size": 2}, _MUSIC),
    "gated-conv": Recipe({"dropout": 0.3, "layers": 3, "kernel_size": 2}, _MUSIC),
    "wavenet": Recipe({"dropout": 0.3, "layers": 2, "cycles": 1, "kernel_size": 2}, _MUSIC),
    "transformer": Recipe({"dropout": 0.3, "layers": 2}, replace(_MUSIC, learning_rate=1e-3)),
    "ngram-lstm": Recipe({"dropout": 0.3}, _FAST),
}
# Folk tunes repeat their bars: an LSTM uses 33 chords, and convolutions get kernels that reach as far. Not tuned.
_TUNE_RECIPES = _MUSIC_RECIPES | {
    "window": Recipe({"dropout": 0.3, "k": 16}, _MUSIC),
    "tcn": Recipe({"dropout": 0.3, "layers": 4, "kernel_size": 5}, _MUSIC),
    "gated-conv": Recipe({"dropout": 0.3, "layers": 4, "kernel_size": 12}, _MUSIC),
    "wavenet": Recipe({"dropout": 0.3, "layers": 6, "cycles": 1, "kernel_size": 2}, _MUSIC),
}
_STREAM = TrainingConfig(epochs=3, learning_rate=3e-3, batch_size=32, piece=64, schedule="cosine")
_STREAM_RECIPES = {
    "rnn": Recipe({"dropout": 0.1}, replace(_STREAM, learning_rate=1e-3)),
    "lstm": Recipe({"dropout": 0.1}, _STREAM),
    "gru": Recipe({"dropout": 0.1}, _STREAM),
    "mingru": Recipe({"dropout": 0.1, "layers": 2}, _STREAM),
    "window": Recipe({"dropout": 0.1, "k": 16}, _STREAM),
    "tcn": Recipe({"dropout": 0.1, "layers": 4, "kernel_size": 3}, _STREAM),
    "gated-conv": Recipe({"dropout": 0.1, "layers": 6, "kernel_size": 5}, _STREAM),
    "wavenet": Recipe({"dropout": 0.1, "layers": 5, "cycles": 2, "kernel_size": 2}, _STREAM),
    "transformer": Recipe({"dropout": 0.1, "layers": 3, "window": 64}, replace(_STREAM, learning_rate=1e-3)),
    "ngram-lstm": Recipe({"dropout": 0.1}, _STREAM),
}
# Series have few numbers a step and train in seconds: small networks and batches. Strong weight decay keeps a gated
# network from fitting the noise before it has found a season (lag 12 in 2,100 noisy steps: test error 0.51 with a
# decay of 2, 0.60 with 0.01), and dropout keeps a wide convolution from using a past that holds only noise.
_SERIES = TrainingConfig(learning_rate=3e-3, batch_size=4, schedule="cosine", weight_decay=0.1)
_SERIES_GATED = replace(_SERIES, learning_rate=1e-2, weight_decay=2.0)
_SERIES_RECIPES = {
    "rnn": Recipe({}, replace(_SERIES, weight_decay=1.0)),
    "lstm": Recipe({}, _SERIES_GATED),
    "gru": Recipe({}, _SERIES_GATED),
    "mingru": Recipe({"layers": 2}, _SERIES_GATED),
    "window": Recipe({"k": 32, "dropout": 0.1}, _SERIES),
    "tcn": Recipe(
        {"layers": 4, "kernel_size": 3, "dropout": 0.1}, replace(_SERIES, learning_rate=1e-2, weight_decay=1.0)
    ),
    "gated-conv": Recipe({"layers": 4, "kernel_size": 8}, _SERIES),
    "wavenet": Recipe({"layers": 5, "cycles": 1, "kernel_size": 2}, _SERIES),
    "transformer": Recipe({"layers": 2, "heads": 2}, replace(_SERIES, learning_rate=1e-3)),
    "ngram-lstm": Recipe({"k": 32}, _SERIES_GATED),
}


# Words: a large table of words, tied, and hundreds of units behind it. Chosen on WikiText-2's validation data after a
# few short trials of learning rate, batch size, dropout and start with the LSTM and the RNN; the others were not tuned.
_WORDS = TrainingConfig(
    epochs=6,
    learning_rate=4e-3,
    batch_size=16,
    piece=35,
    schedule="cosine",
    sampled_words=2048,
    frequency_bias=True,
)
_WORD_SETTINGS: Settings = {"embedding_size": 256, "tied": True, "dropout": 0.3, "input_dropout": 0.3}
_WORD_RECIPES = {
    # A state without gates takes a quarter of the rate the table of words does best with: at 4e-3 it does not settle
    # before the rate has fallen, at 1.5e-3 the table has not settled after six passes.
    "rnn": Recipe(
        {**_WORD_SETTINGS, "leaky_units": 0.5, "projected": True}, replace(_WORDS, recurrent_learning_rate_factor=0.25)
    ),
    "lstm": Recipe(_WORD_SETTINGS, _WORDS),
    "gru": Recipe(_WORD_SETTINGS, _WORDS),
    "mingru": Recipe({**_WORD_SETTINGS, "layers": 2}, _WORDS),
    "window": Recipe({**_WORD_SETTINGS, "k": 8}, replace(_WORDS, learning_rate=3e-3)),
    "tcn": Recipe({**_WORD_SETTINGS, "layers": 4, "kernel_size": 3}, replace(_WORDS, learning_rate=3e-3)),
    "gated-conv": Recipe({**_WORD_SETTINGS, "layers": 6, "kernel_size": 4}, replace(_WORDS, learning_rate=3e-3)),
    "wavenet": Recipe(
        {**_WORD_SETTINGS, "layers": 4, "cycles": 2, "kernel_size": 2}, replace(_WORDS, learning_rate=3e-3)
    ),
    "transformer": Recipe(
        {**_WORD_SETTINGS, "layers": 4, "head_size": 32, "window": 64}, replace(_WORDS, learning_rate=1e-3)
    ),
    "ngram-lstm": Recipe(_WORD_SETTINGS, _WORDS),
}


def _recipes(training: TrainingConfig, settings: Settings, **layers: Settings) -> dict[str, Recipe]:
    """Return a recipe for each model: the same training and settings, and what says how far each convolution sees."""
    return {
        "rnn": Recipe(settings, replace(training, learning_rate=training.learning_rate / 3)),
        "lstm": Recipe(settings, training),
        "gru": Recipe(settings, training),
        "mingru": Recipe({**settings, "layers": 2}, training),
        "window": Recipe({**settings, **layers["window"]}, training),
        "tcn": Recipe({**settings, **layers["tcn"]}, training),
        "gated-conv": Recipe({**settings, **layers["gated_conv"]}, training),
        "wavenet": Recipe({**settings, **layers["wavenet"]}, training),
        "transformer": Recipe({**settings, **layers["transformer"]}, replace(training, learning_rate=1e-3)),
        "ngram-lstm": Recipe(settings, training),
    }


def _convolutions(layers: int, kernel_size: int) -> Settings:
    return {"layers": layers, "kernel_size": kernel_size}


# Tasks whose answer may lie as far back as the sequence is long. The `tcn` has the layers of Bai et al. (2018) and sees
# more than 3,000 steps; gated convolutions have no dilation and a window has weights of its own for each input: with as
# few parameters they see little of such a sequence. None of these was tuned.
_ANSWERS = TrainingConfig(epochs=2, learning_rate=3e-3, batch_size=32, schedule="cosine")
_LONG: dict[str, Settings] = {
    "window": {"k": 256},
    "tcn": _convolutions(8, 7),
    "gated_conv": _convolutions(4, 5),
    "wavenet": {**_convolutions(9, 3), "cycles": 1},
    "transformer": {"layers": 2, "heads": 2},
}
_COPY = TrainingConfig(epochs=4, learning_rate=2e-3, batch_size=32, schedule="cosine")
_SLOTS = TrainingConfig(epochs=25, learning_rate=3e-3, batch_size=16, schedule="cosine", weight_decay=0.1)
_SOUND = TrainingConfig(epochs=8, learning_rate=3e-3, batch_size=4, piece=512, schedule="cosine")
_HEARD: dict[str, Settings] = {
    "window": {"k": 64},
    "tcn": _convolutions(7, 3),
    "gated_conv": _convolutions(6, 8),
    "wavenet": {**_convolutions(9, 2), "cycles": 2},
    "transformer": {"layers": 3, "window": 128},
}
# Sentences with their translations. The learning rates are those usual for models of this size; for the Transformer the
# better of two, each with its dropout, after one pass.
_PAIRS = TrainingConfig(epochs=8, learning_rate=2e-3, batch_size=64, schedule="cosine", sampled_words=1024)
_PAIR_SETTINGS: Settings = {"embedding_size": 256, "tied": True, "dropout": 0.3, "input_dropout": 0.1}
_TRANSLATION_RECIPES = {
    **_recipes(
        _PAIRS,
        _PAIR_SETTINGS,
        window={"k": 16},
        tcn=_convolutions(5, 3),
        gated_conv=_convolutions(8, 6),
        wavenet={**_convolutions(6, 2), "cycles": 1},
        transformer={"layers": 3, "head_size": 32},
    ),
    "seq2seq-lstm": Recipe(_PAIR_SETTINGS, _PAIRS),
    "seq2seq-conv": Recipe({**_PAIR_SETTINGS, "layers": 4}, _PAIRS),
    "seq2seq-transformer": Recipe({**_PAIR_SETTINGS, "layers": 3, "dropout": 0.1}, _PAIRS),
}
_NAMED_RECIPES = {
    "nottingham": _TUNE_RECIPES,
    "multi30k": _TRANSLATION_RECIPES,
    "wmt14": _TRANSLATION_RECIPES,
    "copy": _recipes(
        _COPY,
        {"embedding_size": 10},
        **{
            **_LONG,
            "window": {"k": 16},
            "tcn": _convolutions(8, 8),
            "transformer": {"layers": 2, "heads": 2, "head_size": 8},
        },
    ),
    "adding": _recipes(_ANSWERS, {}, **_LONG),
    "mnist": _recipes(_ANSWERS, {}, **_LONG),
    "permuted-mnist": _recipes(_ANSWERS, {}, **_LONG),
    "atis": _recipes(
        _SLOTS,
        {"dropout": 0.3, "input_dropout": 0.2},
        window={"k": 6},
        tcn=_convolutions(2, 3),
        gated_conv=_convolutions(3, 4),
        wavenet={**_convolutions(3, 2), "cycles": 1},
        transformer={"layers": 2},
    ),
    "digits": _recipes(_SOUND, {}, **_HEARD),
    "speech": _recipes(_SOUND, {}, **_HEARD),
}


def _named(task: Task) -> str:
    """Return the name of a task without the length it may carry."""
    return task.name.partition(":")[0]


def find_recipe(task: Task, model: str, epochs: float | None = None) -> Recipe:
    """Return how `model` is trained on `task`, with the number of epochs the user asked for.

    A model that cannot do a task has no recipe there: it gets the plain one, and says itself why it cannot.
    """
    recipe = _recipes_of(task).get(twin(model), Recipe())
    if isinstance(task, SeriesTask):
        recipe = replace(recipe, training=_passed(recipe.training, len(task.load("train"))))
    elif task.stream and not task.large_vocabulary and _named(task) not in _NAMED_RECIPES:
        recipe = replace(recipe, training=_sized(recipe.training, train_steps(task)))
    if epochs is None:
        return recipe
    number = as_number(epochs)
    if number is not None:  # what is no number the configuration refuses
        epochs = int(number) if number.is_integer() else number  # 6.0 is the same run as 6
    return replace(recipe, training=replace(recipe.training, epochs=epochs))


def _recipes_of(task: Task) -> dict[str, Recipe]:
    if _named(task) in _NAMED_RECIPES:
        return _NAMED_RECIPES[_named(task)]
    if isinstance(task, SeriesTask):
        return _SERIES_RECIPES
    if not task.stream:
        return _MUSIC_RECIPES
    return _WORD_RECIPES if task.large_vocabulary else _STREAM_RECIPES


#: optimizer steps a training on a series should have, and the most passes over it
SERIES_UPDATES, MOST_SERIES_PASSES = 1_600, 300


def _passed(training: TrainingConfig, sequences: int) -> TrainingConfig:
    """Return the training with as many passes over so many sequences as its number of optimizer steps asks for.

    >>> _passed(_SERIES, 40).epochs, _passed(_SERIES, 4).epochs
    (160, 300)
    """
    updates = -(-sequences // training.batch_size)
    return replace(training, epochs=min(MOST_SERIES_PASSES, -(-SERIES_UPDATES // updates)))


#: optimizer steps a training on a stream should have at least, within the most passes worth their time
STREAM_UPDATES, MOST_PASSES = 1_500, 30


def _sized(training: TrainingConfig, steps: int) -> TrainingConfig:
    """Return the training with fewer columns and more passes where a stream is short.

    >>> sized = _sized(_STREAM, 5_000_000)
    >>> (sized.batch_size, sized.epochs) == (_STREAM.batch_size, _STREAM.epochs)
    True
    >>> _sized(_STREAM, 3_000).epochs
    30
    """
    columns = min(training.batch_size, max(4, steps // (20 * training.piece)))
    updates = max(1, steps // (columns * training.piece))
    passes = min(MOST_PASSES, max(training.epochs, -(-STREAM_UPDATES // updates)))
    return replace(training, batch_size=columns, epochs=passes)


#: those of a temporal convolutional network 10 (`copy`) or 25 wide, as in Bai, Kolter and Koltun (2018)
_PARAMETERS = {
    "copy": 13_330,
    "adding": 66_900,
    "mnist": 66_900,
    "permuted-mnist": 66_900,
    "multi30k": 3_000_000,
    "wmt14": 12_000_000,
}


def default_parameters(task: Task) -> int:
    """Return the number of parameters every model gets when the user names none."""
    if _named(task) in _PARAMETERS:
        return _PARAMETERS[_named(task)]
    if isinstance(task, SeriesTask):
        return 20_000
    if task.large_vocabulary:  # the tied table, and as much behind it as 256 units of an LSTM have
        return 257 * task.outputs + 526_000
    return 150_000 if task.features is not None else 200_000


def default_models(task: Task) -> tuple[str, ...]:
    """Return the models compared when the user names none."""
    if _named(task) in ("copy", "adding", "mnist", "permuted-mnist"):
        return ("rnn", "lstm", "gru", "certified-lstm", "tcn")
    if task.writes:
        return ("seq2seq-lstm", "certified-seq2seq-lstm", "seq2seq-conv", "seq2seq-transformer")
    return ("rnn", "lstm", "stable-lstm", "certified-lstm", "window", "gated-conv", "tcn")
