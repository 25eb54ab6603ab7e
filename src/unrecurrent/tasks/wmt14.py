"""WMT14, German to English: news and parliament, four and a half million pairs (Bojar et al. 2014)."""

from collections.abc import Iterator
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
    so on, whose column `translation` holds `de` and `en`. They are read a block at a time; kept are the pairs as
    numbers, about 1 GB.
    """

    name = "wmt14"
    subwords: ClassVar[int] = 32_000

    def sentences(self, split: Split) -> Iterator[tuple[str, str]]:
        folder = data_folder(self.data_dir) / "wmt14" / "de-en"
        files = sorted(folder.glob(f"{_FILES[split]}-*-of-*.parquet"))
        if not files:
            raise InputError(
                f"the {split} files of {self.name!r} are missing: put those of the folder de-en of wmt/wmt14 on the"
                f" Hugging Face hub into {folder} (another place: --data-dir or UNRECURRENT_DATA)"
            )
        package("pyarrow")
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        for file in files:
            try:
                for batch in ParquetFile(file).iter_batches(_BATCH, columns=["translation"]):
                    yield from ((pair["de"].strip(), pair["en"].strip()) for pair in batch["translation"].to_pylist())
            except (ArrowException, KeyError, TypeError, OSError) as error:
                raise InputError(f"{file} is no Parquet file of pairs de, en: get it again") from error
