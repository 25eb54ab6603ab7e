"""Tuning: the same draws of the hyperparameters for every model."""

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from unrecurrent.recipes import Recipe

#: log10 of the smallest and the largest learning rate; each trial draws from a stratum of its own
LEARNING_RATES = (-2.9, -1.9)
DROPOUTS = (0.1, 0.2, 0.3, 0.4, 0.5)
INPUT_DROPOUTS = (0.0, 0.1, 0.2)
WEIGHT_DECAYS = (0.01, 0.1, 0.3)


def draw_recipes(base: Recipe, trials: int, fixed: Mapping[str, Any], seed: int = 0) -> list[Recipe]:
    """Return `trials` recipes: the base with drawn learning rate, dropouts and weight decay.

    The draws depend on the seed alone, so that every model chooses from the same ones; settings in `fixed` are
    left as they are. The learning rates are spread over their whole range (one draw in each of `trials` strata).

    >>> from unrecurrent.recipes import Recipe
    >>> a, b = draw_recipes(Recipe(), 3, {}), draw_recipes(Recipe({"layers": 2}), 3, {})
    >>> [r.training for r in a] == [r.training for r in b]
    True
    """
    generator = random.Random(seed)
    low, high = LEARNING_RATES
    recipes = []
    for trial in range(trials):
        rate = 10 ** (low + (high - low) * (trial + generator.random()) / trials)
        drawn = {"dropout": generator.choice(DROPOUTS), "input_dropout": generator.choice(INPUT_DROPOUTS)}
        decay = generator.choice(WEIGHT_DECAYS)
        training = replace(base.training, learning_rate=float(f"{rate:.2g}"), weight_decay=decay)
        free = {key: value for key, value in drawn.items() if key not in fixed}
        recipes.append(Recipe({**base.settings, **free}, training))
    return recipes
