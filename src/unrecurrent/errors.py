"""The errors a user is meant to read."""

from numbers import Integral


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


def is_whole(value: object) -> bool:
    """Whether a setting is a whole number: NumPy's count, truth values do not.

    >>> is_whole(3), is_whole(True), is_whole(3.0)
    (True, False, False)
    """
    return isinstance(value, Integral) and not isinstance(value, bool)
