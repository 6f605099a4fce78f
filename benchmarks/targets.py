"""Compare what is predicted (pixels, tokens, ...) on digits and solar cells, at equal samples.

    python benchmarks/targets.py DIR             # three seeds; what DIR has already is not done again
    python benchmarks/targets.py DIR table       # only print what there is
    python benchmarks/targets.py DIR cost        # seconds of a training step of each, against pixels

docs/results/targets.md has the result. Needs PyPI's elpv-dataset. All variants share the encoder's size, the
data order, the learning rate and the number of images seen. The teacher of `features` is the run on pixels
with seed 100, of the same length.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from importlib.metadata import distribution
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch

import nextblock
from nextblock.checkpoint import save_model
from nextblock.cli import main
from nextblock.models import NextBlockModel
from nextblock.presets import model_config
from nextblock.train.runtime import process_settings
from nextblock.train.trainer import Trainer
from step import noise, run_config, step_of

SEEDS, TEACHER_SEED = (0, 1, 2), 100
METHODS = ("knn", "linear", "attentive", "ep")
COMMON: dict[str, Any] = {
    **{"model.embed_dim": 128, "model.depth": 4, "model.num_heads": 4, "model.block_size": 2},
    **{"model.projection_dim": 256, "model.block_mlp_dim": 256, "model.feature_attention": "full"},
    **{"model.predictor_dim": 128, "model.predictor_depth": 2, "model.predictor_heads": 4},
    **{"data.normalize": "auto", "data.workers": 0, "optim.lr": 1e-3, "optim.warmup": "10%"},
    **{"train.batch_size": 32, "train.precision": "fp32", "train.device": "cpu"},
    **{"monitor.pictures_every": None, "monitor.knn_every": None, "monitor.tensorboard": False},
}
NEPA: dict[str, Any] = {
    **{"model.target": "embedding", "model.predictor": "identity", "model.block_size": 1},
    **{"model.positions": "rope", "model.class_token": True, "model.qk_norm": "plain"},
    **{"model.layer_scale": 1e-5, "model.rope_rescale": 2.0, "model.weight_init": "trunc_normal_all"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "pixels": {},
    "tokens": {"model.target": "tokens", "model.vocab_size": 256},
    "embedding, blocks": {"model.target": "embedding"},
    "embedding, patches (NEPA)": NEPA,
    "features": {"model.target": "features", "model.teacher": "TEACHER"},
    "pixels, 50 % masked": {"model.mask_ratio": 0.5, "model.order": "per_image"},
}
SETS: dict[str, dict[str, Any]] = {
    "digits": {
        **{"model.image_size": 32, "model.patch_size": 4, "data.val_resize_px": 32, "data.flip": 0.0},
        **{"train.duration": "12000sa"},
    },
    "solar": {
        **{"model.image_size": 64, "model.patch_size": 8, "data.val_resize_px": 64},
        **{"train.duration": "12000sa"},
    },
}


def prepare(root: Path) -> None:
    """List the solar cells of four classes and split them, a fifth to measure on."""
    if (root / "test.txt").is_file():
        return
    data = Path(str(distribution("elpv-dataset").locate_file("elpv_dataset/data")))
    lines = []
    for line in filter(str.strip, (data / "labels.csv").read_text().splitlines()):
        name, chance, kind = line.split()
        lines.append(f"{data / name}\t{kind}-{'defective' if float(chance) > 0.5 else 'functional'}\n")
    root.mkdir(parents=True, exist_ok=True)
    (root / "solar.txt").write_text("".join(lines))
    words = f"data split files:{root}/solar.txt --parts train=0.8,test=0.2 --stratify --out {root}"
    main(words.split())


def sources(root: Path, name: str) -> tuple[str, str]:
    """Images to train and to measure on."""
    if name == "digits":
        return "digits:split=train", "digits:split=test"
    return f"files:{root}/train.txt", f"files:{root}/test.txt"


def pretrain(root: Path, name: str, variant: str, seed: int) -> Path:
    """Train one variant; what is there already is complete at once."""
    out = root / "runs" / f"{name}-{list(VARIANTS).index(variant)}-{seed}"
    settings: dict[str, Any] = {**COMMON, **SETS[name], **VARIANTS[variant], "seed": seed}
    settings["data.train"] = sources(root, name)[0]
    if "model.teacher" in settings:
        settings["model.teacher"] = str(pretrain(root, name, "pixels", TEACHER_SEED))
    nextblock.pretrain("xtra-tiny", out=out, **settings)
    return out


def measure(root: Path, name: str, variant: str, seed: int, *, baselines: bool) -> list[dict[str, Any]]:
    """Train and measure one variant: a row for each method."""
    started_s = time.process_time()
    out = pretrain(root, name, variant, seed)
    cpu_s = time.process_time() - started_s
    train, test = sources(root, name)
    found = nextblock.compare(
        model=(str(out),), train=train, test=test, methods=METHODS, baselines=baselines, seed=seed, epochs=30,
        device="cpu", workers=0,
    )  # fmt: skip
    return [
        {
            **{"set": name, "seed": seed, "method": row["method"], "top1": row["top1"], "cpu_s": cpu_s},
            "variant": variant if row["encoder"] == "model" else row["encoder"],
        }
        for row in found.rows
    ]


def table(results: Path) -> str:
    """Mean and deviation over seeds in per cent, as Markdown."""
    cells: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for line in results.read_text().splitlines():
        row = json.loads(line)
        cells[row["set"], row["variant"], row["method"]].append(100 * row["top1"])
    columns = list(dict.fromkeys((one, method) for one, _, method in cells))
    lines = ["| target | " + " | ".join(f"{one} {method}" for one, method in columns) + " |"]
    lines.append("|---|" + "---:|" * len(columns))
    for variant in dict.fromkeys(variant for _, variant, _ in cells):
        values = [cells.get((one, variant, method), []) for one, method in columns]
        shown = [
            f"{mean(found):.1f} ± {stdev(found):.1f}"
            if len(found) > 1
            else f"{found[0]:.1f}"
            if found
            else ""
            for found in values
        ]
        lines.append(f"| {variant} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def cost(root: Path, rounds: int = 5) -> str:
    """Median seconds of a step by variant, in turns: an encoder of XTRA-Ti/16's size, 256 px, batch 8."""
    trainers, seconds = {}, defaultdict(list)
    teacher = root / "teacher.safetensors"
    for variant, changes in VARIANTS.items():
        layers = {"predictor_dim": 192, "predictor_heads": 3, "feature_attention": "full"}
        changed = {name.partition(".")[2]: value for name, value in changes.items()}
        if "teacher" in changed:  # of the encoder's own size
            save_model(teacher, NextBlockModel(model_config("xtra-ti16", **layers)))
            changed |= {"teacher": str(teacher), "teacher_dim": 192}
        model = model_config("xtra-ti16", **layers, **changed)
        config = run_config(model, batch_size=8, precision="fp32")
        trainers[variant] = Trainer(config, torch.device("cpu"), None), noise(model, 8)
        if "vocab_size" in changed:
            trainers[variant][0].model.tokenizer.centroids.normal_()
    with process_settings(torch.device("cpu")):
        for index in range(2 + rounds):  # two to warm up
            for variant, (trainer, images) in trainers.items():
                started_s = time.process_time()
                trainer.train_step(step_of(index, images), 1e-4)
                if index >= 2:
                    seconds[variant].append(time.process_time() - started_s)
    medians = {variant: median(found) for variant, found in seconds.items()}
    lines = [f"| {variant} | {s:.2f} | {s / medians['pixels']:.2f} |" for variant, s in medians.items()]
    return "\n".join(["| target | CPU s a step | against pixels |", "|---|---:|---:|", *lines])


def study(root: Path, results: Path) -> None:
    """Measure all variants on both sets, seed by seed, as far as it is not done."""
    prepare(root)
    done = results.read_text().splitlines() if results.is_file() else []
    known = {(row["set"], row["variant"], row["seed"]) for row in map(json.loads, done)}
    for seed in SEEDS:
        for name in SETS:
            for variant in VARIANTS:
                if (name, variant, seed) not in known:
                    rows = measure(root, name, variant, seed, baselines=variant == "pixels")
                    with results.open("a") as file:
                        file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    place, command = Path(sys.argv[1]), sys.argv[2:]
    place.mkdir(parents=True, exist_ok=True)
    if not command:
        study(place, place / "results.jsonl")
    sys.stdout.write((cost(place) if command == ["cost"] else table(place / "results.jsonl")) + "\n")
