"""Run a command of the command line in this process."""

import sys

import pytest

from unrecurrent import cli


def run(capsys, monkeypatch, *words):
    """Return exit code, stdout and stderr of `unrecurrent WORDS`."""
    monkeypatch.setattr(sys, "argv", ["unrecurrent", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    captured = capsys.readouterr()
    return left.value.code or 0, captured.out, captured.err
