"""JSB chorales: 382 chorales of J. S. Bach in the split of Boulanger-Lewandowski et al. (2012)."""

from pathlib import Path

from unrecurrent.tasks.polyphony import MatFileTask, mat_source

SOURCE = mat_source("JSB_Chorales.mat", "ac0e608527cc411c7e21ef7d38be47f0de7fb6b13b3ae168b8eccf1c2a9b18d4")


def jsb_chorales(data_dir: Path | None = None) -> MatFileTask:
    """Return the standard JSB task: 229 / 76 / 77 pieces with 13,807 / 4,602 / 4,725 chords.

    Published test scores, nats a step: RNN 8.91, LSTM 8.45, TCN 8.10 (Bai, Kolter and Koltun 2018, table 1).

    >>> jsb_chorales().sources[0].path
    'polymusic/JSB_Chorales.mat'
    """
    return MatFileTask("jsb", SOURCE, data_dir)
