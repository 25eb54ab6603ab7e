"""Multi30k: short descriptions of pictures, from German to English (Elliott et al. 2016, arXiv:1605.00459)."""

import gzip
import zlib
from collections.abc import Iterator

from unrecurrent.errors import InputError
from unrecurrent.tasks.task import Source, Split, data_folder, missing
from unrecurrent.tasks.translation import Translation

_HOME = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw"
_FILES: dict[Split, str] = {"train": "train", "valid": "val", "test": "test_2016_flickr"}
#: of what is packed
_SHA256 = {
    "train.de": "2c2b73fd2b548fbcde3a875e0a78d6ee94d498bfdee6bd3eae3945779e9ddf72",
    "train.en": "460a15fbd157e34a7a9957ee388c1ca247fe47af3ef25fb50442af6c274e0fc6",
    "val.de": "660e09eb7e1da2f856ea13ee5ad3cf6d36b3d5b0b733c857e94c5747a3dfc660",
    "val.en": "1f2a23d992769b5b3d209b0a10dd0b77c08cceb1f20dfb97ed0aafa49d107227",
    "test_2016_flickr.de": "4be6b5b3236b79c25475c6bb829800a7ce559e9ba7a1f6c2394fe4d40be46d16",
    "test_2016_flickr.en": "399a4382932c1aadd3ceb9bef1008d388a64c76d4ae4e9d4728c6f4301cac182",
}


class Multi30k(Translation):
    """Translate German descriptions of pictures into English; 29,000 / 1,014 / 1,000 pairs, tested on Flickr 2016."""

    name = "multi30k"
    sources = tuple(
        Source(f"multi30k/{file}.gz", f"{_HOME}/{file}.gz", sha256, "research use", packed=True)
        for file, sha256 in _SHA256.items()
    )

    def sentences(self, split: Split) -> Iterator[tuple[str, str]]:
        german, english = (self._lines(f"{_FILES[split]}.{language}.gz") for language in ("de", "en"))
        if len(german) != len(english):
            raise InputError(
                f"the {split} files of {self.name!r} hold {len(german)} German sentences but {len(english)} English"
                " ones: get them again"
            )
        yield from zip(german, english, strict=True)

    def _lines(self, file: str) -> list[str]:
        path = data_folder(self.data_dir) / "multi30k" / file
        if not path.is_file():
            raise missing(self.name, path)
        try:
            text = gzip.decompress(path.read_bytes()).decode("utf-8")
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise InputError(f"{path} is no gzip file of UTF-8 text, or is cut short: get it again") from error
        if not text.strip():
            raise InputError(f"{path} holds no sentence: get it again")
        # Not splitlines: a sentence may hold a line separator of Unicode.
        return [line.strip() for line in text.rstrip("\n").split("\n")]
