"""Tuning: the same draws of the hyperparameters for every model."""

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from unrecurrent.recipes import Recipe

#: log10 of the learning rate, and the choices drawn for every model alike
LEARNING_RATES = (-2.7, -2.0)
DROPOUTS = (0.1, 0.2, 0.3, 0.4)
INPUT_DROPOUTS = (0.0, 0.1, 0.2)
WEIGHT_DECAYS = (0.01, 0.1, 0.3, 1.0)


def draw_recipes(base: Recipe, trials: int, fixed: Mapping[str, Any], seed: int = 0) -> list[Recipe]:
    """Return `trials` recipes: the base with drawn learning rate, dropouts and weight decay.

    The draws depend on the seed alone, so that every model chooses from the same ones; settings in `fixed`
    are left as they are. The first is the base itself, so that tuning never loses to it.

    >>> from unrecurrent.recipes import Recipe
    >>> a, b = draw_recipes(Recipe(), 2, {}), draw_recipes(Recipe({"layers": 2}), 2, {})
    >>> a[1].training == b[1].training, a[0] == Recipe()
    (True, True)
    """
    generator = random.Random(seed)
    recipes = [base]
    for _ in range(trials - 1):
        rate = 10 ** generator.uniform(*LEARNING_RATES)
        settings = {
            "dropout": generator.choice(DROPOUTS),
            "input_dropout": generator.choice(INPUT_DROPOUTS),
        }
        decay = generator.choice(WEIGHT_DECAYS)
        training = replace(base.training, learning_rate=rate, weight_decay=decay)
        free = {key: value for key, value in settings.items() if key not in fixed}
        recipes.append(Recipe({**base.settings, **free}, training))
    return recipes
