"""Data sets whose own annotation files name images, splits and classes: readers of these files.

Each gives (split, path below the data set's folder, class) of every image.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path

Images = Iterator[tuple[str, str, str]]
Reader = Callable[[Path], Images]


def dtd(folder: Path) -> Images:
    """Lines of CLASS/NAME.jpg; the first of DTD's ten divisions, torchvision's default."""
    for split in ("train", "val", "test"):
        for line in _lines(folder / "labels" / f"{split}1.txt"):
            yield split, f"images/{line}", line.partition("/")[0]


def inat2018(folder: Path) -> Images:
    """COCO's layout: images with numbers, and the category of each number."""
    for split in ("train", "val"):
        found = json.loads((folder / f"{split}2018.json").read_text(encoding="utf-8"))
        category = {one["image_id"]: one["category_id"] for one in found["annotations"]}
        for image in found["images"]:
            yield split, image["file_name"], str(category[image["id"]])


def iwildcam(folder: Path) -> Images:
    """WILDS' table; no split has all classes, so all splits are read."""
    for row in _table(folder / "metadata.csv"):
        yield row["split"], f"train/{row['filename']}", row["y"]


def rxrx1(folder: Path) -> Images:
    """WILDS' table; site 2 of the training experiments is a split of its own."""
    for row in _table(folder / "metadata.csv"):
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


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
