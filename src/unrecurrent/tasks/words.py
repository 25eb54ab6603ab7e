"""What all word-level tasks share: a vocabulary from the training text and one long stream of words a split."""

import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from unrecurrent.digests import text_digest
from unrecurrent.errors import InputError
from unrecurrent.files import make_folder, replacing, write_text
from unrecurrent.tasks.symbols import SymbolTask
from unrecurrent.tasks.task import SPLITS, Example, Metric, Source, Split, cache_folder, data_folder, missing

END, UNKNOWN = "<eos>", "<unk>"
#: words turned into numbers and written at a time
_BLOCK = 1 << 20
#: the file of the vocabulary, and the form of what lies beside it: raised when that changes
_WORDS, _FORM = "words.json", 1


class WordTask(SymbolTask):
    """Predict the next word of a text from those before it.

    A line is its words, separated by blanks, and `<eos>`; a split is one stream `w_1 … w_N` of them. The first input is
    `<eos>`, so that every word is predicted: inputs `<eos>, w_1 … w_{N−1}`, targets `w_1 … w_N`. The metric is the
    perplexity `exp(mean_t −log p(w_t))` over all N, `<eos>` included (Mikolov et al. 2010).

    The text is read once, a line at a time, and kept as numbers in the user's cache; a stream is mapped into memory
    page by page, so that memory grows with the vocabulary but not with the corpus.
    """

    metric = Metric("ppl", "lower", "perplexity", exponential=True)
    stream = True
    large_vocabulary = True
    step_noun = "word"
    #: words rarer than this in the training text are not in the vocabulary
    least_count = 1
    #: the end of each line, and what stands for a word outside the vocabulary
    end, unknown = END, UNKNOWN

    def __init__(self, data_dir: Path | None = None) -> None:
        """Texts are looked for below `data_dir`, else in the user's data folder, when the task is first used."""
        self.data_dir = data_dir

    @abstractmethod
    def files(self, split: Split) -> list[Path]:
        """Return the text files of a split, in order."""

    @property
    def vocabulary(self) -> int:  # type: ignore[override]
        return len(self.words)

    @property
    def outputs(self) -> int:  # type: ignore[override]
        return len(self.words)

    @cached_property
    def words(self) -> list[str]:
        """The vocabulary, most frequent word first."""
        return json.loads((self._encoded / _WORDS).read_text(encoding="utf-8"))

    def load(self, split: Split) -> Sequence[Example]:
        """Return the one stream of a split; raises `InputError` if a file is missing or is no text of the task."""
        path = self._encoded / f"{split}.bin"
        stream = torch.from_numpy(np.memmap(path, np.int32, mode="c"))
        return [Example(stream[:-1], stream[1:])]

    def encode(self, path: Path) -> Example:
        """Return another text in this one's vocabulary, as one stream."""
        numbers = self._numbers
        unknown = numbers.get(self.unknown)
        found = [numbers[self.end]]
        for line in _lines(path):
            for word in line:
                number = numbers.get(word, unknown)
                if number is None:
                    raise InputError(f"{path} holds {word!r}, which is not in the vocabulary of {self.name!r}")
                found.append(number)
            found.append(numbers[self.end])
        stream = torch.tensor(found, dtype=torch.int32)
        return Example(stream[:-1], stream[1:])

    @property
    def _numbers(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words)}

    @cached_property
    def _encoded(self) -> Path:
        """The folder that holds the vocabulary and the splits as numbers; made when there is none for these files."""
        files = {split: self.files(split) for split in SPLITS}
        stamps = [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for s in SPLITS for p in files[s]]
        stamp = text_digest(json.dumps([_FORM, self.least_count, stamps]))[:16]
        folder = cache_folder() / "words" / f"{self.name}-{stamp}"
        if not (folder / _WORDS).is_file():
            make_folder(folder)
            words = self._count(files["train"])
            numbers = {word: number for number, word in enumerate(words)}
            for split in SPLITS:
                with replacing(folder / f"{split}.bin") as temporary, temporary.open("wb") as out:
                    self._write(files[split], numbers, out)
            # The vocabulary last: where it is, the splits are.
            write_text(folder / _WORDS, json.dumps(words, ensure_ascii=False))
        return folder

    def _count(self, files: Sequence[Path]) -> list[str]:
        counts: Counter[str] = Counter()
        for path in files:
            for line in _lines(path):
                counts.update(line)
                counts[self.end] += 1
        kept = {word: count for word, count in counts.items() if count >= self.least_count}
        if len(kept) < len(counts):
            kept.setdefault(self.unknown, 0)
        return sorted(kept, key=lambda word: (-counts[word], word))

    def _write(self, files: Sequence[Path], numbers: dict[str, int], out: BinaryIO) -> None:
        unknown, end = numbers.get(self.unknown), numbers[self.end]
        block = [end]
        for path in files:
            for line in _lines(path):
                for word in line:
                    number = numbers.get(word, unknown)
                    if number is None:
                        raise InputError(
                            f"{path} holds {word!r}, which is not in the training text of {self.name!r}: restore it"
                        )
                    block.append(number)
                block.append(end)
                if len(block) >= _BLOCK:
                    np.array(block, np.int32).tofile(out)
                    block.clear()
        np.array(block, np.int32).tofile(out)


def _lines(path: Path) -> Iterator[list[str]]:
    """Yield the words of each line of a text file."""
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for line in file:
                yield line.split()
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: restore it") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give the path of a text file") from error


class WordFiles(WordTask):
    """A word-level task whose splits are one file each, below a folder of the data folder."""

    folder: str
    pattern: str

    def files(self, split: Split) -> list[Path]:
        """Return the one file of a split; raises `InputError` if it is missing."""
        path = data_folder(self.data_dir) / self.folder / self.pattern.format(split=split)
        if not path.is_file():
            raise missing(self.name, path)
        return [path]


def _sources(
    folder: str, pattern: str, url: str, member: str, licence: str, digests: dict[Split, str]
) -> tuple[Source, ...]:
    return tuple(
        Source(f"{folder}/{pattern.format(split=split)}", url, digest, licence, member.format(split=split))
        for split, digest in digests.items()
    )


class WikiText2(WordFiles):
    """WikiText-2 (Merity et al. 2016): 2,088,628 / 217,646 / 245,569 words with `<eos>`, 33,278 different ones."""

    name = folder = "wikitext-2"
    pattern = "wiki.{split}.tokens"
    sources = _sources(
        "wikitext-2",
        pattern,
        "https://wikitext.smerity.com/wikitext-2-v1.zip",
        "wikitext-2/wiki.{split}.tokens",
        "CC BY-SA 3.0",
        {
            "train": "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
            "valid": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
            "test": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
        },
    )


class WikiText103(WordFiles):
    """WikiText-103 (Merity et al. 2016): 103,227,021 / 217,646 / 245,569 words with `<eos>`, 267,735 different ones."""

    name = folder = "wikitext-103"
    pattern = "wiki.{split}.tokens"


class PTB(WordFiles):
    """The Penn Treebank by words, Mikolov's preparation: 929,589 / 73,760 / 82,430 words with `<eos>`, 10,000 types."""

    name = folder = "ptb"
    pattern = "ptb.{split}.txt"
    sources = _sources(
        "ptb",
        pattern,
        "http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz",
        "simple-examples/data/ptb.{split}.txt",
        "research use (Penn Treebank, LDC)",
        {
            "train": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
            "valid": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
            "test": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
        },
    )


class BillionWord(WordTask):
    """The One Billion Word Benchmark (Chelba et al. 2013), its own shards of shuffled sentences.

    Training: all `news.en-*` shards; validation and test: the held-out shards 00001 and 00000, as is usual. Words seen
    fewer than three times in training are `<unk>`.
    """

    name = "billion-word"
    least_count = 3

    def files(self, split: Split) -> list[Path]:
        """Return the shards of a split; raises `InputError` if there are none."""
        home = data_folder(self.data_dir) / self.name
        if split == "train":
            shards = sorted((home / "training-monolingual.tokenized.shuffled").glob("news.en-*-of-*"))
        else:
            number = {"valid": 1, "test": 0}[split]
            held_out = home / "heldout-monolingual.tokenized.shuffled"
            shards = sorted(held_out.glob(f"news.en.heldout-{number:05}-of-*"))
        if not shards:
            raise InputError(
                f"the {split} shards of {self.name!r} are missing: unpack 1-billion-word-language-modeling-benchmark"
                f" so that its two folders lie in {home} (another place: --data-dir or UNRECURRENT_DATA)"
            )
        return shards
