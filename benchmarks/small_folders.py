"""Compare small designs on two small folders at equal CPU time; docs/results/small_folders.md has the result.

    python benchmarks/small_folders.py prepare DIR                 # write both folders and split them
    python benchmarks/small_folders.py run DIR DESIGN SEED SAMPLES # train, then measure
    python benchmarks/small_folders.py untrained DIR DESIGN SEED   # measure fresh weights
    python benchmarks/small_folders.py baselines DIR               # measure raw pixels, colour histogram

The last three add to DIR/results.jsonl. Needs Debian's tuxpaint-stamps-default and PyPI's elpv-dataset.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn.functional import one_hot

import nextblock
from nextblock.cli import main
from nextblock.config import DataConfig, ModelConfig, MonitorConfig, OptimConfig, RunConfig, TrainConfig, pair
from nextblock.data import open_source
from nextblock.evaluate import features as ft
from nextblock.evaluate.knn import predict_all
from nextblock.evaluate.table import Extract, FeatureTable
from nextblock.models import NextBlockModel
from nextblock.models.heads import FeatureConfig

STAMPS, CPU = Path("/usr/share/tuxpaint/stamps"), torch.device("cpu")


def _design(px: int, patch: int, width: int, depth: int, heads: int, predictor: int) -> ModelConfig:
    return ModelConfig(
        image_size=px, patch_size=patch, block_size=2, embed_dim=width, depth=depth, num_heads=heads,
        projection_dim=2 * width, block_mlp_dim=2 * width, predictor_dim=predictor, predictor_depth=2,
        predictor_heads=predictor * heads // width,
    )  # fmt: skip


DESIGNS = {
    "64": _design(64, 8, 192, 6, 3, 192),
    "64-tiny": _design(64, 8, 128, 4, 4, 128),
    "96-patch8": _design(96, 8, 192, 6, 3, 192),
    "128-patch16": _design(128, 16, 192, 6, 3, 128),
}


def prepare(root: Path) -> None:
    """Write both folders, pictures of at most 160 px along the shorter side over white, and split them."""
    copies = []
    for file in sorted(STAMPS.rglob("*.png")):
        kind, *rest = file.relative_to(STAMPS).parts
        if len(list((STAMPS / kind).rglob("*.png"))) >= 10:
            copies.append((file, root / "stamps" / kind / "-".join(rest)))
    data = Path(str(distribution("elpv-dataset").locate_file("elpv_dataset/data")))
    for line in filter(str.strip, (data / "labels.csv").read_text().splitlines()):
        name, chance, kind = line.split()
        state = "defective" if float(chance) > 0.5 else "functional"
        copies.append((data / name, root / "solar" / f"{kind}-{state}" / Path(name).name))
    for file, path in copies:
        image = Image.open(file).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        size = [round(side * min(1, 160 / min(image.size))) for side in image.size]
        path.parent.mkdir(parents=True, exist_ok=True)
        image.resize(size, Image.Resampling.LANCZOS).save(path)
    for name, parts in (("stamps", "train=0.7,val=0.3"), ("solar", "train=0.8,val=0.2")):
        main(f"data split {root}/{name} --parts {parts} --stratify --out {root}/{name}-split".split())


def run(root: Path, design: str, seed: str, samples: str) -> None:
    """Train on both folders together, then measure."""
    model, out = DESIGNS[design], root / "runs" / f"{design}-{seed}-{samples}"
    both = tuple(f"files:{root}/{name}-split/train.txt" for name in ("stamps", "solar"))
    config = RunConfig(
        seed=int(seed),
        model=model,
        data=DataConfig(train=both, val_resize_px=max(pair(model.image_size)), normalize="auto", workers=0),
        optim=OptimConfig(lr=1e-3, warmup="10%"),
        train=TrainConfig(duration=f"{samples}sa", batch_size=32, precision="fp32", device="cpu"),
        monitor=MonitorConfig(pictures_every=None, knn_every=None, tensorboard=False),
    )
    cpu0_s = time.process_time()
    nextblock.pretrain(config, out=out)
    row = {"design": design, "seed": seed, "samples": samples, "cpu_s": time.process_time() - cpu0_s}
    measure(root, nextblock.load(out), ft.evaluation_data(str(out), model), row)


def untrained(root: Path, design: str, seed: str) -> None:
    """Measure fresh weights, on images normalised as for a trained run of the design."""
    trained = next((root / "runs").glob(f"{design}-0-*"))
    model, row = nextblock.load(trained), {"design": f"untrained {design}", "seed": int(seed)}
    assert isinstance(model, NextBlockModel)
    measure(root, ft.untrained(model, int(seed)), ft.evaluation_data(str(trained), model.config), row)


def baselines(root: Path) -> None:
    """Measure what needs no encoder, on images of 64 px."""
    data = DataConfig(val_resize_px=64, mean=(0.5,) * 3, std=(0.25,) * 3, workers=0)
    for design, extract in (("pixels", _pixels), ("histogram", _histogram)):
        measure(root, extract, data, {"design": design})


def _pixels(images: torch.Tensor) -> tuple[torch.Tensor]:
    return (images.flatten(1),)


def _histogram(images: torch.Tensor) -> tuple[torch.Tensor]:
    colours = (images.flatten(2) * 0.25 + 0.5).clamp(0, 1 - 1e-6)
    joint = ((colours * 4).long() * torch.tensor([16, 4, 1])[:, None]).sum(1)
    parts = [one_hot(joint, 64), *(one_hot(level, 32) for level in (colours * 32).long().unbind(1))]
    # Roots make the cosine of two histograms their overlap (the Bhattacharyya coefficient).
    return (torch.cat([part.float().mean(1) for part in parts], 1).sqrt(),)


def measure(root: Path, encoder: NextBlockModel | Extract, data: DataConfig, row: dict[str, Any]) -> None:
    """Add top-1 of 20 neighbours and of logistic regression, C cross-validated, for each folder."""
    extract, size = encoder, 64
    if isinstance(encoder, NextBlockModel):
        last = FeatureConfig(layers=(encoder.config.depth - 1,), norm_layers=True)
        extract, size = ft.encoder_extract(encoder.eval(), [last]), encoder.config.image_size
    for name in ("stamps", "solar"):
        x, y = [], []
        for part in ("train", "val"):
            source = open_source(f"files:{root}/{name}-split/{part}.txt", data)
            table = FeatureTable(extract, source, data, size, batch_size=64, device=CPU)
            table.fill()
            x.append(table.read(table.readable()).numpy())
            y.append(source.labels[table.readable()])
        features = torch.from_numpy(x[1]), torch.from_numpy(x[0])
        labels, classes = torch.from_numpy(y[0]), len(source.class_names)
        (predicted,) = predict_all(*features, labels, classes, [(20, 0.07)], CPU)
        row[f"{name} knn"] = float((predicted.numpy() == y[1]).mean())
        if extract is _pixels:  # 12,288 numbers an image: 256 components keep nearly all of it
            pca = PCA(256, random_state=0).fit(x[0])
            x = [pca.transform(one) for one in x]
        scaler = StandardScaler(with_std=extract is not _pixels)
        head = make_pipeline(scaler, LogisticRegression(max_iter=500))
        folds = StratifiedKFold(5, shuffle=True, random_state=0)  # file order groups similar images
        probe = GridSearchCV(head, {"logisticregression__C": [1e-4, 1e-3, 1e-2, 1e-1, 1]}, cv=folds)
        row[f"{name} linear"] = float((probe.fit(x[0], y[0]).predict(x[1]) == y[1]).mean())
    with (root / "results.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    commands = {f.__name__: f for f in (prepare, run, untrained, baselines)}
    commands[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
