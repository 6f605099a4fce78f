"""`nextblock bench probe`: a grid of heads on one pass of the encoder, against a run for each head.

Nine learning rates, official XTRA's for most data sets, of the linear and of the attentive head on a
ViT-B/16 at 256 px (random weights); and the same eighteen heads one by one, each a probe of its own with its
own pass. Both see the same images with the same seed, so the accuracies are compared head by head.
The pictures are cut from scikit-learn's two photos, which are also the classes.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nextblock.bench.measure import BenchError, BenchResult, Row, run_in_process
from nextblock.presets import model_config
from nextblock.settings import check_types, require

if TYPE_CHECKING:
    from nextblock.evaluate.probe.config import ProbeCandidate, ProbeResult

__all__ = ["ProbeBench", "prepare", "probe_heads", "ratio_of_longer"]

SPEEDUP = 8.0
"""What the ratio should reach, with the model of the default."""
USUAL_EPOCHS = 100
"""Of a probe, where nobody says."""
MAX_DIFFERENCE = 0.05
"""Between the accuracies of a head in the grid and of the same head alone, as shares of the images."""
RATES = (1e-4, 3e-4, 5e-4, 1e-3, 1.5e-3, 2e-3, 4e-3, 8e-3, 1e-2)
"""Official XTRA's for most data sets."""
HEADS = ("attentive", "linear")
QUICK_RATES = RATES[:2]
SPLITS = {"train": 24, "val": 12, "test": 12}
"""Pictures of a class and split: a bench measures how long it takes, not how good it is."""
PREPARE, PROBE = "nextblock.bench.probe:prepare", "nextblock.bench.probe:probe_heads"

Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ProbeBench:
    """What is probed, and how long."""

    model: str = "xtra-b16"
    """Size or preset of the encoder."""
    epochs: int = 10
    """How often the heads see every image."""
    augment: Literal["none", "crop"] = "none"
    """none: features of the centre crop, computed once; crop: new crops in every epoch."""
    threads: int | None = None
    """Threads of torch; null: as many as it takes by itself."""
    quick: bool = False
    """Two learning rates in place of nine: a first idea."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self.epochs >= 2, f"epochs is {self.epochs}; use at least 2")
        require(self.threads is None or self.threads >= 1, f"threads is {self.threads}; use at least 1")
        model_config(self.model)

    def run(self) -> BenchResult:
        """Probe all heads in one run, then each in its own, and compare times and accuracies."""
        rates = QUICK_RATES if self.quick else RATES
        with tempfile.TemporaryDirectory() as folder:
            job = {
                "folder": folder,
                "model": self.model,
                "epochs": self.epochs,
                "augment": self.augment,
                "threads": self.threads,
            }
            run_in_process(PREPARE, job)
            grid = run_in_process(PROBE, {**job, "name": "grid", "lr": rates, "heads": HEADS})
            alone = [
                run_in_process(PROBE, {**job, "name": f"{head}-{lr:g}", "lr": (lr,), "heads": (head,)})
                for head in HEADS
                for lr in rates
            ]
        difference = check_accuracies(grid, alone)
        alone_s = sum(one["elapsed_s"] for one in alone)
        return BenchResult(
            bench="probe",
            rows=(
                Row(
                    what=f"{len(alone)} heads in one pass, and one run each",
                    ours=grid["elapsed_s"],
                    plain=alone_s,
                    unit="s",
                    ratio=alone_s / grid["elapsed_s"],
                    at_least=None if self.quick or self.model != ProbeBench.model else SPEEDUP,
                ),
                Row(
                    what="the same with starting Python and loading the model",
                    ours=grid["process_s"],
                    plain=sum(one["process_s"] for one in alone),
                    unit="s",
                    ratio=sum(one["process_s"] for one in alone) / grid["process_s"],
                ),
            ),
            machine={name: grid[name] for name in ("device", "threads", "torch")},
            details={
                "accuracies": {"grid": grid["top1"], "alone": [one["top1"] for one in alone]},
                "largest_difference": difference,
                "images": {split: 2 * count for split, count in SPLITS.items()},
                "epochs": self.epochs,
                "augment": self.augment,
            },
            notes=(
                f"{self.model}, {2 * SPLITS['train']} pictures to train on, {2 * SPLITS['val']} to choose on "
                f"and {2 * SPLITS['test']} to measure on, {self.epochs} epochs, augment "
                f"{self.augment}; times are of the probe itself",
                f"largest difference between a head's accuracy in the grid and alone: {difference:.1%}",
                *self._note_of_epochs(grid["elapsed_s"], alone_s, len(alone)),
            ),
        )

    def _note_of_epochs(self, grid_s: float, alone_s: float, heads: int) -> tuple[str, ...]:
        """What the ratio would be with the epochs of a usual probe, if features are computed but once."""
        if self.augment != "none" or self.epochs >= USUAL_EPOCHS:
            return ()
        ratio = ratio_of_longer(grid_s, alone_s, heads, USUAL_EPOCHS / self.epochs)
        # Of times too short to be told apart, heads seem to cost nothing.
        about = f", by these times about {ratio:.1f}x with {USUAL_EPOCHS} epochs" if ratio < heads else ""
        return (
            "features are computed once, heads trained in every epoch, by themselves in both: so more epochs "
            f"gain less{about}",
        )


def ratio_of_longer(grid_s: float, alone_s: float, heads: int, times: float) -> float:
    """The ratio with so many times the epochs, by the seconds of one pass with all heads and of one for each.

    Both train every head, and the grid computes features once where the others do it `heads` times.
    """
    features_s = (alone_s - grid_s) / (heads - 1)
    heads_s = max(0.0, grid_s - features_s)
    return (heads * features_s + times * heads_s) / (features_s + times * heads_s)


def check_accuracies(grid: Result, alone: list[Result]) -> float:
    """The largest difference of a head's accuracy; `BenchError` where that is more than noise."""
    difference = max(abs(one["top1"][name] - grid["top1"][name]) for one in alone for name in one["top1"])
    if difference > MAX_DIFFERENCE:
        raise BenchError(
            f"the accuracies of heads in the grid and alone differ by up to {difference:.1%}: they do not "
            "train alike"
        )
    return difference


def prepare(job: dict[str, Any]) -> Result:
    """Write the encoder's weights and the pictures into the job's folder."""
    import torch

    from nextblock.checkpoint import save_model
    from nextblock.models import NextBlockModel

    folder = Path(job["folder"])
    torch.manual_seed(0)
    encoder = NextBlockModel(model_config(job["model"], predictor=None))
    save_model(folder / "encoder.safetensors", encoder)
    _write_pictures(folder)
    return {}


def _write_pictures(folder: Path) -> None:
    """Random 256-pixel cuts of each photo, in class folders."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
        rows, columns = photo.shape[0] - 256, photo.shape[1] - 256
        for split, count in SPLITS.items():
            directory = folder / split / name
            directory.mkdir(parents=True)
            for number in range(count):
                top, left = int(rng.integers(rows)), int(rng.integers(columns))
                cut = Image.fromarray(photo[top : top + 256, left : left + 256])
                cut.save(directory / f"{number:03d}.jpg", quality=90)


def probe_heads(job: dict[str, Any]) -> Result:
    """Probe the job's heads at its learning rates; seconds, and the accuracy of every head."""
    started_s = time.perf_counter()
    import torch

    from nextblock.evaluate.probe.config import ProbeConfig
    from nextblock.evaluate.probe.run import probe
    from nextblock.train.runtime import choose_device, device_name

    if job["threads"] is not None:
        torch.set_num_threads(job["threads"])
    folder = Path(job["folder"])
    config = ProbeConfig(
        model=str(folder / "encoder.safetensors"),
        train=str(folder / "train"),
        val=str(folder / "val"),
        test=str(folder / "test"),
        out=str(folder / job["name"]),
        heads=tuple(job["heads"]),
        lr=tuple(job["lr"]),
        epochs=job["epochs"],
        augment=job["augment"],
        batch_size=32,
        baselines=False,
    )
    torch.ones(1, device=choose_device("auto"))
    probe_started_s = time.perf_counter()
    result = probe(config)
    ended_s = time.perf_counter()
    return {
        "elapsed_s": ended_s - probe_started_s,
        "process_s": ended_s - started_s,
        "top1": {f"{one.head} {one.lr:g}": _top1(one, result) for one in result.grid},
        "device": device_name(choose_device("auto")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _top1(candidate: ProbeCandidate, result: ProbeResult) -> float:
    """On val: where the grid's winner is chosen, and a head alone is measured."""
    if candidate.top1 is not None:
        return candidate.top1
    return next(row.top1 for row in result.rows if (row.head, row.split) == (candidate.head, "val"))
