"""The sequence models by name, and how one is built at a given size."""

import difflib
from importlib import import_module

import torch

from unrecurrent.errors import InputError, checked_whole
from unrecurrent.models.sequence_model import (
    Cache,
    Interface,
    SequenceModel,
    Settings,
    parameter_count,
)

__all__ = [
    "Cache",
    "Interface",
    "SequenceModel",
    "Settings",
    "build_model",
    "find_model_class",
    "match_parameters",
    "model_names",
    "parameter_count",
]

#: name on the command line → module and class
_WHERE = {
    "rnn": ("recurrent", "RNN"),
    "lstm": ("recurrent", "LSTM"),
    "gru": ("recurrent", "GRU"),
    "stable-rnn": ("stable", "StableRNN"),
    "stable-lstm": ("stable", "StableLSTM"),
    "certified-rnn": ("certified", "CertifiedRNN"),
    "certified-lstm": ("certified", "CertifiedLSTM"),
    "certified-lstm-plain": ("stabilized", "PlainLSTM"),
    "certified-lstm-coupled": ("stabilized", "CoupledLSTM"),
    "certified-gru": ("certified", "CertifiedGRU"),
    "mingru": ("mingru", "MinGRU"),
    "window": ("window", "Window"),
    "tcn": ("tcn", "TCN"),
    "gated-conv": ("gated_conv", "GatedConv"),
    "wavenet": ("wavenet", "WaveNet"),
    "transformer": ("transformer", "Transformer"),
    "ngram-lstm": ("ngram_lstm", "NgramLSTM"),
    "seq2seq-lstm": ("seq2seq_lstm", "Seq2SeqLSTM"),
    "stable-seq2seq-lstm": ("seq2seq_lstm", "StableSeq2SeqLSTM"),
    "certified-seq2seq-lstm": ("seq2seq_lstm", "CertifiedSeq2SeqLSTM"),
    "seq2seq-conv": ("seq2seq_conv", "Seq2SeqConv"),
    "seq2seq-transformer": ("seq2seq_transformer", "Seq2SeqTransformer"),
}

SIZES = {"hidden_size", "layers", "kernel_size", "k", "embedding_size", "input_kernel"}
SIZES |= {"cycles", "heads", "head_size", "window"}
#: sizes that may be `None`, which is no limit
UNLIMITED = {"window"}
SHARES = {"dropout", "input_dropout", "rate", "leaky_units"}
FLAGS = {"tied", "projected"}
#: widths are found by building models, so that the count must fit in memory a few times over
MOST_PARAMETERS = 100_000_000


def model_names() -> list[str]:
    """Return the names of all models.

    >>> "lstm" in model_names()
    True
    """
    return list(_WHERE)


def unknown_name(kind: str, name: str, known: list[str]) -> InputError:
    """Return the error for a name nobody knows, with the nearest known one.

    >>> print(unknown_name("model", "lstn", ["lstm", "tcn"]))
    unknown model 'lstn': did you mean 'lstm'? Known are lstm, tcn
    """
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? Known are" if near else "choose one of"
    return InputError(f"unknown {kind} {name!r}: {hint} {', '.join(known)}")


def find_model_class(name: str) -> type[SequenceModel]:
    """Return the class behind a model's name; an unknown name is an `InputError` that suggests the nearest."""
    if name not in _WHERE:
        raise unknown_name("model", name, model_names())
    module, class_name = _WHERE[name]
    return getattr(import_module(f"unrecurrent.models.{module}"), class_name)


def build_model(name: str, interface: Interface, settings: Settings) -> SequenceModel:
    """Return a freshly initialised model; a setting the model does not have is an `InputError`."""
    model_class = find_model_class(name)
    for key, value in settings.items():
        _check_setting(name, key, value)
    try:
        return model_class(interface, **settings)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        setting = str(error).rsplit("'", 2)[-2]
        raise InputError(f"the model {name!r} has no setting {setting!r}: remove it") from error


def _check_setting(name: str, key: str, value: object) -> None:
    """Refuse a setting that no model can have: sizes are whole numbers, shares lie between 0 and 1."""
    if value is None and key in UNLIMITED:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if key in SIZES and not (isinstance(value, int) and number and value >= 1):
        raise InputError(f"{key} of {name!r} must be a whole number of at least 1, not {value!r}")
    if key in SHARES and not (isinstance(value, int | float) and number and 0 <= value < 1):
        raise InputError(f"{key} of {name!r} must be a number from 0 up to but not including 1, not {value!r}")
    if key in FLAGS and not isinstance(value, bool):
        raise InputError(f"{key} of {name!r} must be true or false, not {value!r}")
    known = SIZES | SHARES | FLAGS
    if key not in known:
        raise InputError(f"the model {name!r} has no setting {key!r}: settings are {', '.join(sorted(known))}")


def match_parameters(
    name: str, interface: Interface, settings: Settings, parameters: int, tolerance: float = 0.05
) -> Settings:
    """Return the settings with the `hidden_size` whose parameter count comes nearest to `parameters`.

    Raises:
        InputError: no such count, or no width comes within `tolerance` of it; choose a larger one or fewer layers.

    >>> piano = Interface(None, 88, 88)
    >>> size = match_parameters("lstm", piano, {}, 100_000)["hidden_size"]
    >>> abs(parameter_count(build_model("lstm", piano, {"hidden_size": size})) / 100_000 - 1) < 0.05
    True
    """

    parameters = checked_whole("parameters", parameters, 1)
    if parameters > MOST_PARAMETERS:
        raise InputError(f"{parameters:,} parameters are too many to search a width for: at most {MOST_PARAMETERS:,}")

    def count(width: int) -> int:
        with torch.random.fork_rng(devices=[]):
            return parameter_count(build_model(name, interface, {**settings, "hidden_size": width}))

    low, high = 1, 2
    while count(high) < parameters:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < parameters else (low, middle)
    width = min((low, high), key=lambda w: abs(count(w) - parameters))
    if abs(count(width) / parameters - 1) > tolerance:
        raise InputError(
            f"no width of {name!r} comes within {tolerance:.1%} of {parameters:,} parameters"
            f" (nearest {count(width):,}): choose a larger budget or fewer layers"
        )
    return {**settings, "hidden_size": width}
