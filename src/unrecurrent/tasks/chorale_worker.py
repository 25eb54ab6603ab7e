"""Read chorales with music21 in a process of its own: `python chorale_worker.py FILE...`, one line of JSON a file.

It is run by path, not imported: it must not load PyTorch (seconds and 200 MB a process), and as a plain program
it works from a script without a main guard, from a notebook and from a test alike.
"""

import json
import os
import sys
from typing import Any

VOICES = ("Soprano", "Alto", "Tenor", "Bass")


def parse(path: str) -> list[tuple[int, float, float]]:
    """Return `(MIDI pitch, start, end)` in quarter notes of every note the four voices sing.

    Repeats are not played out. Where the four voices are not named, all parts are taken.
    """
    from music21 import converter

    score: Any = converter.parse(path, forceSource=True, storePickle=False)
    notes: list[tuple[int, float, float]] = []
    for part in _voices(list(score.parts)):
        for sound in part.flatten().notes:
            start = float(sound.offset)
            end = start + float(sound.quarterLength)
            notes.extend((int(pitch.midi), start, end) for pitch in sound.pitches)
    return notes


def _voices(parts: list[Any]) -> list[Any]:
    named = {voice: [p for p in parts if (p.partName or "").startswith(voice)] for voice in VOICES}
    if not all(named.values()):
        return parts
    return [part for voice in VOICES for part in named[voice]]


def main(paths: list[str]) -> None:
    """Write one line for each file; whatever music21 prints goes to the error stream instead."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for path in paths:
        print(json.dumps([path, parse(path)]), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
