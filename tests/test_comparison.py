"""Comparing models: equal budgets, reused trainings, records, and a report a newcomer can open."""

import json

import pytest

import unrecurrent as ur
from unrecurrent import comparison as comparison_module
from unrecurrent.comparison import Contender
from unrecurrent.errors import InputError
from unrecurrent.models import build_model
from unrecurrent.recipes import Recipe
from unrecurrent.records import KEYS, make_record, read_records, write_records
from unrecurrent.search import draw_recipes
from unrecurrent.tasks import get_task
from unrecurrent.training import task_interface
from unrecurrent.verdict import RULES

SENTENCES = "the cat sat on the mat. the dog sat on the log. a cat and a dog sat. "


@pytest.fixture(scope="module")
def text_task(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "cats.txt"
    path.write_text(SENTENCES * 40, encoding="utf-8")
    return f"text:{path}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def comparison(text_task, runs):
    return ur.compare(
        text_task,
        models=["lstm", "stable-rnn", "tcn:layers=2", "window:k=3"],
        seeds=2,
        parameters=20_000,
        epochs=2,
        folder=runs,
        positions=100,
        progress=False,
    )


def test_budgets_are_equal(comparison):
    params = [record["params"] for record in comparison.records]
    assert max(params) <= 1.05 * 20_000
    assert min(params) >= 0.95 * 20_000
    assert comparison.budget["epochs"] == 2
    tokens = {result["tokens"] for entry in comparison.entries for result in entry.results}
    assert tokens == {comparison.budget["tokens read"]}


def test_records_follow_the_schema(comparison, tmp_path):
    for record in comparison.records:
        assert set(KEYS) <= set(record)
        assert record["seeds"] == 2
        assert record["std"] >= 0
        assert record["train_tokens_per_s"] > 0
        assert record["generate_steps_per_s"] > 0
        assert record["peak_memory_mib"] > 50
        assert {"command", "commit", "machine", "date"} <= set(record)
    assert [r["model"] for r in comparison.records] == ["lstm", "stable-rnn", "tcn", "window"]
    assert comparison.records[2]["variant"] == "layers 2"
    assert comparison.records[3]["k"] == 3
    assert comparison.records[3]["variant"] is None
    write_records(tmp_path / "r.json", comparison.records)
    assert read_records(tmp_path / "r.json") == comparison.records


def test_stable_model_is_certified_and_the_others_say_so(comparison):
    proved = {r["model"]: r["certified_rate"] for r in comparison.records}
    assert proved["stable-rnn"] < 1
    assert proved["lstm"] is None
    assert proved["tcn"] is None


def test_the_horizon_of_a_record_is_one_of_the_models_inputs(text_task):
    task = get_task(text_task)
    model = build_model("certified-lstm", task_interface(task), {"hidden_size": 8, "input_kernel": 4})
    of_the_layers = model.certificate().horizon(1e-2)
    assert comparison_module.proved(model, task)["certified_horizon"] == of_the_layers + 3


def test_memory_of_feed_forward_models_is_within_their_receptive_field(comparison):
    for entry in comparison.entries:
        if entry.receptive_field is not None:
            assert entry.memory.k(1e-6) <= 2 * entry.receptive_field  # the next power of two at most


def test_second_call_reuses_the_trainings(comparison, text_task, runs):
    kept = {p: p.stat().st_mtime_ns for p in runs.glob("*/result.json")}
    assert len(kept) == 8
    ur.compare(
        text_task,
        models=["lstm", "window:k=3"],
        seeds=2,
        parameters=20_000,
        epochs=2,
        folder=runs,
        positions=10,
        progress=False,
    )
    assert {p: p.stat().st_mtime_ns for p in runs.glob("*/result.json")} == kept


def test_table_verdict_and_report_are_readable(comparison, tmp_path):
    assert "window:k=3" in comparison.table
    assert comparison.verdict.answer in ("yes", "no", "cannot tell")
    assert comparison.verdict.rules == RULES
    json.dumps(comparison.to_dict(), allow_nan=False)
    comparison.save_report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(page) < 6_000_000
    assert comparison.verdict.answer.split()[0] in page.lower()


def test_tuning_gives_every_model_the_same_draws(text_task, tmp_path):
    result = ur.compare(
        text_task,
        models=["rnn", "stable-rnn"],
        seeds=1,
        parameters=5_000,
        epochs=1,
        trials=2,
        folder=tmp_path,
        positions=20,
        progress=False,
    )
    trainings = [json.loads(p.read_text())["training"] for p in tmp_path.glob("*/job.json")]
    assert len({t["learning_rate"] for t in trainings}) == 2
    rnn, stable = result.entries
    assert stable.recipe.training == rnn.recipe.training
    assert result.verdict.answer == "cannot tell"


def test_draws_are_spread_and_keep_what_is_fixed():
    base = Recipe({"dropout": 0.7, "k": 4})
    drawn = draw_recipes(base, 5, {"dropout": 0.7})
    assert {r.settings["k"] for r in drawn} == {4}
    assert {r.settings["dropout"] for r in drawn} == {0.7}
    assert len({r.training.learning_rate for r in drawn}) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lstn", "did you mean 'lstm'"),
        ("window:k", "write a setting as NAME:KEY=VALUE"),
        ("window:k=four", "must be a number"),
    ],
)
def test_bad_model_names_are_one_sentence(text, message):
    with pytest.raises(InputError, match=message):
        Contender.parse(text)


def test_bad_requests_are_one_sentence(text_task):
    with pytest.raises(InputError, match="named twice"):
        ur.compare(text_task, models=["lstm", "lstm"])
    with pytest.raises(InputError, match="seeds must be a whole number of at least 1, not 0"):
        ur.compare(text_task, seeds=0)
    with pytest.raises(InputError, match="either epochs or a positive number of minutes"):
        ur.compare(text_task, epochs=1, minutes=1.0)
    with pytest.raises(InputError, match="either epochs or a positive number of minutes"):
        ur.compare(text_task, minutes=-1.0)
    with pytest.raises(InputError, match="hidden_size follows from the budget"):
        ur.compare(text_task, models=["lstm:hidden_size=3"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"models": "lstn"}, "unknown model 'lstn'"),
        ({"models": 3}, "models must be names"),
        ({"models": ["lstm", 3]}, "models must be names"),
        ({"seeds": 2.5}, "seeds must be a whole number of at least 1, not 2.5"),
        ({"trials": "a"}, "trials must be a whole number"),
        ({"positions": True}, "positions must be a whole number"),
        ({"parameters": "a"}, "parameters must be a whole number of at least 1, not 'a'"),
        ({"parameters": 0}, "parameters must be a whole number of at least 1, not 0"),
        ({"epochs": float("inf")}, "epochs must be positive and finite"),
        ({"epochs": "a"}, "epochs must be positive and finite"),
        ({"minutes": "a"}, "either epochs or a positive number of minutes"),
        ({"parameters": 300}, r"comes within 2\.4% of 300 parameters"),
    ],
)
def test_values_of_the_wrong_kind_are_one_sentence(given, said, text_task):
    with pytest.raises(InputError, match=said) as raised:
        ur.compare(text_task, **{"models": ["lstm"], **given})
    assert len(str(raised.value).splitlines()) == 1


def test_a_task_is_a_name():
    with pytest.raises(InputError, match="a task is given by its name"):
        ur.compare(3)


def test_one_model_may_be_named_without_a_list():
    (contender,) = comparison_module._contenders("window:k=4")
    assert contender.label == "window:k=4"


def test_minutes_become_epochs_of_the_slowest_model_once(text_task, tmp_path, monkeypatch):
    session = comparison_module._Session(get_task(text_task), None, tmp_path, 20_000, None, progress=False)
    contenders = [Contender.parse("lstm"), Contender.parse("tcn:layers=2")]
    assert 0 < session.affordable(contenders, 1e-6) < 0.01
    many = session.affordable(contenders, 20.0)
    assert many > 1
    assert session.affordable(contenders, 20.0) == many
    timed: list[str] = []
    monkeypatch.setattr(comparison_module, "epochs_within", lambda *given: timed.append("again") or 7)
    assert session.affordable(contenders, 20.0) == many
    assert session.affordable(contenders, 21.0) == 7
    assert timed == ["again"]


def test_damaged_results_are_one_sentence(tmp_path):
    path = tmp_path / "r.json"
    path.write_text("{")
    with pytest.raises(InputError, match="is no file of results"):
        read_records(path)
    path.write_text('[{"task": "jsb"}]')
    with pytest.raises(InputError, match="lack"):
        read_records(path)
    record = make_record(command="c", task="jsb", model="rnn", metric="nll", split="test", mean=1.0, seeds=1)
    assert list(record)[: len(KEYS)] == list(KEYS)
