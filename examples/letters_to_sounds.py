"""How much of a word does a trained letter-to-sound model need? A worked example on a real model.

The model is g2p-en's (Apache-2.0): a GRU of 256 units reads the letters of a word, and its last state is all that a
second GRU knows of the word when it speaks. Here the first GRU is measured on words of WikiText-2, spelt out letter by
letter: how wrong is the first sound when the GRU has seen only the last k letters?

    UNRECURRENT_DATA=... python examples/letters_to_sounds.py [report.html]

The data folder needs `trained/g2p-en/checkpoint20.npz` and `wikitext-2/wiki.test.tokens`; it takes a few seconds.
"""

import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from unrecurrent import MemoryProfile, measure_memory

LETTERS = "abcdefghijklmnopqrstuvwxyz"
END_OF_WORD, FIRST_LETTER, BEGIN_SPEAKING = 2, 3, 2


class LetterReader(nn.Module):
    """The encoder of g2p-en and the first step of its decoder: letters (B, T) to first sounds (B, T, 74), as logits."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.letters = nn.Embedding.from_pretrained(weights["enc_emb"])
        self.reader = nn.GRU(256, 256, batch_first=True)
        self.speaker = nn.GRUCell(256, 256)
        self.sounds = nn.Linear(256, 74)
        self.register_buffer("begin", weights["dec_emb"][BEGIN_SPEAKING])
        names = ("w_ih", "w_hh", "b_ih", "b_hh")
        for layer, prefix, suffix in ((self.reader, "enc", "_l0"), (self.speaker, "dec", "")):
            state = {
                f"{n.replace('w_', 'weight_').replace('b_', 'bias_')}{suffix}": weights[f"{prefix}_{n}"] for n in names
            }
            layer.load_state_dict(state)
        self.sounds.load_state_dict({"weight": weights["fc_w"], "bias": weights["fc_b"]})

    def forward(self, letters: Tensor) -> Tensor:
        read = self.reader(self.letters(letters))[0]
        begin = self.begin.expand(read.shape[0] * read.shape[1], -1)
        return self.sounds(self.speaker(begin, read.flatten(0, 1))).unflatten(0, read.shape[:2])


def load_reader(data: Path) -> LetterReader:
    """The model with its published weights, whose gates stand in torch's order r, z, n already."""
    arrays = np.load(data / "trained/g2p-en/checkpoint20.npz", allow_pickle=False)
    return LetterReader({name: torch.from_numpy(arrays[name]) for name in arrays.files}).eval()


def spelt_words(data: Path, count: int) -> list[Tensor]:
    """The most frequent words of WikiText-2's test part with four letters or more, each with the end-of-word sign."""
    text = (data / "wikitext-2/wiki.test.tokens").read_text(encoding="utf-8").lower().split()
    words = Counter(word for word in text if len(word) >= 4 and set(word) <= set(LETTERS))
    return [
        torch.tensor([*(LETTERS.index(letter) + FIRST_LETTER for letter in word), END_OF_WORD])
        for word, _ in words.most_common(count)
    ]


def nats(sounds: Tensor, spoken: Tensor) -> Tensor:
    """How surprising the sound is that the model speaks when it has read everything: (B, T)."""
    return nn.functional.cross_entropy(sounds.transpose(1, 2), spoken, reduction="none")


def measure(data: Path, words: int = 400) -> MemoryProfile:
    """Measure the letter reader on whole words: the sound it settles on is the one for all letters so far."""
    model = load_reader(data)
    spelt = spelt_words(data, words)
    with torch.no_grad():
        pairs = [(word, model(word[None])[0].argmax(-1)) for word in spelt]
    return measure_memory(model, pairs, nats, positions=2048, steps=2_000)


def main() -> None:
    data = Path(os.environ.get("UNRECURRENT_DATA", "data"))
    needed = [data / "trained/g2p-en/checkpoint20.npz", data / "wikitext-2/wiki.test.tokens"]
    missing = [path for path in needed if not path.is_file()]
    if missing:
        print(f"skipped: {missing[0]} is not there; set UNRECURRENT_DATA to the folder of the data")
        return
    profile = measure(data)
    print(profile)
    if len(sys.argv) > 1:
        profile.save_report(Path(sys.argv[1]), "The letter reader of g2p-en")


if __name__ == "__main__":
    main()
