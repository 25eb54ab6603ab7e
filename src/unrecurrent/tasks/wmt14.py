"""WMT14, German to English: news and parliament, four and a half million pairs (Bojar et al. 2014)."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from unrecurrent.errors import InputError
from unrecurrent.tasks.task import Split, data_folder
from unrecurrent.tasks.translation import Translation, package

_FILES: dict[Split, str] = {"train": "train", "valid": "validation", "test": "test"}
#: pairs read at a time
_BATCH = 10_000


class WMT14(Translation):
    """Translate German news into English, from the files of `wmt/wmt14` on the Hugging Face hub.

    It is tested on newstest2014. A split is one or more Parquet files, `wmt14/de-en/train-00000-of-00003.parquet` and
    so on, whose column `translation` holds `de` and `en`. They are read and encoded a block at a time; kept are the
    pairs as numbers, about 1 GB.
    """

    name = "wmt14"
    subwords: ClassVar[int] = 32_000

    def sentences(self, split: Split) -> Iterator[tuple[str, str]]:
        folder = data_folder(self.data_dir) / "wmt14" / "de-en"
        files = self._files(folder, split)
        package("pyarrow")
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        for file in files:
            try:
                for batch in ParquetFile(file).iter_batches(_BATCH, columns=["translation"]):
                    yield from ((pair["de"].strip(), pair["en"].strip()) for pair in batch["translation"].to_pylist())
            except (ArrowException, KeyError, TypeError, AttributeError, OSError) as error:
                raise InputError(f"{file} is no Parquet file of pairs de, en: get it again") from error

    def _files(self, folder: Path, split: Split) -> list[Path]:
        """Return the files of a split, each of as many as their names say there are."""
        found = sorted(folder.glob(f"{_FILES[split]}-*-of-*.parquet"))
        count = found[0].stem.rpartition("-")[2] if found else "00001"
        wanted = [f"{_FILES[split]}-{i:05}-of-{count}.parquet" for i in range(int(count) if count.isdigit() else 1)]
        absent = [name for name in wanted if name not in {path.name for path in found}]
        if absent:
            raise InputError(
                f"{absent[0]} of {self.name!r} is missing: put all {split} files of the folder de-en of wmt/wmt14 on"
                f" the Hugging Face hub into {folder} (another place: --data-dir or UNRECURRENT_DATA)"
            )
        if len(found) != len(wanted):
            raise InputError(f"{folder} holds {split} files of more than one division: keep those of one")
        return found
