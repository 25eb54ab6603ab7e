"""The look-back window of series whose memory is known, the rules behind it, and the command line."""

import copy
import json
import re
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest

from command import run
from unrecurrent import lookback, worker
from unrecurrent.errors import InputError
from unrecurrent.knee import Trained, judge
from unrecurrent.lookback import lengths_measured, look_back, series_of, tcn_shape
from unrecurrent.models import build_model
from unrecurrent.models.sequence_model import Interface

DELAY = 5


def in_this_process(jobs, labels, *, quiet=False):
    """Train in this process: what `run_jobs` does in processes of their own is tested with `compare`."""
    for job in jobs:
        Path(job.folder).mkdir(parents=True, exist_ok=True)
    with redirect_stdout(StringIO()):  # a worker tells of its progress there
        return [worker.run_job(job) for job in jobs]


@pytest.fixture(scope="module")
def delayed(tmp_path_factory):
    """A file whose column y is u five steps before, with noise of a tenth of its variance."""
    generator = np.random.default_rng(0)
    u = generator.normal(size=1500)
    y = np.concatenate([np.zeros(DELAY), u[:-DELAY]]) + np.sqrt(0.1) * generator.normal(size=1500)
    path = tmp_path_factory.mktemp("series") / "delayed.csv"
    rows = "".join(f"{a:.5f},{b:.5f}\n" for a, b in zip(u, y, strict=True))
    path.write_text("u,y\n" + rows, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def found(delayed):
    name = series_of(str(delayed), target="y", horizon=0, covariates=("u",), longest=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lookback, "run_jobs", in_this_process)
        return look_back(name, seeds=2, epochs=15, progress=False)


def test_the_window_of_a_delay_is_found_and_confirmed(found):
    # A network trained on a few hundred steps takes one more, which steadies the first it really needs.
    assert found.window in (DELAY + 1, DELAY + 2)
    assert found.band[0] >= DELAY + 1
    assert found.lost_at_half.low > 1
    assert abs(found.gained_at_double.value) < 0.05
    assert {knee.name: knee.place for knee in found.knees} == {"window": "where predicted", "tcn": "where predicted"}
    assert found.forward.reach in (DELAY + 1, DELAY + 2)
    assert found.text.startswith(f"Look back {found.window} steps. ")
    assert "it is" in found.text


def test_every_row_is_there_and_better_than_the_mean_where_it_sees_enough(found):
    rows = {row["model"]: row for row in found.to_dict()["rows"]}
    at = f"window {found.window}"
    assert {"lstm", "window 3", at, f"window {2 * found.window}", "training-mean"} <= rows.keys()
    assert rows["training-mean"]["mean"] == pytest.approx(1, rel=0.3)
    assert rows["window 3"]["mean"] > 0.8
    assert rows[at]["mean"] < 0.3
    assert "window" in found.table
    assert "(measured)" in found.table


def test_records_have_the_keys_of_every_results_file(found):
    first, *rest = found.records
    assert (first["metric"], first["mean"], first["split"]) == ("k_star", found.window, "valid")
    assert {record["metric"] for record in rest} == {"mse"}
    assert {record["k"] for record in rest if record["model"] == "window"} == {3, found.window, 2 * found.window}
    json.dumps(found.records, allow_nan=False)


def test_the_report_is_one_page_with_the_question_and_the_answer(found, tmp_path):
    found.save_report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "How long a window does y in delayed.csv need?" in page
    assert re.search(r'<p class="answer" id="verdict">Look back [67] steps\.</p>', page)


def trained(name, reach, losses):
    return Trained(name, {"hidden_size": 1}, reach, [{"test_loss": loss, "valid_loss": loss} for loss in losses])


@pytest.mark.parametrize(
    ("half", "at", "double", "place"),
    [
        ([1.50, 1.51, 1.49], [1.00, 1.01, 0.99], [1.00, 1.01, 0.99], "where predicted"),
        ([1.50, 1.51, 1.49], [1.00, 1.01, 0.99], [0.70, 0.71, 0.69], "later"),
        ([0.98, 0.981, 0.979], [1.00, 1.001, 0.999], [1.00, 1.001, 0.999], "earlier"),
        ([1.02, 1.10, 0.94], [1.00, 1.08, 0.92], [1.00, 1.08, 0.92], "cannot tell"),
        ([1.02, 1.03, 1.01], [1.00, 1.01, 0.99], [1.10, 1.50, 0.90], "cannot tell"),
    ],
)
def test_the_knee_follows_from_the_losses(half, at, double, place):
    knee = judge(trained("window", 4, half), trained("window", 8, at), trained("window", 16, double), 0.01)
    assert knee.place == place
    assert "against 8 steps: the error is" in knee.text
    assert ("larger with 4 and" in knee.text) == (half[0] > at[0])


@pytest.mark.parametrize(("times", "place"), [(1, "cannot tell"), (3, "where predicted")])
def test_two_seeds_prove_less_than_six_that_spread_as_much(times, place):
    half, at, double = (losses * times for losses in ([1.03, 1.04], [1.0, 1.01], [1.0, 1.01]))
    knee = judge(trained("window", 4, half), trained("window", 8, at), trained("window", 16, double), 0.01)
    assert knee.place == place


@pytest.mark.parametrize("seeds", [(1, 1, 1), (3, 3, 1), (1, 3, 3)])
def test_one_seed_proves_no_knee(seeds):
    half, at, double = ([loss] * count for loss, count in zip((1.5, 1.0, 1.0), seeds, strict=True))
    knee = judge(trained("window", 4, half), trained("window", 8, at), trained("window", 16, double), 0.01)
    assert knee.place == "cannot tell"
    assert knee.text.endswith("cannot be told from one seed (three or more show the spread).")


def test_a_window_of_one_step_has_no_half():
    knee = judge(None, trained("tcn", 1, [1.0, 1.0]), trained("tcn", 3, [1.0, 1.0]), 0.01)
    assert (knee.lost_at_half, knee.place) == (None, "where predicted")
    assert "against 1 steps: the error is 0.0% smaller with 3; " in knee.text


def test_a_window_beyond_what_is_considered_is_said_to_be_so(found, delayed, monkeypatch):
    jobs = []
    monkeypatch.setattr(lookback, "run_jobs", lambda js, *_, **__: jobs.extend(js) or in_this_process(js, ()))
    name = series_of(str(delayed), target="y", horizon=0, covariates=("u",), longest=4)
    result = look_back(name, seeds=1, epochs=20, weight_decay=0.5, progress=False)
    assert {job.training.weight_decay for job in jobs} == {0.5}
    assert (result.window, result.knees) == (None, ())
    assert result.text.startswith("Look back more than 4 steps")
    assert "No window was found, so that none could be checked." in result.text
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    from lookback_real import figure

    assert "relative to that at 4 steps" in figure(result)
    assert "k* is more than 4, not checked" in figure(result)
    assert "relative to that at k*" in figure(found)
    assert {m.reach for m in result.models if m.name == "window"} == {2, 4}
    assert result.records[0]["mean"] is None
    result.to_dict()


def test_the_first_sentence_says_what_speaks_against_the_window(found):
    later, earlier = (replace(knee, place=place) for knee, place in zip(found.knees, ("later", "earlier"), strict=True))
    first = f"Look back {found.window} steps by the curve, but "
    doubted = replace(found, knees=(later, earlier))
    assert doubted.text.startswith(first + "the check with window says longer and the check with tcn says shorter. ")
    doubted = replace(found, knees=(later, replace(earlier, place="later")))
    assert doubted.text.startswith(first + "the check with window and tcn says longer. ")
    naive = replace(found.naive[0], test=0.0)
    forward = f"{found.forward.name} that sees {found.forward.reach} steps"
    assert replace(found, naive=(naive,)).text.startswith(first + f"training-mean is no worse than the {forward}. ")
    poor = found.models[0]
    poor = replace(poor, results=[{**result, "valid_loss": 9.0} for result in poor.results])
    assert f" is better than the {poor.label} the curve is of. " in replace(found, measured=poor).text


def test_a_window_as_long_as_any_considered_is_a_lower_bound(found):
    task = copy.copy(found.task)
    task.length = 2 * found.window
    at_the_end = replace(found, task=task, profile=replace(found.profile, ks=found.profile.ks[:3]))
    assert at_the_end.text.startswith(f"Look back at least {found.window} steps")
    assert "bounded from below only" in at_the_end.text
    assert "the whole past gains" in at_the_end.text
    assert found.records[0]["verdict"] == found.text
    assert len(found.records[0]["curve"]) == len(found.profile.ks)


@pytest.mark.parametrize("reach", [1, 2, 3, 5, 12, 24, 63, 168, 512])
def test_a_tcn_of_nearly_any_reach_can_be_built(reach):
    seen = build_model("tcn", Interface(None, 1, 1), {"hidden_size": 2, **tcn_shape(reach)}).receptive_field
    assert abs(np.log(seen / reach)) <= (0.42 if reach == 2 else 0.1)


def test_lengths_are_closed_under_doubling_up_to_the_longest():
    ks = lengths_measured(256)
    assert ks[-1] == 256
    assert all(2 * k in ks for k in ks if 2 * k <= 256)
    assert all(k // 2 in ks for k in ks if k > 1)


def test_what_cannot_be_looked_back_on_is_one_sentence(delayed):
    name = series_of(str(delayed), target="y")
    for call, said in [
        (lambda: look_back("jsb"), "no time series"),
        (lambda: look_back(name, model="tcn"), "not recurrent"),
        (lambda: look_back(name, model="lsmt"), "did you mean 'lstm'"),
        (lambda: look_back(name, seeds=0), "at least 1"),
        (lambda: look_back(name, delta=0.0), "between 0 and 1"),
        (lambda: look_back(name, weight_decay=-1.0), "weight_decay must be 0 or more"),
        (lambda: series_of("ETTh1", target="OT"), "brings its own"),
        (lambda: series_of(str(delayed)), "name the column to predict with --target: .* u, y"),
    ]:
        with pytest.raises(InputError, match=said):
            call()


def test_the_command_prints_table_and_answer_or_json_and_reuses_its_trainings(delayed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lookback, "run_jobs", in_this_process)
    words = ("lookback", delayed, "--target", "y", "--covariates", "u", "--longest", 4, "--seeds", 1, "--epochs", 1)
    words += ("--runs", tmp_path / "runs", "--records", tmp_path / "r.json", "--report", tmp_path / "r.html")
    code, out, err = run(capsys, monkeypatch, *words)
    assert code == 0
    assert "Look back" in out
    assert "seasonal-naive" in out
    assert "the last 4 inputs" in err
    assert len(json.loads((tmp_path / "r.json").read_text())) >= 7
    assert (tmp_path / "r.html").exists()
    code, out, _ = run(capsys, monkeypatch, *words, "--json")
    assert json.loads(out)["window"]["label"] == "estimate"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "name the column to predict"),
        (("--target", "Y"), "did you mean 'y'"),
        (("--target", "y", "--horizon", "2000"), "none of them 2000 steps ahead"),
        (("--target", "y", "--horizon", "900"), "needs at least"),
        (("--target", "y", "--horizon", "0"), "covariates alone"),
    ],
)
def test_mistakes_end_with_one_sentence_and_code_two(options, said, delayed, capsys, monkeypatch):
    code, out, err = run(capsys, monkeypatch, "lookback", delayed, *options)
    assert code == 2
    assert said in err
    assert out == ""
    assert len(err.strip().splitlines()) == 1


def test_help_shows_a_runnable_example(capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "lookback", "--help")
    assert code == 0
    assert "Example: unrecurrent lookback" in " ".join(out.split())
