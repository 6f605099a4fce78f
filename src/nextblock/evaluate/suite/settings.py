"""Settings of the suite: the benchmarks and published accuracies as data. Quick to import.

Splits, classes and recipes come from XTRA-H/14's official code; numbers of images come from AIMv2's Table B1,
by AIM's lab.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nextblock.config import Attention
from nextblock.errors import UsageError
from nextblock.evaluate.probe.settings import ProbeSettings
from nextblock.evaluate.settings import EvalSettings, check_distinct
from nextblock.settings import Amount, Auto, Count, Natural, Positive, nearest_name, require

# ------------------------------------------------------------- readers of the data sets' own annotation files

Images = Iterator[tuple[str, str, str]]
"""(split, path below the data set's folder, class) of every image."""
Reader = Callable[[Path], Images]


def dtd(folder: Path) -> Images:
    """Lines of CLASS/NAME.jpg; the first of DTD's ten divisions, torchvision's default."""
    for split in ("train", "val", "test"):
        for line in _lines(folder / "labels" / f"{split}1.txt"):
            yield split, f"images/{line}", line.partition("/")[0]


def inat2018(folder: Path) -> Images:
    """COCO's layout: images with ids, and the category of each id."""
    for split in ("train", "val"):
        content = json.loads((folder / f"{split}2018.json").read_text(encoding="utf-8"))
        category = {entry["image_id"]: entry["category_id"] for entry in content["annotations"]}
        for image in content["images"]:
            yield split, image["file_name"], str(category[image["id"]])


def iwildcam(folder: Path) -> Images:
    """WILDS' table; reads all splits, as none has all classes."""
    for row in csv.DictReader(_lines(folder / "metadata.csv")):
        yield row["split"], f"train/{row['filename']}", row["y"]


def rxrx1(folder: Path) -> Images:
    """WILDS' table; site 2 of the training experiments is a split of its own."""
    for row in csv.DictReader(_lines(folder / "metadata.csv")):
        split = "id_test" if (row["dataset"], row["site"]) == ("train", "2") else row["dataset"]
        path = f"images/{row['experiment']}/Plate{row['plate']}/{row['well']}_s{row['site']}.png"
        yield split, path, row["sirna_id"]


def infograph(folder: Path) -> Images:
    """Lines of infograph/CLASS/NAME.jpg and the class's number."""
    for split in ("train", "test"):
        for line in _lines(folder / f"infograph_{split}.txt"):
            path = line.rpartition(" ")[0]
            yield split, path, path.split("/")[1]


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


# --------------------------------------------------------------------------------------------------- the rows

# Peak rates of the official training. Without warm-up, its scheduler starts the cosine at a tenth of the
# configured rate, so rows without warm-up list a tenth of the configs' rates.
SEVEN = (1e-4, 3e-4, 5e-4, 1e-3, 1.5e-3, 2e-3, 4e-3)
NINE = (1e-5, 3e-5, 5e-5, 1e-4, 1.5e-4, 2e-4, 4e-4, 8e-4, 1e-3)
TEN = (*NINE, 1e-2)
EPOCHS, NORM_BATCH = 100, 1024
"""Epochs of every probe, and images per batch norm: larger official batches are accumulated."""


class Benchmark(NamedTuple):
    """A data set, how to read its images, and the official recipe of its probe."""

    name: str
    title: str
    classes: int
    images: tuple[int | None, int | None]
    """Numbers of training and test images; None if unknown."""
    at: str
    """Folder below the root."""
    source: str | Reader
    """A source with {root} and {split}, or the reader of the annotation files."""
    get: str
    """How to get the data into {root}; {at} is the folder."""
    train: str = "train"
    """Split to train on; for a reader also several, joined by +."""
    test: str = "test"
    lr: tuple[float, ...] = NINE
    batch_size: int = 512
    warmup_epochs: int = 0
    terms: str = "see its page"
    head: Literal["attentive", "linear"] = "attentive"
    weight_decay: float = 0.1
    augment: Literal["timm", "crop"] = "timm"

    def how_to_get(self, root: str) -> str:
        """Instructions for getting the data into a root."""
        return self.get.format(at=f"{root}/{self.at}", root=root)

    def unlike_the_papers(self, classes: int | None, train: int, test: int) -> list[str]:
        """Describe numbers of classes and images that differ from the papers' in a sentence, if any do."""
        found, known = (classes, train, test), (self.classes, *self.images)
        words = [
            f"{ours:,} {what}, not {theirs:,}"
            for what, ours, theirs in zip(("classes", "to train on", "to test on"), found, known, strict=True)
            if None not in (ours, theirs) and ours != theirs
        ]
        return [f"{self.title} differs from the papers': {'; '.join(words)}."] if words else []


def _torchvision(name: str) -> str:
    return f"python -c \"from torchvision.datasets import {name}; {name}('{{root}}', download=True)\""


def _hub(repository: str) -> str:
    return f"hf download {repository} --repo-type dataset --local-dir {{at}}"


_WILDS = (
    "pip install wilds; python -c \"from wilds import get_dataset; get_dataset('{}', download=True, "
    "root_dir='{{root}}')\"; or any copy that has WILDS' {{at}}/metadata.csv and {{at}}/{}"
)
_IMAGENET = (
    "register at https://image-net.org, put ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and "
    'ILSVRC2012_devkit_t12.tar.gz into {at}; python -c "from torchvision.datasets import ImageNet; '
    "[ImageNet('{at}', split) for split in ('train', 'val')]\" sorts them into train/ and val/"
)
_INAT = (
    "unpack train_val2018.tar.gz, train2018.json.tar.gz and val2018.json.tar.gz of "
    "https://github.com/visipedia/inat_comp into {at}"
)
_PCAM = (
    'pip install h5py gdown; python -c "from torchvision.datasets import PCAM; '
    "[PCAM('{root}', split, download=True) for split in ('train', 'val')]\"; or unpack the .h5.gz files of "
    "train and valid of https://github.com/basveeling/pcam into {at}"
)
_DOMAINNET = (
    "unpack infograph.zip of DomainNet, http://ai.bu.edu/M3SDA, into {at}, beside its lists "
    "infograph_train.txt and infograph_test.txt"
)
_FOLDERS, _HUB = "{root}/imagenet/{split}", "hf:{root}/%s,split={split}"
_TORCHVISION = "torchvision:%s,root={root},split={split}"
_REGISTER = "registration; non-commercial"

# fmt: off
BENCHMARKS = (
    Benchmark("imagenet1k", "IN-1k", 1000, (1_281_167, 50_000), "imagenet", _FOLDERS, _IMAGENET,
        test="val", lr=SEVEN, batch_size=4096, warmup_epochs=10, terms=_REGISTER),
    Benchmark("inat18", "iNAT-18", 8142, (437_513, 24_426), "inat2018", inat2018, _INAT, test="val",
        lr=(*SEVEN, 8e-3, 1e-2, 1e-1), batch_size=4096, warmup_epochs=10, terms="non-commercial"),
    Benchmark("cifar10", "CIFAR-10", 10, (50_000, 10_000), "cifar-10-batches-py", _TORCHVISION % "CIFAR10",
        _torchvision("CIFAR10")),
    Benchmark("cifar100", "CIFAR-100", 100, (50_000, 10_000), "cifar-100-python", _TORCHVISION % "CIFAR100",
        _torchvision("CIFAR100")),
    Benchmark("food101", "Food101", 101, (75_750, 25_250), "food-101", _TORCHVISION % "Food101",
        _torchvision("Food101")),
    Benchmark("dtd", "DTD", 47, (3_760, 1_880), "dtd/dtd", dtd, _torchvision("DTD"),
        train="train+val", batch_size=128),
    Benchmark("pets", "Pets", 37, (3_680, 3_669), "oxford-iiit-pet", _TORCHVISION % "OxfordIIITPet",
        _torchvision("OxfordIIITPet"), train="trainval", batch_size=128),
    Benchmark("cars", "Cars", 196, (8_144, 8_041), "stanford_cars", _HUB % "stanford_cars",
        _hub("tanganke/stanford_cars"), lr=TEN, batch_size=128),
    Benchmark("iwildcam", "iWildCam", 182, (129_809, None), "iwildcam_v2.0", iwildcam,
        _WILDS.format("iwildcam", "train/FILENAME"), test="val", terms="CDLA permissive 1.0"),
    Benchmark("camelyon17", "CAM17", 2, (302_436, 34_904), "camelyon17", _HUB % "camelyon17",
        _hub("jxie/camelyon17"), train="id_train", test="ood_val"),
    Benchmark("pcam", "PCAM", 2, (262_144, 32_768), "pcam", _TORCHVISION % "PCAM", _PCAM,
        test="val", batch_size=4096),
    Benchmark("rxrx1", "RxRx1", 1139, (40_612, 9_854), "rxrx1_v1.0", rxrx1,
        _WILDS.format("rxrx1", "images/EXPERIMENT/PlateN/WELL_sSITE.png"), test="val",
        terms="CC BY-NC-SA 4.0"),
    Benchmark("eurosat", "EuroSAT", 10, (16_200, 5_400), "eurosat", _HUB % "eurosat",
        _hub("tanganke/eurosat")),
    Benchmark("fmow", "fMoW", 62, (76_863, 19_915), "fMoW", _HUB % "fMoW,config=WILDS",
        f"accept the terms on its page; {_hub('danielz01/fMoW')}", test="val", terms="to be accepted"),
    Benchmark("infograph", "Infograph", 345, (36_023, 15_582), "domainnet", infograph, _DOMAINNET,
        lr=TEN, batch_size=256, terms="non-commercial"),
    # The recipe of XTRA-B/16: only random crops, and no weight decay.
    Benchmark("imagenet1k-linear", "IN-1k linear", 1000, (1_281_167, 50_000), "imagenet", _FOLDERS, _IMAGENET,
        test="val", lr=SEVEN, batch_size=4096, warmup_epochs=10, terms=_REGISTER, head="linear",
        weight_decay=0.0, augment="crop"),
)
"""In the order of AIM's Table 6; the linear probe is not one of the fifteen."""
# fmt: on

FIFTEEN = tuple(bench.name for bench in BENCHMARKS if bench.head == "attentive")

# Top-1 in percent on the fifteen, then their mean as printed in AIM's Table 6 (arXiv 2401.08541). Only two
# cells of XTRA are confirmed, in its official repository.
PUBLISHED: dict[str, tuple[float, ...]] = {
    name: tuple(map(float, cells.split()))
    for name, cells in (
        line.split(":")
        for line in """
DINO B/8:        80.1 66.0 97.8 87.3 89.5 78.4 92.3 89.2 58.5 93.7 90.2  6.1 98.2 57.0 41.1 75.0
iBOT L/16:       83.5 70.5 99.2 93.3 93.5 81.6 92.8 90.8 61.8 94.5 90.0  5.9 98.0 60.3 47.7 77.6
DINOv2 g/14:     86.4 84.5 99.6 95.2 96.3 86.3 96.4 95.6 68.2 96.5 90.7  8.0 98.6 66.7 58.8 81.9
BEiT L/14:       62.2 44.4 94.4 78.7 79.0 64.0 80.9 69.5 52.0 92.8 88.2  4.2 97.5 47.7 25.9 65.4
MAE H/14:        80.9 64.6 97.1 85.8 90.2 78.1 95.0 93.7 58.1 94.2 89.8  5.4 98.1 56.9 42.2 75.3
MAE 2B/14:       82.2 70.8 97.5 87.3 93.4 81.2 95.1 94.9 57.8 94.4 90.3  7.3 98.2 60.1 50.2 77.4
AIM-0.6B:        78.5 64.0 97.2 86.8 90.1 80.1 93.0 93.0 57.9 94.3 90.0  7.8 98.4 58.3 45.2 75.6
AIM-1B:          80.6 67.2 98.2 88.3 91.6 81.8 93.4 93.9 58.6 94.5 90.0  9.0 98.6 59.8 47.5 76.9
AIM-3B:          82.2 69.7 98.4 89.9 92.7 81.9 94.1 93.8 58.8 94.3 90.4  9.7 98.5 60.9 48.9 77.6
AIM-7B:          82.4 70.9 98.6 90.0 93.1 82.3 93.8 92.1 59.5 93.6 90.7 10.1 98.6 61.7 49.6 77.8
AIM-7B layer 20: 84.0 75.5 98.9 91.8 94.1 85.6 95.4 95.0 61.4 94.2 90.5  8.4 98.5 63.5 57.7 79.6
XTRA H/14:       80.9
XTRA B/16:       76.8
""".strip().splitlines()
    )
}


def chosen(names: tuple[str, ...] | None) -> tuple[Benchmark, ...]:
    """Select benchmarks by name, or all, in the table's order; `UsageError` for an unknown name."""
    known = [bench.name for bench in BENCHMARKS]
    for name in names or ():
        if name not in known:
            raise UsageError(f"there is no benchmark {name!r}; {nearest_name(name, known)}")
    return tuple(bench for bench in BENCHMARKS if names is None or bench.name in names)


# ----------------------------------------------------------------------------------------------- the settings


@dataclass(frozen=True, kw_only=True)
class SuiteSettings(EvalSettings):
    """Settings of `suite`, which probes the benchmarks of the AIM and XTRA papers; defaults are official."""

    root: str
    """Directory of the data sets; --list --root DIR shows which ones it contains."""
    out: str = field()
    """Directory for the table and for each benchmark's probe."""
    only: tuple[str, ...] | None = None
    """Benchmarks to measure, by name; none: all."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # type: ignore[assignment]
    """Autocast precision of the encoder; auto: bf16, or fp32 on a device that only emulates bf16."""
    augment: Literal["official", "timm", "crop", "none"] = "official"
    """Training images; official: each benchmark's random crops, encoded in every epoch; none: centre crops,
    encoded once."""
    epochs: Count = EPOCHS
    """Training epochs; warm-ups scale with them."""
    lr: tuple[Positive, ...] | Auto = None
    """Peak learning rates to try; auto: each benchmark's official ones."""
    layers: tuple[str, ...] | Auto = None
    """Layers that a head averages, as in a probe; auto: attentive last6, linear last."""
    attention: tuple[Attention, ...] = ("native",)
    """native: as the checkpoint records; causal: the mask of pre-training; full: no mask."""
    seed: Natural = 0
    """Seed of heads, order, crops and held-out images."""
    cache_gb: Amount = 16.0
    """With augment none: refuse a benchmark whose features take more gigabytes than this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_distinct(self, "only")
        root = str(Path(self.root).absolute())
        require("," not in root, f"root is {root}; use a path or a link without a comma")
        for bench in self.benchmarks:
            ProbeSettings(**self.probe(bench, "train", "test"))

    @property
    def benchmarks(self) -> tuple[Benchmark, ...]:
        """Benchmarks to measure, in the table's order."""
        return chosen(self.only)

    def probe(self, bench: Benchmark, train: str, test: str) -> dict[str, Any]:
        """Settings of a benchmark's probe on these sources."""
        same = EvalSettings.__dataclass_fields__.keys() - {"out", "overwrite", "precision"}
        same |= {"attention", "cache_gb", "epochs", "layers", "seed"}
        lr = self.lr or bench.lr
        return {
            **{name: getattr(self, name) for name in same},
            "out": f"{self.out}/{bench.name}",
            "train": train,
            "test": test,
            "heads": (bench.head,),
            "lr": lr,
            "end_lr": min(1e-5, *lr),
            "weight_decay": (bench.weight_decay,),
            "batch_size": bench.batch_size,
            "norm_batch_size": NORM_BATCH,
            "warmup_epochs": bench.warmup_epochs * self.epochs / EPOCHS,
            "augment": bench.augment if self.augment == "official" else self.augment,
            "precision": "fp32" if self.precision == "auto" else self.precision,
            "baselines": False,
        }
