"""The verdict follows from the numbers by its rules: no, yes, and cannot tell."""

import pytest

from unrecurrent.verdict import RULES, Candidate, decide

LOWER = {"direction": "lower", "unit": "nats a chord"}
HIGHER = {"direction": "higher", "unit": "percent"}


def model(name, recurrent, test, valid=None, reach=None, k_star=9, speed=None):
    return Candidate(name, recurrent, valid or test, test, reach, k_star, speed)


def test_no_when_the_feed_forward_model_is_as_good():
    verdict = decide(
        [
            model("lstm", True, [8.50, 8.51, 8.49], speed=1e4),
            model("tcn", False, [8.51, 8.50, 8.52], reach=15, speed=3e4),
        ],
        LOWER,
        "chord",
    )
    assert verdict.answer == "no"
    assert verdict.text.startswith("No. The lstm uses the last 9 chords; a tcn that can see 15 chords is as good")
    assert "scores 3.0 times as fast" in verdict.text


def test_yes_when_it_is_clearly_worse_and_the_text_names_a_short_receptive_field():
    verdict = decide(
        [model("lstm", True, [1.30, 1.31, 1.30], k_star=200), model("tcn", False, [1.50, 1.51, 1.49], reach=31)],
        LOWER,
        "character",
    )
    assert verdict.answer == "yes"
    assert "worse by 15.1%" in verdict.text
    assert "a wider receptive field may change the answer" in verdict.text


def test_direction_of_the_metric_is_respected():
    good, bad = [95.0, 95.1, 95.2], [80.0, 80.1, 80.2]
    recurrent_wins = [model("lstm", True, good), model("tcn", False, bad, reach=7)]
    forward_wins = [model("lstm", True, bad), model("tcn", False, good, reach=7)]
    assert decide(recurrent_wins, HIGHER, "pixel").answer == "yes"
    assert decide(forward_wins, HIGHER, "pixel").answer == "no"


def test_losses_close_to_zero_are_told_apart_from_it():
    verdict = decide(
        [model("lstm", True, [2e-2, 2.1e-2]), model("tcn", False, [3.5e-5, 3.5e-5], reach=99)], LOWER, "step"
    )
    assert "lstm 0.0205 ± 0.0007 against tcn 0.0000350 ± 0.0000000" in verdict.text
    assert verdict.answer == "no"


def test_models_that_learned_nothing_do_not_answer():
    at_chance = [model("lstm", True, [0.1604, 0.1605]), model("tcn", False, [0.1606, 0.1606], reach=99)]
    assert decide(at_chance, LOWER, "step").answer == "no"
    verdict = decide(at_chance, LOWER, "step", chance=0.1605)
    assert verdict.answer == "cannot tell"
    assert "who reads nothing gets 0.1605" in verdict.text
    one_learned = [at_chance[0], model("tcn", False, [1e-4, 1.1e-4], reach=99)]
    verdict = decide(one_learned, LOWER, "step", chance=0.1605)
    assert verdict.answer == "no"
    assert "The lstm uses" not in verdict.text
    assert "The lstm has not learned the task in this training (who reads nothing gets 0.1605)." in verdict.text
    guesses = [model("lstm", True, [11.3, 11.4]), model("tcn", False, [11.4, 11.3], reach=99)]
    assert decide(guesses, HIGHER, "pixel", chance=11.35).answer == "cannot tell"


@pytest.mark.parametrize(
    ("recurrent", "forward"),
    [([8.5], [8.4]), ([8.5, 8.9], [8.6, 8.8]), ([8.50, 8.51], [8.58, 8.59])],
    ids=["one seed", "seeds differ more than models", "at the margin"],
)
def test_cannot_tell_when_the_seeds_do_not_decide(recurrent, forward):
    verdict = decide([model("lstm", True, recurrent), model("tcn", False, forward, reach=15)], LOWER, "chord")
    assert verdict.answer == "cannot tell"
    assert verdict.text.startswith("Cannot tell with")


@pytest.mark.parametrize("recurrent", [True, False])
def test_cannot_tell_with_one_kind_only(recurrent):
    verdict = decide([model("only", recurrent, [1.0, 1.0])], LOWER, "step")
    assert verdict.answer == "cannot tell"
    assert ("no feed-forward" if recurrent else "no recurrent") in verdict.text


def test_models_are_chosen_on_validation_data():
    assert "chosen by their mean validation metric" in RULES[0]  # of F1 or BLEU, the higher: no loss
    verdict = decide(
        [
            model("lstm", True, [9.0, 9.0], valid=[8.0, 8.0]),
            model("gru", True, [7.0, 7.0], valid=[8.5, 8.5]),
            model("tcn", False, [8.9, 8.9], reach=15),
        ],
        LOWER,
        "chord",
    )
    assert "lstm 9.000" in verdict.text
    assert verdict.answer == "no"


def test_equal_results_without_any_spread_decide():
    assert decide([model("a", True, [1.0, 1.0]), model("b", False, [1.0, 1.0], reach=2)], LOWER, "step").answer == "no"
