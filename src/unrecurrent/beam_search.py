"""What a sequence model finds most probable to write after a prompt: beam search."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from unrecurrent.errors import InputError, is_whole
from unrecurrent.models import Cache, SequenceModel
from unrecurrent.models.seq2seq import Seq2Seq
from unrecurrent.tasks.translation import Translation

#: hypotheses kept of each sequence
BEAMS = 5


class _Best(NamedTuple):
    """The best finished hypothesis of each prompt: its mean log-probability a symbol, its symbols, how many ended."""

    score: Tensor
    symbols: list[list[int]]
    ended: Tensor


@torch.no_grad()
def beam_search_reference(
    model: SequenceModel, prompt: Tensor, end: int, most: int, beams: int = BEAMS, forbidden: tuple[int, ...] = ()
) -> list[int]:
    """Return the same for one prompt `(M,)`, every hypothesis read anew from its beginning in every step."""
    alive: list[tuple[float, list[int]]] = [(0.0, [])]
    done: list[tuple[float, list[int]]] = []
    for length in range(1, most + 1):
        found = []
        for total, symbols in alive:
            logits = model(torch.cat([prompt, prompt.new_tensor(symbols)])[None])[0, -1]
            logits[list(forbidden)] = float("-inf")
            for symbol, score in enumerate(logits.log_softmax(-1).tolist()):
                found.append((total + score, [*symbols, symbol]))
        found.sort(key=lambda pair: -pair[0])
        done += [(total / length, symbols[:-1]) for total, symbols in found[:beams] if symbols[-1] == end]
        if len(done) >= beams:
            break
        alive = [pair for pair in found if pair[1][-1] != end][:beams]
    return max(done, key=lambda pair: pair[0])[1] if done else alive[0][1]


@torch.no_grad()
def beam_search(
    model: SequenceModel, prompts: Tensor, end: int, most: int, beams: int = BEAMS, forbidden: tuple[int, ...] = ()
) -> list[list[int]]:
    """Return, for each prompt `(N, M)`, the symbols up to `end` (left out) with the best mean log-probability.

    `beams` unfinished hypotheses of each prompt are kept from step to step; a prompt is done when as many have ended,
    or after `most` symbols. Symbols in `forbidden` are not written. With one beam it is greedy search.

    Raises:
        InputError: fewer than one beam, no prompt symbols, or a prompt without the separator a model needs.
    """
    if not is_whole(beams) or beams < 1 or not prompts.shape[1]:
        raise InputError(f"beams must be at least 1 and prompts not empty, not {beams!r} and {tuple(prompts.shape)}")
    if isinstance(model, Seq2Seq) and not bool(prompts.eq(model.separator).any(1).all()):
        raise InputError(f"each prompt must hold the separator, symbol {model.separator}, behind what is to be read")
    model.eval()
    prompts, count = prompts.to(model.device), len(prompts)
    hidden, cache = model.advance_hidden(prompts, model.init_cache(count))
    logits, cache = model.readout(hidden[:, -1:])[:, 0], _widened(model, cache, count, beams)
    totals = logits.new_full((count, beams), float("-inf"))
    totals[:, 0] = 0.0  # all beams are alike at first: one is enough
    written = prompts.new_zeros(count, beams, 0)
    logits = logits.repeat_interleave(beams, 0)
    best = _Best(totals.new_full((count,), float("-inf")), [[] for _ in range(count)], totals.new_zeros(count))
    for length in range(1, most + 1):
        logits[:, list(forbidden)] = float("-inf")
        found = totals[..., None] + logits.log_softmax(-1).view(count, beams, -1)
        # Twice as many as are kept: each beam may end in this step, and as many must be left that do not.
        scores, places = found.flatten(1).topk(min(2 * beams, found[0].numel()))
        parents, symbols = places // found.shape[-1], places % found.shape[-1]
        _finish(best, scores, parents, symbols, written, end, length, beams)
        if bool((best.ended >= beams).all()):
            break
        totals, kept = scores.masked_fill(symbols == end, float("-inf")).topk(beams)
        parents, symbols = parents.gather(1, kept), symbols.gather(1, kept)
        written = torch.cat([written.gather(1, parents[..., None].expand(-1, -1, length - 1)), symbols[..., None]], -1)
        rows = (parents + beams * torch.arange(count, device=parents.device)[:, None]).flatten()
        logits, cache = model.step(symbols.flatten(), model.select(cache, rows))
    return [
        symbols if ended else unfinished
        for symbols, ended, unfinished in zip(best.symbols, best.ended.tolist(), written[:, 0].tolist(), strict=True)
    ]


def translate(model: SequenceModel, task: Translation, sentences: Sequence[str]) -> list[str]:
    """Return the translations of sentences that beam search finds with a model trained on `task`.

    Raises:
        InputError: a model of another task's symbols, or one sentence in the place of a list of them.
    """
    if isinstance(sentences, str):
        raise InputError("translate takes a list of sentences: put the sentence in one")
    if not isinstance(task, Translation) or model.interface != (task.vocabulary, None, task.outputs, task.separator):
        raise InputError(f"the model was trained on other symbols than those of {task.name!r}: give its own task")
    return task.translate(partial(beam_search, model), sentences)


def _widened(model: SequenceModel, cache: Cache, count: int, beams: int) -> Cache:
    return model.select(cache, torch.arange(count, device=model.device).repeat_interleave(beams))


def _finish(
    best: _Best, scores: Tensor, parents: Tensor, symbols: Tensor, written: Tensor, end: int, length: int, beams: int
) -> None:
    """Note which of the best `beams` continuations ended; a prompt that is done takes no more."""
    ends = (symbols[:, :beams] == end) & scores[:, :beams].isfinite() & (best.ended < beams)[:, None]
    means = (scores[:, :beams] / length).masked_fill(~ends, float("-inf"))
    mean, place = means.max(1)
    for row in (mean > best.score).nonzero().flatten().tolist():
        best.score[row] = mean[row]
        best.symbols[row] = written[row, parents[row, place[row]]].tolist()
    best.ended.add_(ends.sum(1))
