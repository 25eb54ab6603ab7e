"""How much memory two models in wide use really use: results/trained.json, results/figures/{silero-vad,g2p-en}.png.

    UNRECURRENT_DATA=... python benchmarks/measure_trained.py

`silero-vad`: the LSTM of a voice-activity detector on all 60 telephone prompts
of the data folder one after the other, resampled from 8 to 16 kHz; one step is a frame of 32 ms. `g2p-en`: the GRU that
reads the letters of a word, on words of WikiText-2 (examples/letters_to_sounds.py).
"""

import argparse
import importlib.util
import math
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from scipy.io import wavfile
from scipy.signal import resample_poly

from unrecurrent import MemoryProfile
from unrecurrent.memory_charts import page
from unrecurrent.onnx_graph import measure_graph
from unrecurrent.records import Record, command_line, make_record, write_records
from unrecurrent.tasks.task import data_folder

ROOT = Path(__file__).resolve().parent.parent
CONTEXT, FRAME = 64, 512
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def speech_frames(data: Path) -> np.ndarray:
    """All prompts at 16 kHz as frames of 64 samples of context and 512 new ones, float32 (T, 576)."""
    sounds = []
    for path in sorted((data / "speech").glob("*.wav")):
        rate, samples = wavfile.read(path)
        assert rate == 8000, path
        sounds.append(resample_poly(samples / 32768, 2, 1))
    whole = np.concatenate([np.zeros(CONTEXT), *sounds]).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(whole, CONTEXT + FRAME)
    return windows[::FRAME].copy()


def silero(data: Path, positions: int) -> MemoryProfile:
    path = data / "trained/silero-vad/silero_vad_16k_sequence.onnx"
    (profile,) = measure_graph(path, speech_frames(data), longest=4096, positions=positions, progress=True).values()
    return profile


def g2p(data: Path) -> MemoryProfile:
    return _example("letters_to_sounds").measure(data)


def _example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(task: str, model: str, variant: str, profile: MemoryProfile) -> Record:
    """One row: k* at 1 % with its band, and what was seen of the layer."""
    (layer,) = profile.layers
    low, high = profile.k_band()
    decay = layer.forgetting
    certified = layer.certificate if layer.certificate is not None and layer.certificate.stable else None
    measured: dict[str, Any] = {
        "k_star": profile.k(),
        "k_star_low": low,
        "k_star_high": high,
        "longest": profile.ks[-1],
        "certified_rate": certified.rate if certified else None,
        "certified_horizon": certified.horizon(1e-2) if certified else None,
        "local_rate": layer.local_rate,
        "largest_exponent": layer.lyapunov[0][0],
        "largest_exponent_low": layer.lyapunov[0][1],
        "largest_exponent_high": layer.lyapunov[0][2],
        "state_difference": float(decay.worst[-1]),
        "state_difference_lag": decay.lags[-1],
        "verdict": profile.verdict(),
    }
    if profile.scale is not None:
        measured["largest_change"] = {
            str(k): math.sqrt(row.max()) for k, row in zip(profile.ks, profile.losses, strict=True)
        }
    return make_record(
        command=command_line(), task=task, model=model, variant=variant, metric="k_star", split="test",
        mean=profile.k(), std=None, seeds=1, **measured,
    )  # fmt: skip


def take_picture(profile: MemoryProfile, title: str, path: Path) -> None:
    """Photograph the profile's page with whatever Chromium there is."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(f"no picture {path}: it needs one of {', '.join(BROWSERS)}")
        return
    with tempfile.TemporaryDirectory() as folder:
        page({title: profile}, Path(folder) / "page.html", title)
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=8000"]
        shot = ["--window-size=1100,1020", f"--screenshot={path}", f"file://{folder}/page.html"]
        subprocess.run([browser, *options, *shot], check=True, capture_output=True, timeout=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=ROOT / "results/trained.json")
    arguments = parser.parse_args()
    data = data_folder()
    profiles = {"silero-vad": silero(data, arguments.positions), "g2p-en": g2p(data)}
    about = {
        "silero-vad": ("lstm", "k changes the speech probability by 1 % of its variance; a step is 32 ms"),
        "g2p-en": ("gru", "the encoder; k letters cost 1 % in nats of the first sound"),
    }
    for name, profile in profiles.items():
        print(f"{name}: {profile}\n")
        take_picture(profile, f"The memory of {name}", arguments.out.parent / f"figures/{name}.png")
    write_records(arguments.out, [record(name, *about[name], profile) for name, profile in profiles.items()])


if __name__ == "__main__":
    main()
