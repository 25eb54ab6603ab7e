"""The errors a user is meant to read."""

import math
from numbers import Integral, Real
from typing import Any


class InputError(ValueError):
    """What the user gave cannot be used; the message says in one sentence what was wrong and what to do.

    Library functions raise it (it is a `ValueError`); the command line prints the sentence and exits with code 2.

    >>> raise InputError("the text file is empty: give a file with at least two characters")
    Traceback (most recent call last):
    ...
    unrecurrent.errors.InputError: the text file is empty: give a file with at least two characters
    """


class Diverged(InputError):
    """A training whose loss became infinite or not a number."""


def as_number(value: object) -> float | None:
    """One finite real number as a float, from Python, NumPy or torch, or None; truth values are none.

    >>> as_number(3), as_number(True), as_number(math.nan), as_number("3")
    (3.0, None, None, None)
    """
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) else None


def is_whole(value: object) -> bool:
    """Whether a setting is a whole number: NumPy's count, truth values do not.

    >>> is_whole(3), is_whole(True), is_whole(3.0)
    (True, False, False)
    """
    return isinstance(value, Integral) and not isinstance(value, bool)


def checked_whole(name: str, value: Any, least: int) -> int:
    """Return a whole number of at least `least` as Python's own, from 1e5 too; anything else is an `InputError`.

    >>> checked_whole("seeds", 2.5, 1)
    Traceback (most recent call last):
    ...
    unrecurrent.errors.InputError: seeds must be a whole number of at least 1, not 2.5
    """
    number = value if is_whole(value) else as_number(value)
    if number is not None and number == int(number) and number >= least:
        return int(number)
    raise InputError(f"{name} must be a whole number of at least {least}, not {value!r}")
