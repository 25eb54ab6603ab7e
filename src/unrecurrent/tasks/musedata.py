"""MuseData: 783 orchestral and piano pieces in the split of Boulanger-Lewandowski et al. (2012)."""

from pathlib import Path

from unrecurrent.tasks.polyphony import MatFileTask, mat_source

SOURCE = mat_source("MuseData.mat", "e8d9eb422ec3833c25f43a9f854d4ee0b9118a20b45f2c183395cdc30ffa14ff")


def musedata(data_dir: Path | None = None) -> MatFileTask:
    """Return the standard MuseData task: 524 / 135 / 124 pieces with 245,202 / 82,755 / 64,339 chords."""
    return MatFileTask("musedata", SOURCE, data_dir)
