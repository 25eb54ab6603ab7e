"""Tasks load what the literature scored, score it as the literature did, and refuse all else in one sentence."""

import errno
import math
import os
import subprocess
import sys
from importlib import metadata
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.io import savemat

from unrecurrent.errors import InputError
from unrecurrent.tasks import SPLITS, get_task, task_names
from unrecurrent.tasks import chorales as chorales_module
from unrecurrent.tasks.chorales import (
    NOT_CHORALES,
    PUBLISHED,
    REPEATED,
    Rolls,
    cache_path,
    corpus_files,
    load_rolls,
    music21_version,
    parse_corpus,
    parse_files,
    read_cache,
    split_names,
    to_roll,
    write_cache,
)
from unrecurrent.tasks.polyphony import KEYS
from unrecurrent.tasks.ptb_char import ALPHABET
from unrecurrent.tasks.task import data_folder


def need(folder: Path, file: str) -> None:
    if not (folder / file).exists():
        pytest.skip(f"{file} is not in the data folder")


def sentence(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


# --- the registry -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("typo", "meant"), [("jbs", "jsb"), ("coral", "chorales"), ("PTB-char", "ptb-char")])
def test_an_unknown_name_suggests_the_nearest(typo: str, meant: str) -> None:
    with pytest.raises(InputError) as error:
        get_task(typo)
    assert f"did you mean '{meant}'?" in sentence(error)
    assert all(name in sentence(error) for name in [*task_names(), "text:FILE"])


def test_the_path_of_a_text_file_suggests_the_text_task(tmp_path: Path) -> None:
    path = tmp_path / "novel.txt"
    path.write_text("x" * 50)
    with pytest.raises(InputError, match="did you mean 'text:"):
        get_task(str(path))


@pytest.mark.parametrize("name", ["chorales", "jsb", "ptb-char"])
def test_every_task_keeps_the_protocol(name: str) -> None:
    task = get_task(name)
    assert task.name == name
    assert (task.vocabulary is None) != (task.features is None)
    assert task.outputs == (task.vocabulary or task.features)
    assert task.metric.direction == "lower"


def test_data_are_looked_for_in_the_named_folder_then_the_environment_then_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNRECURRENT_DATA", str(tmp_path / "environment"))
    monkeypatch.setenv("UNRECURRENT_CACHE", str(tmp_path / "cache"))
    assert data_folder(tmp_path / "given") == tmp_path / "given"
    assert data_folder() == tmp_path / "environment"
    monkeypatch.delenv("UNRECURRENT_DATA")
    assert data_folder() == tmp_path / "cache" / "data"


@pytest.mark.parametrize("name", ["jsb", "ptb-char"])
def test_missing_files_are_named_with_the_place_they_belong(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        get_task(name, data_dir=tmp_path).load("train")
    assert f"unrecurrent data get {name}" in sentence(error)
    assert str(tmp_path / Path(get_task(name).sources[0].path)) in sentence(error)


# --- polyphonic music -------------------------------------------------------------------------------------------


def random_rolls(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [(generator.random((length, KEYS)) < 0.05).astype(np.uint8) for length in lengths]


def cells(rolls: list[np.ndarray]) -> np.ndarray:
    array = np.empty((1, len(rolls)), dtype=object)
    for i, roll in enumerate(rolls):
        array[0, i] = roll
    return array


def write_mat(folder: Path, **fields: object) -> Path:
    path = folder / "polymusic" / "JSB_Chorales.mat"
    path.parent.mkdir(exist_ok=True)
    whole = {name: cells(random_rolls(5, 9)) for name in ("traindata", "validdata", "testdata")}
    savemat(path, {name: value for name, value in (whole | fields).items() if value is not None})
    return path


@pytest.mark.parametrize(
    ("name", "file", "pieces", "chords"),
    [
        ("jsb", "JSB_Chorales.mat", [229, 76, 77], [13_807, 4_602, 4_725]),
        ("nottingham", "Nottingham.mat", [694, 173, 170], [176_561, 45_513, 44_463]),
        ("musedata", "MuseData.mat", [524, 135, 124], [245_202, 82_755, 64_339]),
        ("piano", "Piano_midi.mat", [87, 12, 25], [75_911, 8_540, 19_036]),
    ],
)
def test_piano_rolls_have_the_published_counts(
    name: str, file: str, pieces: list[int], chords: list[int], data_dir: Path
) -> None:
    need(data_dir, f"polymusic/{file}")
    task = get_task(name, data_dir=data_dir)
    loaded = {split: task.load(split) for split in SPLITS}
    assert [len(loaded[split]) for split in SPLITS] == pieces
    assert [sum(len(e.inputs) + 1 for e in loaded[split]) for split in SPLITS] == chords


def test_a_roll_is_predicted_from_its_second_chord_on(tmp_path: Path) -> None:
    rolls = random_rolls(7, 2, seed=1)
    write_mat(tmp_path, validdata=cells(rolls))
    for roll, example in zip(rolls, get_task("jsb", data_dir=tmp_path).load("valid"), strict=True):
        assert example.inputs.dtype == example.targets.dtype == torch.float32
        assert torch.equal(example.inputs, torch.from_numpy(roll[:-1]).float())
        assert torch.equal(example.targets, torch.from_numpy(roll[1:]).float())


def test_the_loss_is_the_sum_over_88_independent_keys_in_nats() -> None:
    task = get_task("jsb")
    logits = torch.randn(2, 3, KEYS, dtype=torch.float64)
    chords = (torch.rand(2, 3, KEYS) < 0.1).double()
    loss = task.loss(logits, chords)
    assert loss.shape == (2, 3)
    for b in range(2):
        for t in range(3):
            p = [1 / (1 + math.exp(-float(logits[b, t, j]))) for j in range(KEYS)]
            by_hand = -sum(math.log(p[j] if chords[b, t, j] else 1 - p[j]) for j in range(KEYS))
            assert float(loss[b, t]) == pytest.approx(by_hand, rel=1e-12)
    assert task.metric.scale == 1


def _with_a_two() -> np.ndarray:
    roll = random_rolls(6)[0]
    roll[3, 40] = 2
    return roll


@pytest.mark.parametrize(
    ("field", "words"),
    [
        (None, "no field 'traindata'"),
        (cells([random_rolls(5)[0][:, :80]]), r"shape \(5, 80\)"),
        (cells([np.array(["music"])]), "holds numbers"),
        (cells([_with_a_two()]), "other than 0 and 1"),
        (cells([np.full((4, KEYS), np.nan)]), "other than 0 and 1"),
        (cells(random_rolls(5, 1)), "piece 2 .* 1 step"),
        (np.empty((1, 0), dtype=object), "is empty"),
    ],
)
def test_a_mat_file_with_other_contents_is_refused(field: object, words: str, tmp_path: Path) -> None:
    path = write_mat(tmp_path, traindata=field)
    with pytest.raises(InputError, match=words) as error:
        get_task("jsb", data_dir=tmp_path).load("train")
    assert str(path) in sentence(error)


@pytest.mark.parametrize("keep", [0, 40, 150, 0.5, 0.95])
def test_a_damaged_mat_file_is_refused(keep: float, tmp_path: Path) -> None:
    path = write_mat(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    with pytest.raises(InputError) as error:
        get_task("jsb", data_dir=tmp_path).load("test")
    assert str(path) in sentence(error)


def test_a_text_file_named_mat_is_refused(tmp_path: Path) -> None:
    write_mat(tmp_path).write_text("<html>not found</html>" * 20)
    with pytest.raises(InputError, match="not a readable MATLAB 5 file"):
        get_task("jsb", data_dir=tmp_path).load("test")


# --- characters -------------------------------------------------------------------------------------------------


def test_ptb_char_has_the_published_counts(data_dir: Path) -> None:
    need(data_dir, "ptb-char/ptb.char.train.txt")
    task = get_task("ptb-char", data_dir=data_dir)
    assert task.vocabulary == task.outputs == 50
    characters, lines = [], []
    for split in SPLITS:
        ((inputs, targets),) = task.load(split)
        symbols = torch.cat([inputs[:1], targets])
        assert torch.equal(inputs[1:], targets[:-1])
        lines.append(int((symbols == 49).sum()))
        characters.append(len(symbols) - lines[-1])
        if split == "train":
            assert len(symbols.unique()) == 50
            text = "".join(ALPHABET[i] for i in symbols[:20])
            assert text == "aer_banknote_berlitz"
    assert characters == [4_975_414, 389_672, 438_662]
    assert lines == [42_068, 3_370, 3_761]


def write_ptb(folder: Path, content: bytes) -> Path:
    path = folder / "ptb-char" / "ptb.char.test.txt"
    path.parent.mkdir()
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("content", [b"a _ b \n c \n ", b" a _ b\n c\n", b"a _ b \n c"])
def test_ptb_char_reads_characters_and_line_ends(content: bytes, tmp_path: Path) -> None:
    write_ptb(tmp_path, content)
    ((inputs, targets),) = get_task("ptb-char", data_dir=tmp_path).load("test")
    assert "".join(ALPHABET[i] for i in inputs) == "a_b\nc"
    assert "".join(ALPHABET[i] for i in targets) == "_b\nc\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b" the cat \n", "separated by blanks"),
        (b"a b A \n", "holds 'A'"),
        (b"a \xff b\n", "no symbol"),
    ],
)
def test_another_file_is_no_ptb_char(content: bytes, words: str, tmp_path: Path) -> None:
    path = write_ptb(tmp_path, content)
    with pytest.raises(InputError, match=words) as error:
        get_task("ptb-char", data_dir=tmp_path).load("test")
    assert str(path) in sentence(error)


def test_characters_are_scored_in_bits(tmp_path: Path) -> None:
    path = tmp_path / "abc.txt"
    path.write_text("abcdefg" * 20)  # 7 symbols and one for all others
    task = get_task(f"text:{path}")
    loss = task.loss(torch.zeros(3, 5, 8), torch.randint(8, (3, 5)))
    assert loss.shape == (3, 5)
    assert task.metric.scale * float(loss.mean()) == pytest.approx(3.0)
    sure = torch.nn.functional.one_hot(torch.tensor([[0, 4, 2]]), 8) * 1e4
    assert task.loss(sure.float(), torch.tensor([[0, 4, 3]])).tolist() == [[0, 0, 1e4]]


def test_a_text_is_split_by_position_with_the_vocabulary_of_its_first_part(tmp_path: Path) -> None:
    text = "ab\u00e4\U0001f600\n" * 180 + "ab?\n\n" * 10 + "b!a\r\n" * 10  # 900 + 50 + 50 characters
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    task = get_task(f"text:{path}")
    assert task.name == f"text:{path}"
    assert task.characters == "\nab\u00e4\U0001f600"
    assert task.vocabulary == task.outputs == 6
    assert task.stream
    shown = []
    for split in SPLITS:
        ((inputs, targets),) = task.load(split)
        assert inputs.dtype == torch.int64
        symbols = torch.cat([inputs, targets[-1:]])
        shown.append("".join((task.characters + "\N{REPLACEMENT CHARACTER}")[i] for i in symbols))
    unknown = "\N{REPLACEMENT CHARACTER}"
    assert shown == [text[:900], text[900:950].replace("?", unknown), f"b{unknown}a{unknown}\n" * 10]


def test_a_byte_order_mark_is_no_character(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("ab" * 50, encoding="utf-8-sig")
    assert get_task(f"text:{path}").characters == "ab"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" * 9, "binary"),
        (("text " * 20).encode("utf-16"), "binary file, or text in another encoding"),
        (("caf\u00e9 " * 20).encode("latin-1"), r"not UTF-8 text \(byte 3"),
        (b"too short", "9 characters"),
    ],
)
def test_what_is_no_text_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=words) as error:
        get_task(f"text:{path}")
    assert str(path) in sentence(error)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("name", "words"), [("text:", "text:FILE"), ("text:no/such.txt", "no file"), ("text:.", "cannot")]
)
def test_a_text_that_cannot_be_read_is_refused(name: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        get_task(name)
    sentence(error)


# --- chorales: rolls and splits ---------------------------------------------------------------------------------


def plain_roll(notes: list[tuple[int, float, float]]) -> np.ndarray:
    """Ask at every quarter of the score which keys sound, then cut the silence off both ends."""
    chords = []
    for step in range(math.ceil(max(end for _, _, end in notes))):
        sounding = [pitch for pitch, start, end in notes if start <= step < end]
        chords.append([int(21 + key in sounding) for key in range(KEYS)])
    while chords and not any(chords[0]):
        chords.pop(0)
    while chords and not any(chords[-1]):
        chords.pop()
    return np.array(chords, np.uint8).reshape(-1, KEYS)


NOTES = st.tuples(
    st.integers(15, 115), st.integers(0, 24).map(lambda n: n / 4), st.integers(1, 16).map(lambda n: n / 4)
).map(lambda note: (note[0], note[1], note[1] + note[2]))


@given(st.lists(NOTES, min_size=1, max_size=12))
def test_a_roll_holds_what_sounds_at_each_quarter(notes: list[tuple[int, float, float]]) -> None:
    assert np.array_equal(to_roll(notes), plain_roll(notes))


def test_thirds_of_a_quarter_do_not_miss_their_beat() -> None:
    third = 1 / 3
    assert to_roll([(60, 0.0, third), (62, third * 3 + 1e-12, 2.0)])[:, [39, 41]].tolist() == [[1, 0], [0, 1]]


def test_the_split_is_a_fixed_partition() -> None:
    names = [f"bwv{number}" for number in range(250, 450)]
    parts = split_names(names)
    assert [len(parts[split]) for split in SPLITS] == [140, 30, 30]
    assert sorted(chain.from_iterable(parts.values())) == names
    assert split_names(names[::-1]) == parts
    assert parts["test"][:4] == ["bwv407", "bwv439", "bwv372", "bwv370"]


# --- chorales: the scores ---------------------------------------------------------------------------------------

music21 = pytest.mark.skipif(
    not any(d.metadata["Name"] == "music21" for d in metadata.distributions()), reason="needs the package music21"
)


@music21
def test_the_scores_are_390_chorales() -> None:
    stems = [path.stem for path in corpus_files()]
    assert len(stems) == len(set(stems)) == 390
    assert not set(stems) & (REPEATED | NOT_CHORALES)
    corpus = {path.stem for path in corpus_files()[0].parent.iterdir()}
    assert corpus >= (REPEATED | NOT_CHORALES)  # a name that is not there would leave nothing out


@music21
def test_a_few_chorales_parsed_live_have_the_pinned_rolls() -> None:
    few = {path.stem: path for path in corpus_files()}
    names = ["bwv253", "bwv56.5", "bwv66.6", "bwv1.6"]  # plain; a rest to begin with; eighths; instruments besides
    seen: list[tuple[int, int]] = []
    notes = parse_files([few[name] for name in names], advance=lambda done, total: seen.append((done, total)))
    rolls = tuple(to_roll(notes[few[name]]) for name in names)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [len(roll) for roll in rolls] == [40, 51, 36, 80]
    assert Rolls(tuple(names), rolls).digest() == "c8aed1d2325b8a97d16de07a2d0304012723701c74939c13f522f65adc4bda1e"
    assert (rolls[0][0].nonzero()[0] + 21).tolist() == [45, 64, 69, 73]  # A E A C sharp: BWV 253 is in A major


@music21
def test_a_plain_script_without_a_main_guard_can_parse(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from unrecurrent.tasks.chorales import corpus_files, parse_files\n"
        "print('parsed', [len(notes) > 0 for notes in parse_files(corpus_files()[:2]).values()])\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "parsed [True, True]\n"), done.stderr


@music21
def test_a_score_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "bwv999.mxl"
    broken.write_bytes(b"PK\3\4 no score")
    with pytest.raises(InputError, match=r"could not read bwv999\.mxl") as error:
        parse_files([broken])
    sentence(error)


def test_music21_missing_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(chorales_module.metadata, "version", absent)
    with pytest.raises(InputError, match=r"pip install 'unrecurrent\[music\]'") as error:
        get_task("chorales").load("train")
    sentence(error)


# --- chorales: the cache ----------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the test's own, and no parsing."""
    monkeypatch.setenv("UNRECURRENT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(chorales_module, "music21_version", lambda: "0.test")
    monkeypatch.setattr(chorales_module, "parse_corpus", lambda *, show_progress: some_chorales())
    return tmp_path / "cache"


def some_chorales() -> Rolls:
    lengths = range(3, 23)
    return Rolls(tuple(f"bwv{n}" for n in lengths), tuple(random_rolls(*lengths)))


def test_the_cache_is_filled_once_and_then_read(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = get_task("chorales").load("train")
    assert [path.name for path in cache.iterdir()] == ["chorales-1-music21-0.test.npz"]

    def never(**_: object) -> Rolls:
        raise AssertionError("parsed again")

    monkeypatch.setattr(chorales_module, "parse_corpus", never)
    task = get_task("chorales")
    again = task.load("train")
    assert [len(task.load(split)) for split in SPLITS] == [14, 3, 3]
    assert all(torch.equal(a.targets, b.targets) for a, b in zip(first, again, strict=True))
    by_name = dict(zip(some_chorales().names, some_chorales().rolls, strict=True))
    expected = [by_name[name] for name in split_names(some_chorales().names)["train"]]
    assert all(torch.equal(e.inputs, torch.from_numpy(r[:-1]).float()) for e, r in zip(again, expected, strict=True))


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage", [_flipped, lambda c: c[: len(c) // 2], lambda c: b"", lambda c: b"not an archive" * 99]
)
def test_a_damaged_cache_is_reported_and_left_alone(damage, cache: Path) -> None:
    load_rolls(show_progress=False)
    damaged = damage(cache_path().read_bytes())
    cache_path().write_bytes(damaged)
    with pytest.raises(InputError, match="are damaged: delete that file") as error:
        get_task("chorales").load("train")
    assert str(cache_path()) in sentence(error)
    assert cache_path().read_bytes() == damaged


def test_a_well_formed_cache_with_other_contents_is_damaged(cache: Path) -> None:
    load_rolls(show_progress=False)
    with np.load(cache_path()) as stored:
        fields = dict(stored)
    fields["rolls"][0, 0] ^= 1
    np.savez_compressed(cache_path(), **fields)
    with pytest.raises(InputError, match="are damaged"):
        read_cache(cache_path())


def test_a_full_disk_leaves_no_cache_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file, **_: object) -> None:
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(InputError, match="No space left on device") as error:
        get_task("chorales").load("train")
    sentence(error)
    assert list(cache.iterdir()) == []


def test_a_cache_folder_that_cannot_be_made_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("UNRECURRENT_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(chorales_module, "music21_version", lambda: "0.test")
    with pytest.raises(InputError, match="UNRECURRENT_CACHE") as error:
        get_task("chorales").load("train")
    sentence(error)


def test_rolls_survive_the_cache(tmp_path: Path) -> None:
    chorales = some_chorales()
    write_cache(tmp_path / "rolls.npz", chorales)
    back = read_cache(tmp_path / "rolls.npz")
    assert back.names == chorales.names
    assert all(np.array_equal(a, b) for a, b in zip(back.rolls, chorales.rolls, strict=True))


@pytest.fixture(scope="module")
def all_chorales() -> Rolls:
    """Every chorale: from the cache of an earlier run (`make demo`), else parsed now, which takes about 15 s."""
    try:
        path = cache_path()
    except InputError:
        pytest.skip("needs the package music21")
    if music21_version() != PUBLISHED[0]:
        pytest.skip(f"the counts are those of music21 {PUBLISHED[0]}")
    return read_cache(path) if path.exists() else parse_corpus(show_progress=False)


@pytest.mark.slow
def test_all_chorales_have_the_published_counts(all_chorales: Rolls) -> None:
    assert len(all_chorales.rolls) == 390
    assert all_chorales.digest() == PUBLISHED[1]
    length = {name: len(roll) for name, roll in zip(all_chorales.names, all_chorales.rolls, strict=True)}
    parts = split_names(all_chorales.names)
    assert [len(parts[split]) for split in SPLITS] == [273, 58, 59]
    assert [sum(length[name] for name in parts[split]) for split in SPLITS] == [14_936, 3_210, 3_326]


@pytest.mark.slow
def test_no_test_chorale_is_a_training_chorale_transposed_or_with_its_repeat_written_out(all_chorales: Rolls) -> None:
    def heard(chords: np.ndarray) -> bytes:
        return np.roll(chords, -int(chords.any(0).nonzero()[0][0]), axis=1).tobytes()

    ends = [(heard(roll[:8]), heard(roll[-8:])) for roll in all_chorales.rolls]
    assert len(set(ends)) == len(ends)
