"""Run a command of the command line in this process; make a checkpoint for it to read."""

import sys

import pytest

from unrecurrent import cli
from unrecurrent.checkpoint import save_model
from unrecurrent.models import build_model


def run(capsys, monkeypatch, *words):
    """Return exit code, stdout and stderr of `unrecurrent WORDS`."""
    monkeypatch.setattr(sys, "argv", ["unrecurrent", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    captured = capsys.readouterr()
    return left.value.code or 0, captured.out, captured.err


def save(folder, name, interface, task, **more):
    """Make a folder with the checkpoint of a small model that has not been trained; return the folder."""
    settings = {"hidden_size": 5, **more} | ({"embedding_size": 4} if interface.vocabulary else {})
    model = build_model(name, interface, settings)
    folder.mkdir()
    about = {"model": name, "interface": interface._asdict(), "settings": settings, "task": task}
    save_model(folder, model.state_dict(), about)
    return folder
