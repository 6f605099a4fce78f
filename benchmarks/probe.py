"""Nine learning rates of two heads in one probe of a ViT-B/16 at 256 px, against a probe for each head.

The rates are official XTRA's for most data sets, the weights random. A probe computes features once, so the
ratio shrinks with more epochs, when the heads take most of the time. The pictures are cut from scikit-learn's
two photos, which are the classes. The accuracies must be the same, head by head.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import nextblock
from common import Row, parse, report, take_turns
from nextblock.checkpoint import save_model

RATES = (1e-4, 3e-4, 5e-4, 1e-3, 1.5e-3, 2e-3, 4e-3, 8e-3, 1e-2)
HEADS = ("attentive", "linear")
Result = dict[str, Any]
COUNTS = {"train": 24, "val": 12, "test": 2}
"""Pictures of a class: the time is measured, not how good the encoder is."""


def prepare(folder: Path, model: str) -> None:
    """Write an encoder with random weights, and 256-pixel cuts of each photo in class folders."""
    torch.manual_seed(0)
    save_model(folder / "encoder.safetensors", nextblock.create_model(model, predictor=None))
    rng = np.random.default_rng(0)
    for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
        for split, count in COUNTS.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                top, left = (int(rng.integers(side - 256)) for side in photo.shape[:2])
                cut = Image.fromarray(photo[top : top + 256, left : left + 256])
                cut.save(folder / split / name / f"{number:03d}.jpg", quality=90)


def probe(folder: Path, heads: Sequence[str], rates: Sequence[float], epochs: int, **more: Any) -> Result:
    """Seconds of a probe of all these heads, and the accuracy of each on val."""
    settings = {"train": str(folder / "train"), "heads": tuple(heads), "lr": tuple(rates), "epochs": epochs}
    settings |= {"batch_size": 32, "baselines": False, **more}
    # Several rates are compared on val. A head by itself has nothing to choose, and is measured there.
    parts = ("val", "test") if len(rates) > 1 else ("test", "val")
    settings |= {name: str(folder / part) for name, part in zip(("val", "test"), parts, strict=True)}
    started_s = time.perf_counter()
    result = nextblock.probe(model=str(folder / "encoder.safetensors"), **settings)
    elapsed_s = time.perf_counter() - started_s
    measured = result.facts["grid"] if len(rates) > 1 else result.rows
    return {"elapsed_s": elapsed_s, "top1": {f"{row['head']} {row['lr']:g}": row["top1"] for row in measured}}


def main() -> None:
    """Probe all heads at once, then each by itself, and print how they compare."""
    options = parse(__doc__, rounds=1)
    rates, epochs, more = (RATES[::8], 2, {"workers": 0}) if options.quick else (RATES, 10, {})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, "xtra-tiny" if options.quick else "xtra-b16")
        variants = {"grid": partial(probe, folder, HEADS, rates, epochs, **more)}
        for head in HEADS:
            for lr in rates:
                variants[f"{head} {lr:g}"] = partial(probe, folder, (head,), (lr,), epochs, **more)
        found = take_turns(variants, options)
    seconds = {name: median(run["elapsed_s"] for run in runs) for name, runs in found.items()}
    grid_s, together = seconds.pop("grid"), found.pop("grid")[0]["top1"]
    alone = {name: runs[0]["top1"][name] for name, runs in found.items()}
    if together != alone:
        sys.exit(f"no ratio: accuracies are {together} in one probe, and {alone} in a probe each")
    alone_s = sum(seconds.values())
    row = Row(f"{len(alone)} heads in one probe", grid_s, alone_s, "s", alone_s / grid_s, "at least 8.0")
    report("probe", options, [row], accuracies=together, accuracies_alone=alone)


if __name__ == "__main__":
    main()
