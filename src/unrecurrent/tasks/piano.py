"""Piano-midi.de: 124 classical piano pieces in the split of Boulanger-Lewandowski et al. (2012)."""

from pathlib import Path

from unrecurrent.tasks.polyphony import MatFileTask, mat_source

SOURCE = mat_source("Piano_midi.mat", "990a8a71d5764a7eaa3e78d9e5023d1470380fe2db3a1448265a97a24c8b1c34")


def piano(data_dir: Path | None = None) -> MatFileTask:
    """Return the standard Piano-midi.de task: 87 / 12 / 25 pieces with 75,911 / 8,540 / 19,036 chords."""
    return MatFileTask("piano", SOURCE, data_dir)
