"""Whether surprise finds defective solar cells: AUROC of block losses against baselines without a model.

    python benchmarks/surprise.py DIR            # seeds 0, 1 and 2
    python benchmarks/surprise.py DIR 0 1        # these seeds alone

docs/results/surprise.md has the result. Needs PyPI's elpv-dataset. The models are the runs on pixels of
benchmarks/targets.py, of the same DIR; those that are missing are trained. They see no labels, and their
training images have as many defective cells as the test images.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from sklearn.metrics import roc_auc_score

import nextblock
from nextblock.blocks import normalize_blocks, patchify
from nextblock.config import DataConfig
from nextblock.data import eval_batches, normalize, open_source
from nextblock.evaluate.features import evaluation_data
from nextblock.interop import load_model
from targets import SEEDS, prepare, pretrain, sources

PIXELS = 64
GROUPS = ("all", "mono", "poly")


class Images(NamedTuple):
    """The images of a list, as a model sees them."""

    pixels: Float[torch.Tensor, "n c h w"]
    classes: list[str]


def read(spec: str, data: DataConfig) -> Images:
    """All images of a list."""
    source = open_source(spec, data)
    (batch,) = eval_batches(source, data, PIXELS, len(source))
    return Images(
        normalize(batch.images, data.mean, data.std), [source.class_names[one] for one in source.labels]
    )


def without_model(train: Images, test: Images, block_px: tuple[int, int]) -> dict[str, np.ndarray]:
    """Scores of test images that need no model, by their names in the table."""
    blocks = patchify(test.pixels, block_px)[:, 1:]  # those that a model predicts
    zero = normalize_blocks(blocks).square().mean(-1)
    variance = blocks.var(-1)
    centre = patchify(train.pixels.mean(0, keepdim=True), block_px)[:, 1:]
    far = (blocks - centre).square().mean(-1)
    return {
        "predicting zero, mean": zero.mean(1).numpy(),
        "predicting zero, largest": zero.amax(1).numpy(),
        "variance within blocks, mean": variance.mean(1).numpy(),
        "variance within blocks, largest": variance.amax(1).numpy(),
        "deviation of the image": test.pixels.flatten(1).std(1).numpy(),
        "distance to the mean image, mean": far.mean(1).numpy(),
        "distance to the mean image, largest": far.amax(1).numpy(),
    }


def of_model(run: Path, spec: str, out: Path) -> dict[str, np.ndarray]:
    """The two scores of `nextblock surprise`, in the order of the list."""
    nextblock.surprise(model=str(run), data=spec, out=str(out), device="cpu", workers=0)
    with (out / "surprise.csv").open(encoding="utf-8") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: int(row["index"]))
    return {
        f"surprise, {kind}": np.array([float(row[f"{kind}_loss"]) for row in rows])
        for kind in ("mean", "largest")
    }


def auroc(score: np.ndarray, is_odd: Bool[np.ndarray, " n"]) -> tuple[float, float]:
    """The area under the ROC curve, and its standard error (Hanley and McNeil, Radiology 1982)."""
    area = float(roc_auc_score(is_odd, score))
    return area, standard_error(area, int(is_odd.sum()), int((~is_odd).sum()))


def standard_error(area: float, odd: int, even: int) -> float:
    """That of an area under the ROC curve of so many odd images and others."""
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (odd - 1) * (q1 - area**2) + (even - 1) * (q2 - area**2)
    return math.sqrt(variance / (odd * even))


def table(found: Mapping[str, Sequence[np.ndarray]], classes: Sequence[str]) -> str:
    """A row for each score: mean AUROC over seeds, its standard error, and the deviation over seeds."""
    is_odd = np.array([one.endswith("-defective") for one in classes])
    kinds = np.array([one.split("-")[0] for one in classes])
    lines = ["| score | " + " | ".join(GROUPS) + " |", "|---|" + "---:|" * len(GROUPS)]
    for name, scores in found.items():
        cells = []
        for group in GROUPS:
            some = (kinds == group) | (group == "all")
            areas, errors = zip(*(auroc(score[some], is_odd[some]) for score in scores), strict=True)
            seeds = f" (seeds {stdev(areas):.3f})" if len(areas) > 1 else ""
            cells.append(f"{mean(areas):.3f} ± {mean(errors):.3f}{seeds}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [""]
    for group in GROUPS:
        some = (kinds == group) | (group == "all")
        lines.append(f"{group}: {is_odd[some].sum()} defective of {some.sum()} cells")
    return "\n".join(lines)


def study(root: Path, seeds: Sequence[int]) -> str:
    """Train what is missing, measure, and make the table."""
    prepare(root)
    train_spec, test_spec = sources(root, "solar")
    runs = [pretrain(root, "solar", "pixels", seed) for seed in seeds]
    models = [
        of_model(run, test_spec, root / "surprise" / str(seed)) for run, seed in zip(runs, seeds, strict=True)
    ]
    found = {name: [scores[name] for scores in models] for name in models[0]}
    model_config = load_model(runs[0]).config
    data = evaluation_data(str(runs[0]), model_config, workers=0)
    train, test = read(train_spec, data), read(test_spec, data)
    baselines = without_model(train, test, model_config.block_px)
    return table({**found, **{name: [score] for name, score in baselines.items()}}, test.classes)


if __name__ == "__main__":
    place, chosen = Path(sys.argv[1]), [int(one) for one in sys.argv[2:]]
    sys.stdout.write(study(place, chosen or SEEDS) + "\n")
