"""ATIS slot filling: which words of a question to an airline name the city, the time, the airline (Hemphill 1990)."""

import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from unrecurrent.errors import InputError
from unrecurrent.tasks.symbols import SymbolTask
from unrecurrent.tasks.task import Example, Metric, Source, Split, data_folder, missing

BEGIN, END, UNKNOWN, OUTSIDE = "BOS", "EOS", "<unk>", "O"
_FILES: dict[Split, str] = {"train": "atis-2.train.iob", "valid": "atis-2.dev.iob", "test": "atis.test.iob"}
_SHA256: dict[Split, str] = {
    "train": "76f33fee4bb9f8d70cbf5dcd77208c58ae97dac9343e8fe62cfb363c2256131d",
    "valid": "15c1a0d952aae4c0aa64b4be7457f5d216b9404b423573a345396977986921ca",
    "test": "408f441f87b3472df42c51f5d9e4431fa2dde62409174e28277e389f4bd58821",
}

Utterance = tuple[list[str], list[str]]


class ATIS(SymbolTask):
    """A tag for each word of an utterance, as it is read: 4,478 / 500 / 893 utterances, 127 tags with `O`.

    Words are those of the training utterances, every digit of a number read as `DIGIT` (`838` is `DIGITDIGITDIGIT`),
    any other word is `<unk>`; BOS and EOS are no words and are left out (Mesnil et al. 2015, "Using recurrent neural
    networks for slot filling in spoken language understanding"). A model is causal: it tags a word without
    having seen the next one. The metric is the F1 of whole slots, in per cent, micro-averaged as by conlleval (computed
    by seqeval); the best epoch is chosen by it. Published: RNN 94.7, LSTM 95.1 (Miller and Hardt 2019, table 1).
    """

    name = "atis"
    metric = Metric("f1", "higher", "slot F1, percent", of_predictions=True)
    step_noun = "word"
    selected_by_metric = True
    sources = tuple(
        Source(f"atis/{_FILES[split]}", "https://github.com/yvchen/JointSLU", sha256, "none stated (LDC)", by_hand=True)
        for split, sha256 in _SHA256.items()
    )

    def __init__(self, data_dir: Path | None = None) -> None:
        """The files are looked for below `data_dir`, else in the user's data folder, when the task is first used."""
        self.data_dir = data_dir

    @property
    def vocabulary(self) -> int:  # type: ignore[override]
        return len(self.words)

    @property
    def outputs(self) -> int:  # type: ignore[override]
        return len(self.tags)

    @cached_property
    def words(self) -> list[str]:
        """The words of the training utterances, most frequent first, after the unknown one."""
        counts = Counter(word for words, _ in self._utterances["train"] for word in words)
        return [UNKNOWN, *sorted(counts, key=lambda word: (-counts[word], word))]

    @cached_property
    def tags(self) -> list[str]:
        """All tags of the corpus, those that only the test utterances have included, as is usual."""
        return sorted({tag for part in self._utterances.values() for _, tags in part for tag in tags})

    @cached_property
    def _utterances(self) -> dict[Split, list[Utterance]]:
        found: dict[Split, list[Utterance]] = {}
        for split, file in _FILES.items():
            path = data_folder(self.data_dir) / "atis" / file
            if not path.is_file():
                raise missing(self.name, path)
            found[split] = read_utterances(path)
        return found

    def load(self, split: Split) -> Sequence[Example]:
        """Return the utterances of a split; raises `InputError` if a file is missing or holds something else."""
        words = {word: number for number, word in enumerate(self.words)}
        tags = {tag: number for number, tag in enumerate(self.tags)}
        unknown = words[UNKNOWN]
        return [
            Example(torch.tensor([words.get(w, unknown) for w in spoken]), torch.tensor([tags[t] for t in tagged]))
            for spoken, tagged in self._utterances[split]
        ]

    def judge(self, predicted: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
        """Return the F1 of whole slots in per cent; raises `InputError` where seqeval is not installed."""
        right, given = ([[self.tags[i] for i in row.tolist()] for row in rows] for rows in (wanted, predicted))
        return slot_f1(right, given)


def slot_f1(wanted: list[list[str]], predicted: list[list[str]]) -> float:
    """Return the micro-averaged F1 of slots in per cent: a slot is right if its kind and its words are.

    >>> wanted = [["B-city", "I-city", "O", "B-time"]]
    >>> round(slot_f1(wanted, [["B-city", "O", "O", "B-time"]]), 1), slot_f1(wanted, wanted)
    (50.0, 100.0)
    """
    try:
        from seqeval.metrics import f1_score
    except ImportError as error:
        raise InputError(
            "slot F1 is computed by the package seqeval, which is not installed: run `pip install 'unrecurrent[slots]'`"
        ) from error
    return 100 * float(f1_score(wanted, predicted, zero_division=0))


def read_utterances(path: Path) -> list[Utterance]:
    """Return words and tags of each line of a file, `BOS … EOS`, a tab, and one tag a word, without BOS and EOS.

    Raises:
        InputError: the file is no such text, or is cut short.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: get it again") from error
    if not lines:
        raise InputError(f"{path} is empty: get it again")
    return [_utterance(line, f"line {number} of {path}") for number, line in enumerate(lines, 1)]


def _utterance(line: str, where: str) -> Utterance:
    spoken, _, tagged = line.partition("\t")
    words, tags = spoken.split(), tagged.split()
    if len(words) != len(tags):
        raise InputError(f"{where} has {len(words)} words but {len(tags)} tags: get the file again")
    if len(words) < 3 or (words[0], words[-1]) != (BEGIN, END):
        raise InputError(f"{where} is not BOS, words, EOS: get the file again")
    if any(tag != OUTSIDE and tag[:2] not in ("B-", "I-") for tag in tags):
        raise InputError(f"{where} has a tag that is neither O nor B-... nor I-...: get the file again")
    return [re.sub("[0-9]", "DIGIT", word) for word in words[1:-1]], tags[1:-1]
