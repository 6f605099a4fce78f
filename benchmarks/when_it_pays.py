"""When pre-training pays: accuracy against images seen, beside SimCLR and DINO at equal CPU time.

    python benchmarks/when_it_pays.py DIR solar    # our curve on solar cells, then the rivals
    python benchmarks/when_it_pays.py DIR longer   # ours and the tuned rivals, three times as long
    python benchmarks/when_it_pays.py DIR own      # of these, only ours
    python benchmarks/when_it_pays.py DIR curves   # our curves on digits and stamps
    python benchmarks/when_it_pays.py DIR scaling  # other widths, targets and blocks on digits
    python benchmarks/when_it_pays.py DIR solar knn linear  # some measures now, the others another time
    python benchmarks/when_it_pays.py DIR table    # Markdown tables of what there is
    python benchmarks/when_it_pays.py DIR draw FILE.png

What DIR/results.jsonl has already is not computed again. The results: docs/guides/when_it_pays.md and
docs/results/scaling.md. Needs PyPI's elpv-dataset, Debian's tuxpaint-stamps-default and, for the rivals, an
environment DIR/lightly-env with lightly-train.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from safetensors.torch import load_file

import nextblock
import small_folders
import targets
from nextblock.checkpoint import save_model
from nextblock.cli import main
from nextblock.data import open_source
from nextblock.evaluate.features import evaluation_data
from nextblock.evaluate.table import FeatureTable
from nextblock.models import NextBlockModel
from nextblock.report.compare import correlation, ranks

SEEDS, BATCH, EVERY, SHORT = (0, 1, 2), 32, 1024, 4_096
LENGTHS = {"solar": 32_768, "digits": 32_768, "stamps": 32_768}
RIVALS_AT = 16_384
"""Rivals have the CPU time of so many of our images, half of our run on solar cells."""
LONGER = 3
"""Times that, in whole schedules."""
LONGER_RATE = 3e-4
"""Of the tuned rivals then; at 1e-3, its best in the short schedule, SimCLR learned nothing (seed 0)."""
OWN_RATES = (5e-4, 1e-3, 2e-3, 4e-3)
"""Of ours then, tried for the whole schedule; 1e-3 is that of the other runs."""
METHODS = {"knn": "kNN, k 20", "linear": "linear", "ep": "ep"}
BASELINES = ("untrained", "pixels 16x16", "colour histogram")
VARIANTS: dict[str, dict[str, Any]] = {
    "as above": {},
    "half as wide": {"model.embed_dim": 64, "model.num_heads": 2},
    "single patches": {"model.block_size": 1},
    "raw pixels": {"model.norm_pixels": False},
    "a quarter of the images": {"data.train": "subset:{root}/quarter/quarter.txt"},
}
SOONER = {"momentum_start": 0.9, "student_freeze_last_layer_steps": 16}
"""By default half of the teacher would be its first weights after a few hundred steps, and the last layer
would be frozen for 1,250 steps."""
RIVALS: dict[str, dict[str, Any]] = {
    "simclr": {"method": "simclr"},
    "dino": {"method": "dino"},
    "simclr tuned": {"method": "simclr", "optim": "adamw", "batch_size": 32},
    "dino tuned": {"method": "dino", "optim": "adamw", "batch_size": 32, "method_args": SOONER},
}
RATES = (3e-4, 1e-3, 3e-3)
"""Of AdamW for the tuned rivals, tried for a third of the steps; lightly-train is given 256 / 32 of it."""


def sources(root: Path, name: str) -> tuple[str, str]:
    """Images to train and to measure on."""
    if name == "digits":
        return targets.sources(root, name)
    return f"files:{root}/{name}-split/train.txt", f"files:{root}/{name}-split/val.txt"


def pretrain(
    root: Path, name: str, seed: int, images: int, variant: str = "as above", *, rate: float | None = None
) -> Path:
    """Train as for docs/results/targets.md, and keep a checkpoint every 1,024 images."""
    train, test = sources(root, name)
    changes: dict[str, Any] = VARIANTS[variant] if rate is None else {"optim.lr": rate}
    variant = variant if rate is None else f"lr {rate:g}"
    if "data.train" in changes:
        train = changes["data.train"].format(root=root)
    out = root / "runs" / f"{name}-{variant.replace(' ', '-')}-{images}-{seed}"
    nextblock.pretrain("xtra-tiny", out=out, **{
        **targets.COMMON, **targets.SETS["digits" if name == "digits" else "solar"], **changes,
        "data.train": train, "data.val": test, "seed": seed, "train.duration": f"{images}sa",
        "checkpoint.every": f"{EVERY}sa", "checkpoint.keep": 1000, "monitor.val_every": f"{images}sa",
    })  # fmt: skip
    return out


def measure(
    root: Path,
    name: str,
    spec: str,
    row: dict[str, Any],
    methods: list[str],
    *,
    has_loss: bool = True,
    baselines: bool = False,
) -> None:
    """Add a row for each method that has none yet; with baselines, for these too."""
    key = {one: row[one] for one in ("encoder", "seed", "images")}
    missing = [one for one in methods if not is_done(root, set=name, **key, method=METHODS[one])]
    if not missing:
        return
    train, test = sources(root, name)
    if has_loss:
        row = {**row, "loss": loss_of(root, name, spec)}
    # A whole run keeps its accuracies, for `nextblock report RUN RUN ...`.
    out = f"{spec}/eval-{'-'.join(missing)}" if Path(spec, "config.yaml").is_file() else None
    found = nextblock.compare(
        model=(spec,), train=train, test=test, methods=tuple(missing), baselines=baselines, seed=row["seed"],
        epochs=30, device="cpu", workers=0, out=out,
    )  # fmt: skip
    with (root / "results.jsonl").open("a") as file:
        for one in found.rows:
            facts = row
            if one["encoder"] != "model":
                facts = {"encoder": one["encoder"], "seed": row["seed"], "images": 0}
            full = {"set": name, **facts, "method": one["method"], "top1": one["top1"]}
            file.write(json.dumps(full) + "\n")


def loss_of(root: Path, name: str, spec: str) -> float:
    """Mean loss of the images to measure on."""
    model = nextblock.load(spec)
    assert isinstance(model, NextBlockModel)
    model.eval()
    data = evaluation_data(spec, model.config, workers=0)
    source = open_source(sources(root, name)[1], data)

    def extract(images: torch.Tensor) -> tuple[torch.Tensor]:
        return (model(images).block_loss.mean(1, keepdim=True),)

    table = FeatureTable(
        extract, source, data, model.config.image_size, batch_size=64, device=torch.device("cpu")
    )
    with torch.no_grad():
        table.fill()
    return float(table.read(table.readable()).mean())


def results(root: Path) -> list[dict[str, Any]]:
    """All rows so far."""
    file = root / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def is_done(root: Path, **wanted: Any) -> bool:
    """Whether a row has these values."""
    return any(wanted.items() <= row.items() for row in results(root))


def curve(root: Path, name: str, seed: int, methods: list[str]) -> None:
    """Train, and measure at the end and at the checkpoints of 1,024, 2,048, 4,096, ... images."""
    last = LENGTHS[name]
    out = pretrain(root, name, seed, last)
    for images in (last // 2**i for i in range((last // EVERY).bit_length())):
        spec = str(out / "checkpoints" / f"step_{images // BATCH:08d}")
        row = {"encoder": "nextblock", "seed": seed, "images": images}
        measure(root, name, spec, row, methods, baselines=images == last)


# ------------------------------------------------------------------------------------------------- the rivals


def train_rival(root: Path, label: str, seed: int, steps: int, **given: Any) -> tuple[str, dict[str, Any]]:
    """Train by lightly-train, and put the weights into a model file that `nextblock` reads."""
    rate = f"-{given['lr']:g}" if "lr" in given else ""
    out = root / "rivals" / f"{label.replace(' ', '-')}{rate}-{steps}-{seed}"
    ours = pretrain(root, "solar", 99, EVERY)  # for its settings, mean and deviation
    model = nextblock.load(ours)
    assert isinstance(model, NextBlockModel)
    data = evaluation_data(str(ours), model.config, workers=0)
    if not (out / "facts.json").is_file():
        images = root / "solar-train"
        if not images.is_dir():
            images.mkdir()
            for line in (root / "solar-split" / "train.txt").read_text().splitlines():
                file = Path(line.split("\t")[0])
                (images / file.name).symlink_to(file)
        out.mkdir(parents=True, exist_ok=True)
        settings = {
            "out": str(out),
            "images": str(images),
            "steps": steps,
            "seed": seed,
            **RIVALS[label],
            **given,
        }
        settings |= {"mean": data.mean, "std": data.std}
        (out / "settings.json").write_text(json.dumps(settings))
        script = Path(__file__).with_name("lightly_rival.py")
        subprocess.run([root / "lightly-env/bin/python", script, out / "settings.json"], check=True)
    model.encoder.load_state_dict(load_file(out / "encoder.safetensors"))
    save_model(out / "model.safetensors", model, data=data)
    return str(out / "model.safetensors"), json.loads((out / "facts.json").read_text())


def steps_of(root: Path) -> dict[str, int]:
    """Steps of each rival in our CPU time, from the difference of two short runs of each."""
    file = root / "steps.json"
    if not file.is_file():
        cost_s = {}
        for label, rival in RIVALS.items():
            less = 512 // rival.get("batch_size", 128)
            spent = [train_rival(root, label, 99, steps)[1]["cpu_s"] for steps in (less, 3 * less)]
            cost_s[label] = (spent[1] - spent[0]) / (2 * less)
        spent = []
        for images in (EVERY, 4 * EVERY):
            started_s = time.process_time()
            pretrain(root, "solar", 99, images)
            spent.append(time.process_time() - started_s)
        cost_s["nextblock"] = (spent[1] - spent[0]) / (3 * EVERY // BATCH)
        budget_s = cost_s["nextblock"] * RIVALS_AT / BATCH
        steps = {label: round(budget_s / one_s) for label, one_s in cost_s.items()}
        file.write_text(json.dumps({"steps": steps, "cost_s": cost_s, "budget_s": budget_s}))
    return json.loads(file.read_text())["steps"]


def tuned_rate(root: Path, label: str, rates: Sequence[float], train: Callable[[float], str]) -> float:
    """The best rate by kNN within the training images, each left out once; `train` returns a model."""
    file = root / f"{label.replace(' ', '-')}.json"
    if not file.is_file():
        trials = {}
        for rate in rates:
            found = nextblock.knn(
                model=train(rate), train=sources(root, "solar")[0], k=(20,), baselines=False, device="cpu",
                workers=0,
            )  # fmt: skip
            trials[rate] = found.rows[0]["top1"]
        file.write_text(json.dumps(trials))
    trials = json.loads(file.read_text())
    return float(max(trials, key=trials.get))


def rival_rate(root: Path, label: str) -> float:
    """The best rate of a tuned rival, in a third of the short schedule."""
    steps = steps_of(root)[label] // 3
    return tuned_rate(root, label, RATES, lambda rate: train_rival(root, label, 0, steps, lr=8 * rate)[0])


def rival(
    root: Path, label: str, seed: int, methods: list[str], *, times: int = 1, rate: float | None = None
) -> None:
    """Train a rival for so many times our CPU time, and measure it; `rate` is of AdamW."""
    steps = steps_of(root)[label]
    given = {} if rate is None else {"lr": 8 * rate}
    spec, facts = train_rival(root, label, seed, times * steps, **given)
    row = {"encoder": label, "seed": seed, "images": facts["steps"] * facts["batch"], **facts}
    measure(root, "solar", spec, row, methods, has_loss=False)


def solar(root: Path, methods: list[str]) -> None:
    """Our curves on solar cells, then the rivals."""
    for seed in SEEDS:
        curve(root, "solar", seed, methods)
    for seed in SEEDS:
        for label in RIVALS:
            rate = rival_rate(root, label) if "tuned" in label else None
            rival(root, label, seed, methods, rate=rate)


def longer(root: Path, methods: list[str]) -> None:
    """Ours and the tuned rivals on solar cells, each in a longer schedule."""
    longer_own(root, methods)
    for seed in SEEDS:
        for label in RIVALS:
            if "tuned" in label:
                rival(root, label, seed, methods, times=LONGER, rate=LONGER_RATE)


def longer_own(root: Path, methods: list[str]) -> None:
    """Ours in the longer schedule, with the rate of the other runs and with the best one."""
    images = LONGER * RIVALS_AT

    def train(rate: float, seed: int = 0) -> str:
        return str(pretrain(root, "solar", seed, images, rate=rate))

    usual = targets.COMMON["optim.lr"]
    best = tuned_rate(root, "nextblock", OWN_RATES, train)
    for seed in SEEDS:
        for rate in dict.fromkeys((usual, best)):
            name = "nextblock, longer" + ("" if rate == usual else f", lr {rate:g}")
            row = {"encoder": name, "seed": seed, "images": images}
            measure(root, "solar", train(rate, seed), row, methods, baselines=True)


def curves(root: Path, methods: list[str]) -> None:
    """Our curves on digits and stamps."""
    for seed in SEEDS:
        for name in ("digits", "stamps"):
            curve(root, name, seed, methods)


def scaling(root: Path, methods: list[str]) -> None:
    """Variants on digits, each of 4,096 images."""
    if not (root / "quarter").is_dir():
        split = "data split digits:split=train --parts quarter=0.25,rest=0.75 --stratify --out"
        main([*split.split(), str(root / "quarter")])
    for seed in SEEDS:
        for variant in VARIANTS:
            out = pretrain(root, "digits", seed, SHORT, variant)
            measure(root, "digits", str(out), {"encoder": variant, "seed": seed, "images": SHORT}, methods)


# --------------------------------------------------------------------------------------------------- the page


def cells(root: Path, key: str = "top1") -> dict[tuple[str, str, int, str], list[float]]:
    """Values of all seeds by set, encoder, images and method."""
    found: dict[tuple[str, str, int, str], list[float]] = defaultdict(list)
    for row in results(root):
        if key in row:
            found[row["set"], row["encoder"], row["images"], row["method"]].append(row[key])
    return found


def words(values: list[float]) -> str:
    """Mean and sample deviation of shares, in per cent."""
    shown = [100 * value for value in values]
    return f"{mean(shown):.1f} ± {stdev(shown):.1f}" if len(shown) > 1 else "".join(f"{x:.1f}" for x in shown)


def table(root: Path) -> str:
    """All accuracies as Markdown, and how they go together with the loss."""
    found, losses = cells(root), cells(root, "loss")
    lines = []
    for name in dict.fromkeys(one for one, *_ in found):
        lines += [
            f"\n{name}\n",
            "| encoder | images seen | seeds | loss | kNN | linear | ep |",
            "|---|" + "---:|" * 6,
        ]
        keys = dict.fromkeys(key[:3] for key in found if key[0] == name)
        for key in sorted(keys, key=lambda key: (key[2] == 0, key[1] != "nextblock", key[1], key[2])):
            values = [found.get((*key, method), []) for method in METHODS.values()]
            loss = losses.get((*key, "linear"), [])
            one = f"{mean(loss):.3f}" if loss else ""
            lines.append(
                f"| {key[1]} | {key[2] or '':,} | {len(values[0])} | {one} | "
                if key[2]
                else f"| {key[1]} | | {len(values[0])} | | "
            )
            lines[-1] += " | ".join(map(words, values)) + " |"
        for method in METHODS.values():
            pairs = [
                (row["loss"], row["top1"]) for row in results(root)
                if (row["set"], row["encoder"], row["method"]) == (name, "nextblock", method)
            ]  # fmt: skip
            if len(pairs) > 2:
                x, y = zip(*pairs, strict=True)
                lines.append(
                    f"\nloss and {method}: Pearson {correlation(x, y):+.2f}, "
                    f"Spearman {correlation(ranks(x), ranks(y)):+.2f}, {len(pairs)} checkpoints"
                )
    return "\n".join(lines)


def draw(root: Path, file: str) -> None:
    """Accuracy against images seen, a column a set and a row a measure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found, names = cells(root), ("solar", "digits", "stamps")
    figure, grid = plt.subplots(3, 3, figsize=(10, 8.5), sharex=True, layout="constrained")
    for name, column in zip(names, grid.T, strict=True):
        for method, axes in zip(METHODS.values(), column, strict=True):
            line = sorted(
                (images, values) for (one, encoder, images, what), values in found.items()
                if (one, encoder, what) == (name, "nextblock", method)
            )  # fmt: skip
            axes.errorbar(
                [images for images, _ in line], [100 * mean(v) for _, v in line],
                [100 * stdev(v) if len(v) > 1 else 0 for _, v in line],
                marker="o", markersize=3, label="nextblock",
            )  # fmt: skip
            for number, baseline in enumerate(BASELINES):
                if values := found.get((name, baseline, 0, method)):
                    axes.axhline(100 * mean(values), color=f"C{1 + number}", linestyle="--", label=baseline)
            for number, label in enumerate(RIVALS):
                for (one, encoder, images, what), values in found.items():
                    if (one, encoder, what) == (name, label, method):
                        axes.errorbar(
                            images, 100 * mean(values), 100 * stdev(values) if len(values) > 1 else 0,
                            marker="x", color=f"C{4 + number}", label=label,
                        )  # fmt: skip
            axes.set_xscale("log")
            axes.set_xticks([EVERY * 2**i for i in range(6)], [f"{2**i}k" for i in range(6)])
            axes.minorticks_off()
            axes.set_title(f"{name}: {method}", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("images seen")
    for axes in grid[:, 0]:
        axes.set_ylabel("top-1, %")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    place, (command, *rest) = Path(sys.argv[1]), sys.argv[2:]
    place.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if command == "table":
        sys.stdout.write(table(place) + "\n")
    elif command == "draw":
        draw(place, rest[0])
    else:
        if not (place / "stamps-split").is_dir():
            small_folders.prepare(place)
        {"solar": solar, "longer": longer, "own": longer_own, "curves": curves, "scaling": scaling}[command](
            place, rest or list(METHODS)
        )
