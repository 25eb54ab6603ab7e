"""Series from CSV files: what is read, how it is split and scaled, what is refused; the published series."""

import gzip
from datetime import datetime, timedelta

import numpy as np
import pytest
import torch

from unrecurrent.errors import InputError
from unrecurrent.models import match_parameters
from unrecurrent.naive import baselines, best_season, seasonal_loss
from unrecurrent.recipes import default_parameters, find_recipe
from unrecurrent.tasks import SPLITS, get_task
from unrecurrent.tasks.csv_table import iso_date, read_csv
from unrecurrent.tasks.series import series_name
from unrecurrent.training import TrainingRun, task_interface


def write(path, columns):
    """Write columns as a CSV file."""
    lines = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def hours(count, start="2026-01-01"):
    first = datetime.fromisoformat(start)
    return [str(first + timedelta(hours=t)) for t in range(count)]


@pytest.fixture
def values():
    return np.random.default_rng(0).normal(3.0, 2.0, 203).round(4)


@pytest.fixture
def load_file(tmp_path, values):
    return write(tmp_path / "load.csv", {"date": hours(203), "wind": values[::-1], "load": values})


def test_forecasting_examples_are_the_change_to_each_future_value(load_file, values):
    task = get_task(series_name(load_file, target="load", horizon=3, longest=10))
    bounds = round(0.70 * 203), round(0.85 * 203)
    train, test = values[: bounds[0]], values[bounds[1] :]
    scaled = (test - train.mean()) / train.std()
    (example,) = task.load("test")
    assert example.inputs.shape == (len(test) - 3, 1)
    assert torch.allclose(example.inputs[:, 0], torch.tensor(scaled[:-3], dtype=torch.float32))
    for t in (0, 11, len(test) - 4):
        expected = [scaled[t + h] - scaled[t] for h in (1, 2, 3)]
        assert example.targets[t].tolist() == pytest.approx(expected, abs=1e-5)
    assert task.seconds == 3600
    assert task.span(48) == "48 steps (48 hours, 2 days)"


def test_covariates_stand_beside_the_target_and_all_takes_every_column_of_numbers(load_file):
    assert get_task(series_name(load_file, target="load")).features == 1
    named = get_task(series_name(load_file, target="load", covariates=["wind"]))
    everything = get_task(series_name(load_file, target="load", covariates=["all"]))
    assert named.features == everything.features == 2
    assert torch.equal(named.load("valid")[0].inputs, everything.load("valid")[0].inputs)
    assert get_task(f"series:{load_file}").target == "load"


def test_horizon_zero_hides_the_targets_own_past(load_file):
    task = get_task(series_name(load_file, target="load", horizon=0, covariates=["wind"]))
    (example,) = task.load("valid")
    assert task.features == task.outputs == 1
    whole = get_task(series_name(load_file, target="wind", horizon=0, covariates=["load"])).load("valid")[0]
    assert torch.equal(example.inputs, whole.targets)
    assert torch.equal(example.targets, whole.inputs)


def test_training_pieces_overlap_by_half_and_hold_every_step(load_file):
    task = get_task(series_name(load_file, target="load", longest=10))
    pieces = task.load("train")
    assert {len(piece.inputs) for piece in pieces} == {20}
    assert torch.equal(pieces[0].inputs[10:], pieces[1].inputs[:10])
    whole = task._example(task.series[0].parts["train"])
    assert torch.equal(pieces[-1].inputs, whole.inputs[-20:])
    assert set(whole.inputs[:, 0].tolist()) == {v for piece in pieces for v in piece.inputs[:, 0].tolist()}


def test_what_comes_after_the_training_part_changes_nothing_in_it(tmp_path, values):
    late = values.copy()
    late[150:] = 1e6
    before = get_task(f"series:{write(tmp_path / 'a.csv', {'x': values})}").load("train")
    after = get_task(f"series:{write(tmp_path / 'b.csv', {'x': late})}").load("train")
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(before, after, strict=True))


def test_several_series_are_told_apart_and_scaled_each_by_itself(tmp_path, values):
    columns = {
        "t": [d for d in hours(100) for _ in range(2)],
        "shop": ["a", "b"] * 100,
        "sold": np.stack([values[:100], 1000 * values[:100]], axis=1).ravel(),
    }
    path = write(tmp_path / "shops.csv", columns)
    task = get_task(series_name(path, target="sold", id_column="shop"))
    first, second = task.load("test")
    assert torch.allclose(first.inputs, second.inputs, atol=1e-5)
    assert task.seconds == 3600
    columns["shop"][5] = ""
    with pytest.raises(InputError, match=r"line 7 of .* has no 'shop' to tell its series by"):
        get_task(series_name(write(tmp_path / "nameless.csv", columns), target="sold", id_column="shop"))
    with pytest.raises(InputError, match=r"out of order.*tells several series apart"):
        get_task(series_name(path, target="sold"))


def test_columns_may_be_separated_by_semicolons_compressed_and_end_in_a_separator(tmp_path, values):
    text = "time;x;\n" + "".join(f"{d};{v};\n" for d, v in zip(hours(203), values, strict=True))
    path = tmp_path / "x.csv.gz"
    path.write_bytes(gzip.compress(text.encode("utf-8-sig")))
    table = read_csv(path)
    assert list(table.columns) == ["time", "x"]
    assert np.array_equal(table.numbers("x"), values)


def test_a_digest_follows_the_data(tmp_path, values):
    path = write(tmp_path / "x.csv", {"x": values})
    before = get_task(f"series:{path}").digest()
    assert get_task(f"series:{path}").digest() == before
    write(path, {"x": values + np.arange(203)})
    assert get_task(f"series:{path}").digest() != before


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        ({}, {"target": "lod"}, "did you mean 'load'"),
        ({}, {"target": "LOAD"}, "did you mean 'load'"),
        ({}, {"covariates": ["winds"]}, "did you mean 'wind'"),
        ({}, {"covariates": ["load"]}, "is the target"),
        ({}, {"id_column": "shop"}, "no column 'shop'"),
        ({}, {"horizon": 0}, "covariates alone"),
        ({}, {"horizon": 40}, "has 203 rows and a horizon of 40 needs at least"),
        ({}, {"horizon": 203}, "has 203 rows, none of them 203 steps ahead"),
        ({}, {"horizon": 10**15}, "has 203 rows, none of them 1000000000000000 steps ahead"),
        ({}, {"longest": 100}, "windows of up to 100 steps"),
        ({}, {"longest": 0}, "at least 1"),
        ({"load": [7.5] * 203}, {}, "'load' is constant: there is nothing to predict"),
        ({"wind": [7.5] * 203}, {"covariates": ["wind"]}, "'wind' is constant: leave it out"),
        ({"load": [0] * 160 + list(range(43))}, {}, "does not change in the training part"),
        ({"load": [1, 2, "", *range(200)]}, {}, "'load' has no value in line 4"),
        ({"load": [1, 2, "NaN", *range(200)]}, {}, "'load' has no value in line 4"),
        ({"load": [1, 2, "two", *range(200)]}, {}, "'two' in the column 'load', line 4"),
        ({"load": [1, 2, "inf", *range(200)]}, {}, "not a finite number"),
        ({"date": [*hours(2), *hours(201)]}, {}, "out of order: line 4"),
        ({"date": [*hours(202), "tomorrow"]}, {}, "'tomorrow' in line 204 .* is no date"),
        ({"date": ["", *hours(202)]}, {}, "'' in line 2 .* is no date"),
        ({"date": ["31st of May"] * 203}, {}, "'31st of May' in line 2 .* is no date"),
        ({"day": ["noon"] * 203}, {"time": "day"}, "'noon' in line 2 .* is no date"),
        ({"date": [f"{m}/1/2020" for m in (1, 3, 2)] * 67 + ["1/1/2020"] * 2}, {}, "out of order: line 4"),
        ({"date": [f"{200 - t}.5" for t in range(203)]}, {}, "out of order: line 3"),
    ],
)
def test_unusable_series_are_one_sentence(change, options, said, tmp_path, values):
    columns = {"date": hours(203), "wind": values[::-1], "load": values, **change}
    path = write(tmp_path / "load.csv", columns)
    with pytest.raises(InputError, match=said) as error:
        get_task(series_name(path, **{"target": "load", **options}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"a,b\n", "no rows"),
        (b"a,b\n1,2\n3\n", "line 3 .* has 1 values and the header 2"),
        (b"1,2\n3,4\n", "holds numbers"),
        (b"a,a\n1,2\n", "two columns named 'a'"),
        (b"a\n\xff\n", "not UTF-8"),
        (b"\x1f\x8bnot gzip", "damaged gzip"),
        (b"name\nx\ny\n", "no column of numbers"),
        (b"day|load\n1|2\n", r"separated by '\|': separate them by commas, semicolons or tabs"),
        (b"day load\n1 2\n", "separated by ' '"),
        (b"day;load\n" + b"1;2,5\n" * 60, "'2,5' in the column 'load', line 2 .*: write decimals with a point"),
        (b"day,load\n1,2,5\n", "decimals have a point, not a comma"),
        (b"x\n" + b"1\n2\n" * 30 + b"1e200\n" * 3, "standard deviations of its training part"),
        (b"x\n" + b"1e308\n-1e308\n" * 30, "too large to be squared"),
        (b"x\n" + b"1e-200\n0\n" * 30, "too small to be squared"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_unusable_files_are_one_sentence(content, said, tmp_path):
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=said) as error:
        get_task(f"series:{path}").load("test")
    assert "\n" not in str(error.value)


def test_names_that_lead_nowhere_are_one_sentence(tmp_path, load_file):
    for name, said in [
        ("series:", "series:FILE.csv"),
        (f"series:{tmp_path / 'none.csv'}", "no file"),
        (f"series:{load_file}?tagret=load", "unknown option 'tagret'"),
        (str(load_file), f"did you mean 'series:{load_file}'"),
        ("etth1", "did you mean 'ETTh1'"),
    ]:
        with pytest.raises(InputError, match=said.replace("?", r"\?")):
            get_task(name)


def test_options_survive_odd_names(tmp_path, values):
    path = write(tmp_path / "50% off?.csv", {"a&b=c": values, "x y": values[::-1]})
    task = get_task(series_name(path, target="a&b=c", covariates=["x y"]))
    assert (task.target, task.covariates) == ("a&b=c", ["x y"])
    assert get_task(f"series:{path}").target == "x y"


def test_dates_are_told_from_numbers_and_time_zones_are_applied():
    assert iso_date("20260131") is None
    assert iso_date("-3.5") is None
    assert iso_date("2026-01-31T12:00:00+02:00") == datetime(2026, 1, 31, 10)


@pytest.mark.parametrize(
    "form",
    [
        *("%Y/%m/%d", "%d.%m.%Y %H:%M", "%m/%d/%Y %H:%M:%S", "%d/%m/%Y", "%d-%b-%Y", "%d.%m.%y", "%Y/%m/%dT%H:%M"),
        *("%Y-%m-%d %I:%M %p", "%m/%d/%Y %I:%M:%S%p"),
    ],
)
def test_dates_in_other_forms_are_read_as_they_increase(form, tmp_path, values):
    dates = [(datetime(2020, 1, 1) + timedelta(days=t)).strftime(form) for t in range(203)]
    task = get_task(f"series:{write(tmp_path / 'x.csv', {'day': dates, 'x': values})}")
    assert (task.time, task.seconds) == ("day", 86_400)


def test_day_and_month_are_told_by_their_order(tmp_path, values):
    """Both readings are dates up to the twelfth: only one of them increases."""
    dates = [f"{1 + t % 12:02}/{1 + t // 12 % 12:02}/{2000 + t // 144}" for t in range(203)]
    assert get_task(f"series:{write(tmp_path / 'x.csv', {'day': dates, 'x': values})}").time == "day"


def test_numbers_are_the_time_where_their_name_says_so(tmp_path, values):
    task = get_task(f"series:{write(tmp_path / 'x.csv', {'Timestamp': range(203), 'x': values})}")
    assert (task.time, task.seconds) == ("Timestamp", None)


def test_a_column_of_dates_goes_before_one_that_is_only_called_time(tmp_path, values):
    columns = {"Time": ["12:00"] * 203, "day": hours(203), "x": values}
    assert get_task(f"series:{write(tmp_path / 'x.csv', columns)}").time == "day"
    with pytest.raises(InputError, match=r"'' in line 2 of .* is no date"):
        get_task(f"series:{write(tmp_path / 'y.csv', {'Date Time': ['', *['noon'] * 202], 'x': values})}")


def test_a_column_called_time_may_be_what_is_predicted(tmp_path, values):
    path = write(tmp_path / "x.csv", {"load": values[::-1], "time": values, "epoch": [t % 24 for t in range(203)]})
    task = get_task(f"series:{path}?target=time&covariates=epoch")
    assert (task.target, task.time) == ("time", None)


def test_numbers_beyond_what_can_be_squared_are_refused(tmp_path):
    task = get_task(f"series:{write(tmp_path / 'x.csv', {'x': [1e200 * (t % 7) for t in range(203)]})}")
    with pytest.raises(InputError, match="too large to be squared"):
        task.load("train")


def test_uneven_dates_give_no_hours(tmp_path, values):
    dates = [f"{2009 + m // 12}-{m % 12 + 1:02d}-01" for m in range(203)]
    task = get_task(f"series:{write(tmp_path / 'x.csv', {'month': dates, 'x': values})}")
    assert task.seconds is None
    assert task.span(12) == "12 steps"


def test_naive_forecasts_agree_with_their_definition(load_file):
    task = get_task(series_name(load_file, target="load", horizon=3, longest=10))
    series = np.concatenate([task.series[0].parts[s].targets[:, 0] for s in SPLITS])
    start, rows = round(0.85 * 203), len(task.load("test")[0].inputs)
    for season in (1, 2, 7):
        errors = [
            series[t + h] - series[t + h - season * -(-h // season)]
            for t in range(start, start + rows)
            for h in (1, 2, 3)
        ]
        assert seasonal_loss(task, "test", season) == pytest.approx(np.mean(np.square(errors)))
    last, seasonal = baselines(task)
    zero = torch.zeros_like(task.load("test")[0].targets)
    assert last.test == pytest.approx(float(task.loss(zero, task.load("test")[0].targets).mean()), rel=1e-5)
    assert seasonal.season == best_season(task)


def test_the_season_is_found_and_chosen_on_the_training_part(tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.1, 400)
    wave = np.sin(2 * np.pi * np.arange(400) / 12) + noise
    task = get_task(series_name(write(tmp_path / "x.csv", {"x": wave}), target="x", longest=20))
    assert best_season(task) == 12
    mean = get_task(
        series_name(write(tmp_path / "y.csv", {"x": wave, "y": wave[::-1]}), target="y", horizon=0, covariates=["x"])
    )
    (only,) = baselines(mean)
    assert only.name == "training-mean"
    assert only.test == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize(
    "model", ["rnn", "lstm", "gru", "window", "tcn", "gated-conv", "wavenet", "transformer", "ngram-lstm"]
)
def test_every_model_has_a_recipe_and_a_width(model, load_file):
    task = get_task(series_name(load_file, target="load", horizon=3))
    recipe = find_recipe(task, model, epochs=1)
    settings = match_parameters(model, task_interface(task), recipe.settings, default_parameters(task))
    trained = TrainingRun(task, model, settings, recipe.training).run()
    assert trained(task.load("test")[0].inputs[None]).shape[-1] == 3


def test_published_series_have_their_published_sizes(data_dir):
    expected = {
        "ETTh1": {"train": (512, 24), "valid": (2880 - 24, 24), "test": (2880 - 24, 24)},
        "tanks": {"train": (384, 1), "valid": (205, 1), "test": (1024, 1)},
        "F16": {"train": (2048, 3), "valid": (14746, 3), "test": (16384, 3)},
    }
    for name, sizes in expected.items():
        task = get_task(name, data_dir=data_dir)
        for split in SPLITS:
            assert tuple(task.load(split)[0].targets.shape) == sizes[split]
        assert sum(len(e.inputs) for e in task.load("test")) == {"ETTh1": 2856, "tanks": 1024, "F16": 73728}[name]


def test_a_published_series_equals_its_file_read_as_the_users_own(data_dir):
    task = get_task("ETTh1", data_dir=data_dir)
    own = read_csv(data_dir / "ett" / "ETTh1.csv").numbers("OT")
    assert len(own) == 17_420
    train = own[:8640]
    assert task.load("test")[0].inputs[0, 0].item() == pytest.approx(
        (own[11520] - train.mean()) / train.std(), rel=1e-5
    )


def test_missing_published_series_say_what_to_do(tmp_path):
    for name in ("ETTh1", "tanks", "F16"):
        with pytest.raises(InputError, match=f"unrecurrent data get {name}"):
            get_task(name, data_dir=tmp_path).load("train")
