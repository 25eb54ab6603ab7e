"""The page of WikiText-2 from its records: tables, commands, and the picture of what stability costs.

`benchmarks/results_page.py` (`make results`) writes both; nothing here trains or measures.
"""

import math
import statistics
from pathlib import Path
from typing import Any

from markup import MISSING, drawing, rough, rounded_up, table, text
from unrecurrent.recipes import twin
from unrecurrent.records import Record, read_records
from unrecurrent.training import with_defaults

FOLDER = Path(__file__).resolve().parent.parent / "results" / "wikitext-2"
PAGE, FIGURE = FOLDER / "README.md", FOLDER / "price.svg"
#: words of the vocabulary
WORDS = 33_278
#: the lengths the recurrent models of the tables are truncated to
TRUNCATED = (5, 10, 20, 35, 64)
#: test perplexities of the article, unconstrained and stable (Miller 2018; Miller and Hardt 2019, table 1)
PUBLISHED = {"rnn": 146.7, "stable-rnn": 143.5, "lstm": 92.3, "stable-lstm": 95.1}
#: more lengths, for the curve and k*
CURVE = (1, 2, 3, *TRUNCATED, 128, 256, 512)
#: the row every other is compared with; a designed row and its rival: free, with the same convolution
FREE, DESIGNED, RIVAL = "lstm", "certified-lstm-wide", "lstm-front"
#: since when `StableLSTM` takes its steps in compiled code where no gradient is wanted
COMPILED_STEPS = "2026-11-28"
#: the tables in the order of the page
TABLES = {
    "one size": "One size: 256 units unless said, six epochs, one set of settings",
    "feed-forward": "Feed-forward models, same data, epochs and (within 5 %) parameters as the LSTM",
    "truncated": "Trained, too, on the last k words only (`ngram-lstm`): 256 units, one epoch",
    "price": "The price of stability: 256 units, three epochs",
    "own settings": "Each at its own best settings: 256 units, three epochs",
    "long": "Larger and longer: an hour and a half of training steps on one thread",
}
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 430, 70, 60, 150, 56
#: Okabe and Ito's colours
COLOURS = {"certified-lstm": "#0072B2", "certified-gru": "#D55E00"}
INTRO = """# WikiText-2

Next-word perplexity on the standard files (2,088,628 / 217,646 / 245,569 words, `<eos>` counted; 33,278 words, tied
tables), normalised over the whole vocabulary in float32. Training normalises over a sample of the words
(`sampled_words` in the settings below). `stable-` rows are kept at the conditions of Miller and Hardt,
`certified-` rows at a rate that is proved, while they train, and exactly at every checkpoint
([docs/stability.md](../../docs/stability.md)).

A row is made by `python benchmarks/wikitext2.py train ROW`, its words a second by `… speed ROW`, on the machine the
record names; this page by `make results`.

- *minutes*: the epochs times the fastest of them (where there is one, with the pauses it had), training steps only; one
  thread, beside another training.
- *valid*, *test*: means over the seeds, ± the standard deviation where there are two, and so what is said against other
  rows. What is proved, k\\*, the local rate, the cuts and the words a second are of seed 0.
- *against its free twin*: the model without the constraint, same settings and training. `certified-lstm` and
  `certified-lstm-coupled` have an input gate of 1 − f, which their twin `lstm` has not. *article*: Miller 2018; its
  models have other sizes and settings.
- *rate*, *horizon* (**proved**, for every text): in the norm of the certificate two states come closer by the rate with
  each word, and leaving out all words further back than the horizon changes the state by at most 0.01
  ([docs/certificates.md](../../docs/certificates.md)). Proved over the rows of the embedding table; behind a
  convolution, over any input. Rates are rounded up.
- *k\\** (**estimate**, 4,096 positions of the test text): the smallest of {lengths}
  and, of a feed-forward model, all it can see, such that the model that sees so many words only is within 1 % of its
  perplexity. *cut at k*: its test perplexity when it sees k words.
- *local rate* (**estimate**): the largest growth a word of a small difference of the state over 16 words, the median
  over 64 states, in the Euclidean norm. It may be above a rate that is proved in another norm.
- *recurrence, words/s*: the recurrent layers alone, one long text, two threads: step by step → by `run_parallel`.
  *steps*: it found that the layer remembers too long and ran it step by step; the ratio is what looking cost. †: timed
  before the steps of `certified-lstm` were compiled, so that no ratio is given; how fast they are now is in
  `results/stable_lstm_speed.json`. `mingru` is parallel over time by itself.
- ‡: minutes and speeds of a machine without AVX-512, to be compared with each other only.
"""


def records() -> dict[str, list[Record]]:
    """Return the records of every row that is done, by its name."""
    found = {path.stem: read_records(path) for path in sorted(FOLDER.glob("*.json"))}
    return {name: rows for name, rows in found.items() if rows and rows[0]["metric"] == "ppl"}


def speeds() -> dict[str, Record]:
    """Return what was measured of scoring, by the row's name."""
    found = (record for path in sorted((FOLDER / "speed").glob("*.json")) for record in read_records(path))
    return {record["row"]: record for record in found if "row" in record}


def training_speed() -> str:
    """Return the sentence on training speed, empty before it is measured."""
    path = FOLDER / "speed" / "training.json"
    if not path.exists():
        return ""
    (record,) = read_records(path)
    return (
        f"One training step of `lstm` ({record['variant']}) is **{record['mean']:.1f} times** as fast as that of the"
        f" plain recipe, all logits in float32 and SGD: {record['train_tokens_per_s']:,} against"
        f" {record['baseline_tokens_per_s']:,} words a second on two threads\n(`{record['command']}`).\n"
    )


def shown(value: object, digits: int = 1) -> str:
    if value is None:
        return MISSING
    if isinstance(value, float):
        return f"{value:,.{digits}f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def ordered(done: dict[str, list[Record]], name: str) -> list[tuple[str, list[Record]]]:
    """Return the rows of one table, best first."""
    rows = [(row, found) for row, found in done.items() if found[0]["table"] == name]
    return sorted(rows, key=lambda item: item[1][0]["mean"])


def worse(first: Record, other: Record | None) -> str:
    """Return by how much the perplexity of a row is above that of another."""
    return MISSING if other is None else f"{100 * (first['mean'] / other['mean'] - 1):+.1f} %"


def settings_but(record: Record, *left_out: str) -> dict[str, Any]:
    """Return how a row was built and trained, without some of the settings."""
    every = {**record["settings"], **with_defaults(record["training"])}
    return {key: value for key, value in every.items() if key not in left_out}


def free_twin(first: Record, done: dict[str, list[Record]]) -> Record | None:
    """Return the unconstrained row that differs from a stable one in nothing but the constraint, if there is one."""

    def made(record: Record) -> tuple[Any, ...]:
        return record["table"], twin(record["model"]), settings_but(record, "rate")

    found = (rows[0] for rows in done.values() if rows[0]["model"] == twin(first["model"]) != first["model"])
    return next((other for other in found if made(other) == made(first)), None)


def main_row(row: str, done: dict[str, list[Record]], speed: Record | None) -> list[str]:
    found = done[row]
    first, (free, *_) = found[0], done.get(FREE, [None])
    cut = {r["k"]: r["mean"] for r in found[1:]}
    spread = "" if first["std"] is None else f" ± {first['std']:.1f}"
    comparable = first["table"] in ("one size", "feed-forward") and row != FREE
    return [
        f"`{row}`" + (f" ({first['variant']})" if first["variant"] else ""),
        shown(first["hidden_size"]),
        f"{first['params'] / 1e6:.2f} M",
        minutes(first),
        shown(first["valid_mean"]),
        f"**{first['mean']:.1f}**{spread}",
        worse(first, free if comparable else None),
        worse(first, free_twin(first, done)),
        shown(PUBLISHED.get(row)),
        shown(rounded_up(first["certified_rate"])),
        shown(first["certified_horizon"]),
        shown(first["k_star"]),
        shown(first["local_rate"], 3),
        *(shown(cut.get(k)) for k in TRUNCATED),
        words_a_second(speed),
    ]


def minutes(first: Record) -> str:
    return shown(first["minutes"], 0) + machine(first)


def machine(record: Record) -> str:
    """Return the mark of the slower of the two machines that the rows were made on."""
    return "" if "AVX512" in record["machine"] else "‡"


def words_a_second(speed: Record | None) -> str:
    """Return how fast the recurrence runs step by step and by `run_parallel`, which may have given up."""
    if speed is None:
        return MISSING
    parallel = speed["recurrence_tokens_per_s"]
    old_steps = speed["model"] == "certified-lstm" and speed["date"] < COMPILED_STEPS
    dagger, ratio = ("†", "") if old_steps else ("", f"{speed['mean']:.2g} ×")
    if not speed["warmup"]:
        return f"{rough(parallel)}{dagger}{machine(speed)} (steps{', ' if ratio else ''}{ratio})"
    steps = f"{rough(parallel / speed['mean'])}{dagger}"
    return f"{steps} → {rough(parallel)}{machine(speed)}{f' ({ratio})' if ratio else ''}"


def of_first_seed(record: Record) -> Record:
    return record | {"mean": record.get("first_seed", record["mean"])}


def beside_words(record: Record) -> str:
    """Return the number of parameters beside the table of words and its biases."""
    return f"{(record['params'] - WORDS * (record['settings']['embedding_size'] + 1)) / 1e6:.2f} M"


def designed(done: dict[str, list[Record]]) -> str:
    """Return what the designed row owes to its convolution and its size, as far as that is known."""
    about = (
        f"`{DESIGNED}` is designed to win: one gate less and the 5 % by which sizes may differ pay for a wider state,\n"
        "and a gated convolution reads each word together with the one before."
    )
    if not {FREE, DESIGNED, RIVAL} <= set(done):
        return f"{about}\nHow much of its gain is the convolution's is not known: `{RIVAL}` is not trained.\n"
    free, ours, rival = (of_first_seed(done[row][0]) for row in (FREE, DESIGNED, RIVAL))
    alone = [
        f"of `{row}` by {worse(of_first_seed(done[f'{row}-front'][0]), of_first_seed(done[row][0]))}"
        for row in (FREE, "certified-lstm")
        if {row, f"{row}-front"} <= set(done)
    ]
    return (
        f"{about} Beside the table of words it has {beside_words(ours)}\nparameters, `{RIVAL}` {beside_words(rival)}"
        f" and `{FREE}` {beside_words(free)}. Against `{RIVAL}`, free and with that convolution:"
        f" {worse(ours, rival)} (seed 0 of each).\n"
        f"The convolution by itself changes the perplexity {' and '.join(alone)}.\n"
        "All of this is with the settings that all rows share; a decay of the recurrent layers, further below, helps\n"
        "a free LSTM more than a certified one.\n"
    )


RNNS = """The three RNNs start half of their units as leaky sums, are read through a matrix that starts as 4 I, and
their recurrent layers learn at a quarter of the rate ([docs/decisions.md](../../docs/decisions.md)).
"""
#: the settings that are each model's own in the second table
OWN = ("dropout", "input_dropout", "learning_rate", "recurrent_weight_decay")
OWN_ABOUT = """Each model at the best of the settings tried, chosen on the validation data: dropout (inputs and outputs
alike), learning rate and decay of the recurrent layers. The last of them was varied; all else is as in the price rows
above, which are the first tried. A row is made by `python benchmarks/wikitext2.py train MODEL-dropoutA-lrB-decayC`. A
model is compared with its free twin where both have tried the settings at which either is best.
"""


def own_settings(done: dict[str, list[Record]]) -> str:
    """Return the table of models at the best of the settings tried, chosen on the validation data."""

    def but_own(record: Record) -> tuple[Any, ...]:
        return record["model"], settings_but(record, *OWN)

    price = [rows[0] for rows in done.values() if rows[0]["table"] == "price"]
    tried: dict[str, list[Record]] = {}
    for row, (own, *_) in done.items():
        if own["table"] == "own settings":
            (shared,) = (record for record in price if but_own(record) == but_own(own))
            if tried.setdefault(own["model"], [shared])[0] is not shared:
                raise ValueError(f"{row} differs from the other rows of its model in more than what is its own")
            tried[own["model"]].append(own)
    models = sorted(tried, key=lambda model: best_of(tried[model])["mean"])
    lines = [own_row(tried[model], tried.get(twin(model), [])) for model in models]
    return f"{OWN_ABOUT}\n{table(*without_empty(OWN_HEADER, lines))}\n"


def best_of(tried: list[Record]) -> Record:
    return min(tried, key=lambda record: record["valid_mean"])


OWN_HEADER = [
    "model", "dropout", "learning rate", "decay of the layers", "minutes", "valid", "test", "test, shared settings",
    "against its free twin at its own best", "the same, shared settings",
    "rate (proved)", "horizon 10⁻² (proved)", "k* (estimate)", "local rate (estimate)", "tried (valid)",
]  # fmt: skip


def own_of(record: Record) -> list[str]:
    training = with_defaults(record["training"])
    decay = training["recurrent_weight_decay"]
    decay = training["weight_decay"] if decay is None else decay
    return [f"{each:g}" for each in (record["settings"]["dropout"], training["learning_rate"], decay)]


def own_row(tried: list[Record], free: list[Record]) -> list[str]:
    """Return the line of one model, from what it and its free twin tried; the first of each is with shared settings."""
    best = best_of(tried)
    comparable = tried is not free and own_of(best) in map(own_of, free) and own_of(best_of(free)) in map(own_of, tried)
    return [
        f"`{best['model']}`",
        *own_of(best),
        minutes(best),
        shown(best["valid_mean"]),
        f"**{best['mean']:.1f}**",
        shown(tried[0]["mean"]),
        worse(best, best_of(free) if comparable else None),
        worse(tried[0], free[0] if comparable else None),
        shown(rounded_up(best["certified_rate"])),
        shown(best["certified_horizon"]),
        shown(best["k_star"]),
        shown(best["local_rate"], 3),
        "; ".join(f"{', '.join(own_of(record))} ({record['valid_mean']:.1f})" for record in tried),
    ]


def how_far(row: str, first: Record) -> str:
    """Return how far a long run is from the article's figure, and how its curve still moved."""
    aim = PUBLISHED["stable-lstm" if row.startswith("certified") else "lstm"]
    valid = first["valid_by_epoch"]
    fell = 100 * (1 - valid[-1] / valid[-4])
    above, curve = 100 * (first["mean"] / aim - 1), ", ".join(f"{each:.1f}" for each in valid)
    return (
        f"- `{row}`: {above:.0f} % above the article's {aim}. Validation by epoch: {curve}; the last three took"
        f" {fell:.1f} % off, while the learning rate went to zero.\n"
    )


def against_free(row: str, done: dict[str, list[Record]]) -> str:
    """Return how a certified long run compares with the free one, which has another width and no convolution."""
    free = row.removeprefix("certified-")
    if free == row or free not in done:
        return ""
    return f"- `{row}` against `{free}`: {worse(done[row][0], done[free][0])}.\n"


HEADER = [
    "row", "units", "parameters", "minutes", "valid", "test", "against `lstm`", "against its free twin", "article",
    "rate (proved)",
    "horizon 10⁻² (proved)", "k* (estimate)", "local rate (estimate)", *(f"cut at {k}" for k in TRUNCATED),
    "recurrence, words/s",
]  # fmt: skip


def page() -> str:
    """Return the page."""
    done, timed = records(), speeds()
    lengths = ", ".join(map(str, CURVE))
    parts = [part for part in (INTRO.replace("{lengths}", lengths), training_speed()) if part]
    for name, title in TABLES.items():
        rows = ordered(done, name)
        if not rows:
            continue
        if name == "own settings":
            parts.append(f"## {title}\n\n{own_settings(done)}")  # which says what the settings are
            continue
        lines = [main_row(row, done, timed.get(row)) for row, _ in rows]
        parts.append(f"## {title}\n\n{table(*without_empty(HEADER, lines))}\n")
        if name == "one size":
            parts += [designed(done), RNNS]
        if name == "long":
            said = [how_far(row, found[0]) for row, found in rows] + [against_free(row, done) for row, _ in rows]
            parts.append("".join(said))
        if name == "price":
            parts.append(f"![test perplexity against the certified rate]({FIGURE.name})\n")
    if done:
        described = {row: found[0] for row, found in sorted(done.items()) if found[0]["table"] != "own settings"}
        parts.append(settings_of(described))
    return "\n".join(parts)


def without_empty(header: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Return a table without the columns in which no row has anything."""
    kept = [i for i in range(len(header)) if any(row[i] != MISSING for row in rows)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def settings_of(rows: dict[str, Record]) -> str:
    """Return the section on how rows were built and trained: what is usual once, then where each differs."""
    every = {row: settings_but(r, "seed") for row, r in rows.items()}  # a row is trained from several
    first, *others = every.values()
    common = [key for key in first if all(key in own for own in others)]
    usual = {key: statistics.mode(own[key] for own in every.values()) for key in common}
    lines = [f"- unless said, own settings apart: {listed(usual)}"]
    for row, own in every.items():
        differs = {key: value for key, value in own.items() if key not in usual or usual[key] != value}
        lines.append(f"- `{row}`: {listed(differs) or 'as usual'}")
    return "## Settings\n\n" + "\n".join(lines) + "\n"


def listed(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


def apart(heights: list[float], gap: float = 15) -> list[float]:
    """Return rising heights of labels moved down, where they must be, to stand `gap` apart."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + gap) if moved else height)
    return moved


def figure() -> str | None:
    """Return the drawing of test perplexity against the certified rate, or None before there is anything to draw."""
    price = [found[0] for found in records().values() if found[0]["table"] == "price"]
    curves = {
        model: sorted(
            (r["certified_rate"], r["mean"], r["certified_horizon"])
            for r in price
            if r["model"] == model and r["certified_horizon"] is not None
        )
        for model in COLOURS
    }
    marks = {r["model"]: r["mean"] for r in price if r["model"] not in COLOURS}
    values = [mean for points in curves.values() for _, mean, _ in points] + list(marks.values())
    if not any(curves.values()):
        return None
    low, high = math.log(0.97 * min(values)), math.log(1.03 * max(values))

    def x(rate: float) -> float:  # by 1 − rate, on a logarithmic scale
        share = (math.log(0.25) - math.log(1 - rate)) / (math.log(0.25) - math.log(0.003))
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(mean: float) -> float:
        return HEIGHT - BOTTOM - (math.log(mean) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    drawn = [
        text(LEFT, 24, "WikiText-2: test perplexity against the certified rate", size=16),
        text(LEFT, 44, "256 units, three epochs; dashed: free, or the paper's conditions; numbers: horizon in words"),
    ]
    for level in (*range(100, 200, 10), *range(200, 500, 20)):
        if low <= math.log(level) <= high:
            drawn.append(f'<path d="M{LEFT},{y(level):.1f} H{WIDTH - RIGHT}" stroke="#ddd"/>')
            drawn.append(text(LEFT - 8, y(level) + 4, str(level), anchor="end"))
    for rate in (0.8, 0.95, 0.98, 0.995):
        drawn.append(f'<path d="M{x(rate):.1f},{HEIGHT - BOTTOM} v6" stroke="black"/>')
        drawn.append(text(x(rate), HEIGHT - BOTTOM + 20, str(rate), anchor="middle"))
    drawn.append(
        text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, "certified rate (proved), by log(1 − rate)", anchor="middle")
    )
    for model, points in curves.items():
        if points:
            line = " L".join(f"{x(rate):.1f},{y(mean):.1f}" for rate, mean, _ in points)
            drawn.append(f'<path d="M{line}" fill="none" stroke="{COLOURS[model]}" stroke-width="2.5"/>')
        for rate, mean, horizon in points:
            drawn.append(f'<circle cx="{x(rate):.1f}" cy="{y(mean):.1f}" r="5" fill="{COLOURS[model]}"/>')
            drawn.append(text(x(rate) + 8, y(mean) - 8, f"{horizon:,}", colour=COLOURS[model]))
    for mean in marks.values():
        drawn.append(f'<path d="M{LEFT},{y(mean):.1f} H{WIDTH - RIGHT}" stroke="#444" stroke-dasharray="5 4"/>')
    names = [(y(points[-1][1]), model, COLOURS[model]) for model, points in curves.items() if points]
    names += [(y(mean), f"{model} {mean:.0f}", "#444") for model, mean in marks.items()]
    names.sort()
    for height, (_, name, colour) in zip(apart([height for height, *_ in names]), names, strict=True):
        drawn.append(text(WIDTH - RIGHT + 10, height + 4, name, colour=colour))
    return drawing(WIDTH, HEIGHT, drawn)
