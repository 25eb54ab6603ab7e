"""What all translation tasks share: pairs of sentences as one sequence, a joint subword vocabulary, BLEU."""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar, overload

import numpy as np
import torch
from torch import Tensor

from unrecurrent.digests import tensor_digest
from unrecurrent.errors import InputError
from unrecurrent.tasks.symbols import SymbolTask
from unrecurrent.tasks.task import SPLITS, Example, Metric, Split, Write

#: symbols that are no subwords; the first pads
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
BEGIN, END = SPECIAL.index("<s>"), SPECIAL.index("</s>")
#: sentences translated, and pairs encoded, at a time
_BATCH, _BLOCK = 32, 10_000


class Pairs(Sequence[Example]):
    """Encoded pairs of sentences, kept as two flat arrays; `references` are the sentences to be written, as text.

    No references are kept of pairs to train on, which are many and never judged.
    """

    def __init__(self, blocks: Iterable[Sequence[Sequence[int]]], references: Sequence[str]):
        parts, lengths = [np.empty(0, np.int32)], [np.empty(0, np.int64)]
        for rows in blocks:
            lengths.append(np.array([len(row) for row in rows]))
            parts.append(np.fromiter(chain.from_iterable(rows), np.int32, int(lengths[-1].sum())))
        self.flat, self.ends = np.concatenate(parts), np.concatenate(lengths).cumsum()
        self.references = references

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        row = torch.from_numpy(self.flat[self.ends[index - 1] if index else 0 : self.ends[index]]).long()
        return Example(row[:-1], row[1:])


class Translation(SymbolTask):
    """Write the translation of a sentence.

    A pair is one sequence: the subwords of the source, `<s>`, those of the translation, `</s>`. Inputs are all of it
    but the last symbol, targets all but the first, and the steps that count are those from `<s>` on, so that a model
    of one sequence can do it as well as one of two. Subwords are those of byte-pair encoding (Sennrich, Haddow and
    Birch 2016, arXiv:1508.07909) over both languages' training sentences. The metric is BLEU of what beam search finds,
    as sacreBLEU computes it from text (13a tokens, cased; Post 2018, arXiv:1804.08771); the best epoch is the one with
    the lowest validation loss.
    """

    metric = Metric("bleu", "higher", "BLEU", of_predictions=True)
    large_vocabulary = True
    step_noun = "subword"
    separator = BEGIN
    writes = True
    #: subwords of the joint vocabulary, special ones included
    subwords: ClassVar[int] = 6_000

    def __init__(self, data_dir: Path | None = None) -> None:
        """The files are looked for below `data_dir`, else in the user's data folder, when the task is first used."""
        self.data_dir = data_dir
        self._loaded: dict[Split, Pairs] = {}

    @abstractmethod
    def sentences(self, split: Split) -> Iterator[tuple[str, str]]:
        """Yield source and translation of each pair; raises `InputError` if a file is missing or is something else."""

    @property
    def vocabulary(self) -> int:  # type: ignore[override]
        return int(self.tokenizer.get_vocab_size())

    @property
    def outputs(self) -> int:  # type: ignore[override]
        return self.vocabulary

    @cached_property
    def tokenizer(self) -> Any:
        """What cuts text into subwords: learnt from the training pairs, the same each time."""
        tokenizers = package("tokenizers")
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
        tokenizer.normalizer = tokenizers.normalizers.NFC()
        cuts = tokenizers.pre_tokenizers
        tokenizer.pre_tokenizer = cuts.Sequence([cuts.Metaspace(), cuts.Punctuation()])
        tokenizer.decoder = tokenizers.decoders.Metaspace()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=self.subwords, special_tokens=list(SPECIAL), show_progress=False
        )
        texts = (text for pair in self.sentences("train") for text in pair)
        tokenizer.train_from_iterator(texts, trainer)
        tokenizer.encode_special_tokens = True  # "<s>" in a text is text
        return tokenizer

    def load(self, split: Split) -> Pairs:
        """Return the pairs of a split; raises `InputError` if a file is missing or holds something else."""
        if split not in self._loaded:
            self._loaded[split] = self._encoded(split)
        return self._loaded[split]

    def _encoded(self, split: Split) -> Pairs:
        references: list[str] = []

        def blocks() -> Iterator[list[list[int]]]:
            pairs = self.sentences(split)
            while block := list(islice(pairs, _BLOCK)):
                sources, targets = zip(*block, strict=True)
                if split != "train":
                    references.extend(targets)
                encoded = zip(self._symbols(sources), self._symbols(targets), strict=True)
                yield [[*source, BEGIN, *target, END] for source, target in encoded]

        pairs = Pairs(blocks(), references)
        if not len(pairs):
            raise InputError(f"the {split} files of {self.name!r} hold no sentence: get them again")
        return pairs

    def _symbols(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]

    def digest(self) -> str:
        """Return a fingerprint of all encoded pairs."""
        arrays = ((split, array) for split in SPLITS for array in (self.load(split).flat, self.load(split).ends))
        return tensor_digest((split, torch.from_numpy(array)) for split, array in arrays)

    def mask(self, example: Example) -> Tensor:
        return (example.inputs == BEGIN).cumsum(0) > 0

    def translate(self, write: Write, sentences: Sequence[str]) -> list[str]:
        """Return the translations of sentences, as `write` writes them."""
        sources = [[*symbols, BEGIN] for symbols in self._symbols(sentences)]
        return self._written(write, [torch.tensor(source) for source in sources])

    def judge_written(self, write: Write, examples: Sequence[Example]) -> float:
        """Return the BLEU of what is written for the pairs of a split."""
        if not isinstance(examples, Pairs) or len(examples.references) != len(examples):
            raise TypeError("a translation is judged on what `load` returns to validate and to test, with its text")
        prompts = [inputs[: int((inputs == BEGIN).nonzero()[0]) + 1] for inputs, _ in examples]
        return bleu(self._written(write, prompts), examples.references)

    def _written(self, write: Write, prompts: Sequence[Tensor]) -> list[str]:
        by_length: dict[int, list[int]] = defaultdict(list)
        for i, prompt in enumerate(prompts):
            by_length[len(prompt)].append(i)
        texts = [""] * len(prompts)
        for length, indices in by_length.items():
            for start in range(0, len(indices), _BATCH):
                some = indices[start : start + _BATCH]
                batch = torch.stack([prompts[i] for i in some])
                found = write(batch, end=END, most=2 * length + 10, forbidden=(0, BEGIN))
                for i, text in zip(some, self.tokenizer.decode_batch(found), strict=True):
                    texts[i] = text
        return texts


def bleu(written: Sequence[str], references: Sequence[str]) -> float:
    """Return the corpus BLEU of sentences, in per cent.

    >>> bleu(["a man is asleep on a couch ."], ["a man is asleep on a couch ."])
    100.0
    """
    return round(float(package("sacrebleu").corpus_bleu(list(written), [list(references)]).score), 4)


def package(name: str) -> Any:
    """Return a package that only translation needs."""
    try:
        return __import__(name)
    except ImportError as error:
        raise InputError(
            f"translation needs the package {name}, which is not there: run `pip install 'unrecurrent[translation]'`"
        ) from error
