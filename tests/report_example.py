"""A comparison as `Comparison.to_dict()` gives it, with numbers a real one could have."""

import math
from typing import Any

KS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64]
# model: (parameters, test loss, loss at k = 1, decay, k*, receptive field, speeds, peak MiB)
MODELS: dict[str, tuple[Any, ...]] = {
    "rnn": (151_240, 6.912, 8.31, 2.2, 8, None, (18_400, 61_000, 9_100), 412.5),
    "lstm": (152_008, 6.641, 8.27, 2.9, 12, None, (9_870, 33_400, 4_300), 530.25),
    "stable-lstm": (152_008, 6.688, 8.29, 2.4, 8, None, (9_410, 33_100, 4_310), 531.0),
    "gru": (151_712, 6.655, 8.25, 2.7, 12, None, (8_120, 29_800, 3_950), 498.0),
    "window": (150_904, 6.702, 8.24, 1.9, 8, 16, (64_300, 402_000, 12_600), 301.75),
    "tcn": (152_432, 6.629, 8.26, 2.5, 8, 15, (31_700, 121_000, 1_870), 702.5),
    "gated-conv": (151_020, 6.671, 8.28, 2.5, 8, 13, (27_900, 98_700, 2_050), 744.0),
}


def example_comparison(models: tuple[str, ...] = tuple(MODELS)) -> dict[str, Any]:
    """Return a fresh comparison of the given models on chorales."""
    return {
        "task": "chorales",
        "step_noun": "chord",
        "metric": {"name": "nll", "direction": "lower", "unit": "nats a chord"},
        "verdict": {
            "answer": "no",
            "text": "No. The LSTM uses the last 12 chords; a TCN that can see 15 is as good within one standard "
            "deviation (6.629 against 6.641 nats a chord) and scores 3.6 times faster.",
            "rules": [
                "No: the best feed-forward model is at most one pooled standard deviation worse than the best "
                "recurrent one.",
                "Yes: every feed-forward model is worse by more than two pooled standard deviations.",
                "Cannot tell: anything else, or fewer than two seeds.",
            ],
        },
        "command": "unrecurrent compare chorales --models rnn,lstm,stable-lstm,gru,window,tcn,gated-conv --seeds 2 "
        "--epochs 12 --report report.html",
        "created": "2026-11-23T17:02:11+00:00",
        "machine": {"cores": 2, "processor": "Example Processor 3.1 GHz", "memory_gib": 23.4},
        "commit": "4a9e697",
        "versions": {"unrecurrent": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "numpy": "2.4.1"},
        "rows": [_row(model) for model in models],
        "training": {model: [_run(model, seed) for seed in (0, 1)] for model in models},
        "memory": {model: _curve(model) for model in models},
        "configuration": {model: _settings(model) for model in models},
        "budget": {
            "params": 152_000,
            "train_tokens": 1_204_800,
            "seeds": [0, 1],
            "parameter_tolerance": 0.05,
        },
    }


def _row(model: str) -> dict[str, Any]:
    params, loss, _, _, k_star, field, (train, score, generate), peak = MODELS[model]
    stable = model.startswith("stable")
    return {
        "task": "chorales",
        "model": model,
        "variant": None,
        "k": None,
        "metric": "nll",
        "split": "test",
        "mean": loss,
        "std": 0.011 + 0.002 * len(model),
        "seeds": 2,
        "params": params,
        "hidden_size": 128,
        "epochs": 12,
        "minutes": 0.61,
        "train_tokens_per_s": train,
        "score_tokens_per_s": score,
        "generate_steps_per_s": generate,
        "peak_memory_mib": peak,
        "k_star": k_star,
        "receptive_field": field,
        "recurrent": field is None,
        "certified_rate": 0.9412 if stable else None,
        "certified_horizon": 214 if stable else None,
        "local_rate": 0.81 if field is None else None,
    }


def _run(model: str, seed: int) -> dict[str, Any]:
    _, loss, _, decay, *_ = MODELS[model]
    epochs = []
    for epoch in range(1, 13):
        gap = 2.6 * math.exp(-0.45 * decay * (epoch - 1) / 2) + (9.0 if epoch == 1 else 0.0)
        wiggle = 0.03 * math.sin(epoch * (seed + 2) + len(model))
        epochs.append(
            {
                "epoch": epoch,
                "train_loss": loss + gap - 0.045 * epoch + wiggle / 2,
                "valid_loss": loss + gap * 0.94 + 0.004 * epoch + wiggle,
                "seconds": 3.1,
            }
        )
    return {"seed": seed, "epochs": epochs}


def _curve(model: str) -> dict[str, Any]:
    _, loss, first, decay, k_star, *_ = MODELS[model]
    means = [loss + (first - loss) * math.exp(-(k - 1) / decay) for k in KS]
    return {
        "ks": list(KS),
        "mean": means,
        "low": [mean - 0.06 for mean in means],
        "high": [mean + 0.06 for mean in means],
        "full": loss,
        "full_low": loss - 0.06,
        "full_high": loss + 0.06,
        "k_star": k_star,
        "k_star_low": k_star - 2,
        "k_star_high": k_star + 4,
        "delta": 0.01,
        "positions": 2048,
        "label": "estimate",
    }


def _settings(model: str) -> dict[str, Any]:
    return {
        "model": model,
        "layers": 4 if model in ("tcn", "gated-conv") else 1,
        "dropout": 0.2,
        "optimizer": "adamw",
        "learning_rate": 0.003 if "conv" in model else 0.002,
        "clip": 1.0,
        "schedule": "cosine",
        "kernel_size": 2 if model in ("tcn", "gated-conv") else None,
    }
