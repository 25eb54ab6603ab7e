"""Real series with a published split: `ETTh1` (forecasting), `tanks` and `F16` (system identification)."""

from pathlib import Path
from typing import Any

import numpy as np

from unrecurrent.tasks.csv_table import CsvTable, read_csv
from unrecurrent.tasks.series import Part, Series, SeriesTask, split_by_time
from unrecurrent.tasks.task import Source, data_folder, missing

_NONLINEAR = "https://www.nonlinearbenchmark.org/benchmarks"
_NO_LICENCE = "none stated (nonlinearbenchmark.org)"
#: the share of an estimation record that trains; its end validates
ESTIMATION_SHARE = 0.8


class PublishedSeries(SeriesTask):
    """A series task whose files are looked for below the data folder when it is loaded."""

    def __init__(self, data_dir: Path | None, name: str, **shape: Any) -> None:
        super().__init__(name, **shape)
        self.data_dir = data_dir

    def table(self, source: Source) -> CsvTable:
        """Return the table of one file; raises `InputError` if it is missing or damaged."""
        path = data_folder(self.data_dir) / source.path
        if not path.is_file():
            raise missing(self.name, path)
        return read_csv(path)


class ETTh1(PublishedSeries):
    """The oil temperature of a power transformer, hourly, 24 hours ahead, from its own past.

    Zhou et al. 2021 (Informer, AAAI, arXiv:2012.07436): 12 months of 30 days train, the next 4 validate, the 4 after
    test (8,640 / 2,880 / 2,880 hours); the rest of the 17,420 rows is not used. Standardised by the training part
    alone, as there.
    """

    sources = (
        Source(
            "ett/ETTh1.csv",
            "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/ETTh1.csv",
            "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",
            "CC BY-ND 4.0",
        ),
    )
    step_noun = "hour"
    MONTH = 30 * 24

    def __init__(self, data_dir: Path | None = None) -> None:
        super().__init__(data_dir, "ETTh1", horizon=24, features=1, outputs=24, length=512, seconds=3600.0)

    def read(self) -> list[Series]:
        values = self.table(self.sources[0]).numbers("OT")[: 20 * self.MONTH, None]
        return [Series("", split_by_time(Part(values, values), (12 * self.MONTH, 16 * self.MONTH)))]


class CascadedTanks(PublishedSeries):
    """The water level of the lower of two tanks, simulated from the pump's voltage alone.

    Schoukens and Noël 2017 ("Three benchmarks addressing open challenges in nonlinear system identification"): 1,024
    samples of 4 s to estimate (uEst, yEst) and as many to test (uVal, yVal). The last fifth of the estimation
    record validates. Both records start from the same unknown level.
    """

    sources = (
        Source(
            "sysid/cascaded_tanks_dataBenchmark.csv",
            f"{_NONLINEAR}/cascaded-tanks",
            "ef2388ed822f3aef4aa80d6b0f2b466dd80b361786b3eafc7a2957c31ea323a7",
            _NO_LICENCE,
            by_hand=True,
        ),
    )

    def __init__(self, data_dir: Path | None = None) -> None:
        super().__init__(data_dir, "tanks", horizon=0, features=1, outputs=1, length=384, seconds=4.0)

    def read(self) -> list[Series]:
        table = self.table(self.sources[0])
        estimation = Part(table.numbers("uEst")[:, None], table.numbers("yEst")[:, None])
        test = Part(table.numbers("uVal")[:, None], table.numbers("yVal")[:, None])
        return [_with_own_test(estimation, test)]


class F16(PublishedSeries):
    """The acceleration at three places of an F-16's wing on the ground, simulated from the force of a shaker.

    Noël and Schoukens 2017 ("F-16 aircraft benchmark based on ground vibration test data"): full multisine, 400 Hz,
    73,728 samples a record; level 1 trains (its last fifth validates), the validation record of level 2 tests,
    which is stronger: its response is larger and not linear in the force.
    """

    sources = (
        Source(
            "sysid/F16Data_FullMSine_Level1.csv.gz",
            f"{_NONLINEAR}/f-16-ground-vibration-test",
            "f2cba6338a81169f156d261ba073ce404a38efac11158ec1bd7b4a91f1379e73",
            _NO_LICENCE,
            by_hand=True,
        ),
        Source(
            "sysid/F16Data_FullMSine_Level2_Validation.csv.gz",
            f"{_NONLINEAR}/f-16-ground-vibration-test",
            "cf06eae924e79efec4f4aca68634bf72d7c79fcd228ed4661c9be7809ced2ef8",
            _NO_LICENCE,
            by_hand=True,
        ),
    )
    ACCELERATIONS = ("Acceleration1", "Acceleration2", "Acceleration3")

    def __init__(self, data_dir: Path | None = None) -> None:
        super().__init__(data_dir, "F16", horizon=0, features=1, outputs=3, length=2048, seconds=1 / 400)

    def read(self) -> list[Series]:
        estimation, test = (self._record(source) for source in self.sources)
        return [_with_own_test(estimation, test)]

    def _record(self, source: Source) -> Part:
        table = self.table(source)
        accelerations = np.stack([table.numbers(name) for name in self.ACCELERATIONS], axis=1)
        return Part(table.numbers("Force")[:, None], accelerations)


def _with_own_test(estimation: Part, test: Part) -> Series:
    rows = len(estimation.inputs)
    parts = split_by_time(estimation, (round(ESTIMATION_SHARE * rows), rows))
    return Series("", {**parts, "test": test})
