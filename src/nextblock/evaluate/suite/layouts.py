"""Where a benchmark's images lie below the root, in the form in which the data set is distributed.

    imagenet/train/CLASS/*, imagenet/val/CLASS/*
    inat2018/train2018.json, val2018.json, train_val2018/...
    cifar-10-batches-py/, cifar-100-python/, pcam/*.h5             as torchvision keeps them
    food-101/meta/train.json, food-101/images/CLASS/*.jpg          likewise
    dtd/dtd/labels/train1.txt, dtd/dtd/images/CLASS/*.jpg          likewise
    oxford-iiit-pet/annotations/trainval.txt, images/*.jpg         likewise
    stanford_cars/, camelyon17/, eurosat/, fMoW/                   copies of repositories of the hub
    iwildcam_v2.0/metadata.csv, train/*.jpg                        as WILDS keeps them
    rxrx1_v1.0/metadata.csv, images/EXPERIMENT/Plate1/B02_s1.png   likewise
    domainnet/infograph_train.txt, infograph/CLASS/*.jpg

Image files become one list of all their splits, and each split a list of numbers in it: so the classes are
the data set's, also where a split lacks some.
"""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from nextblock.errors import UsageError
from nextblock.evaluate.suite.benchmarks import Benchmark, Folders, Hub, Layout, Listed, Torchvision

__all__ = ["Files", "MissingDataError", "Sources", "find", "folder_of", "root_at"]


class MissingDataError(RuntimeError):
    """A benchmark's images are not where they are looked for."""


class Sources(NamedTuple):
    """Sources by the grammar of sources."""

    train: str
    test: str


@dataclass(frozen=True)
class Files:
    """Image files of all splits, and which of them train and test are."""

    paths: tuple[str, ...]
    """Absolute."""
    classes: tuple[str, ...]
    """The class of every file."""
    train: Int64[np.ndarray, " train"]
    test: Int64[np.ndarray, " test"]


class _Row(NamedTuple):
    split: str
    path: str
    """Below the folder."""
    label: str


def root_at(place: str | Path) -> Path:
    """The directory of the data sets, from anywhere; `ValueError` where its name cannot stand in a source."""
    root = Path(place).expanduser().absolute()
    if "," in str(root):
        raise UsageError(
            f"root is {str(root)!r}; a comma would end it in the name of a source: give a path without one, "
            "that of a link, say"
        )
    return root


def folder_of(benchmark: Benchmark, root: Path) -> Path:
    """Where the benchmark's images are looked for."""
    return root / benchmark.layout.folder


def find(benchmark: Benchmark, root: Path, *, download: bool = False) -> Files | Sources:
    """Find a benchmark's images, without reading any; with `download` fetch them first where that can be.

    Raises `MissingDataError` saying what is missing and how to get it, `ValueError` where an annotation file
    is not what it should be.
    """
    layout = benchmark.layout
    _check_packages(benchmark, layout)
    if isinstance(layout, Hub):
        return _of_hub(benchmark, layout, root, download=download)
    if download and isinstance(layout, Listed | Torchvision):
        _download(benchmark, layout, root)
    folder = folder_of(benchmark, root)
    if not folder.is_dir():
        raise _missing(benchmark, root, f"there is no {folder}")
    if isinstance(layout, Folders):
        for split in (*benchmark.train, benchmark.test):
            if not (folder / split).is_dir():
                raise _missing(benchmark, root, f"there is no {folder / split}")
        return _sources(benchmark, f"{folder}/")
    if isinstance(layout, Torchvision):
        return _sources(benchmark, f"torchvision:{layout.dataset},root={root},split=")
    try:
        return _files(benchmark, folder, list(_READERS[layout.annotations](folder, benchmark)))
    except FileNotFoundError as error:
        raise _missing(benchmark, root, f"there is no {error.filename}") from error
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise UsageError(
            f"{benchmark.name}: the annotations in {folder} are not what they should be "
            f"({type(error).__name__}: {error}); fetch them anew: {_how(benchmark, root)}"
        ) from error


def _sources(benchmark: Benchmark, start: str) -> Sources:
    """The sources that begin so and end with the name of the split."""
    (train,) = benchmark.train
    return Sources(start + train, start + benchmark.test)


def _how(benchmark: Benchmark, root: Path) -> str:
    return benchmark.fetch.format(at=folder_of(benchmark, root), root=root)


def _missing(benchmark: Benchmark, root: Path, what: str) -> MissingDataError:
    return MissingDataError(f"{what}; {_how(benchmark, root)}")


def _check_packages(benchmark: Benchmark, layout: Layout) -> None:
    needed = {Hub: "datasets", Torchvision: getattr(layout, "needs", None)}.get(type(layout))
    if needed is not None and importlib.util.find_spec(needed) is None:
        raise MissingDataError(f"{benchmark.title} is read with {needed}; pip install {needed}")


def _of_hub(benchmark: Benchmark, layout: Hub, root: Path, *, download: bool) -> Sources:
    """A copy below the root, else, where that is allowed, the hub."""
    copy = folder_of(benchmark, root)
    if not copy.is_dir() and not download:
        raise _missing(benchmark, root, f"there is no {copy}")
    name = str(copy) if copy.is_dir() else layout.repository
    card = copy / "README.md"
    # A copy without its card, or one that save_to_disk wrote, has no parts to choose from.
    has_config = not copy.is_dir() or (card.is_file() and "config_name:" in card.read_text(encoding="utf-8"))
    config = f",config={layout.config}" if layout.config is not None and has_config else ""
    return _sources(benchmark, f"hf:{name}{config},split=")


def _download(benchmark: Benchmark, layout: Listed | Torchvision, root: Path) -> None:
    """Let torchvision fetch it, unless it is there."""
    dataset = layout.dataset if isinstance(layout, Torchvision) else layout.torchvision
    if dataset is None:
        return
    from torchvision import datasets

    root.mkdir(parents=True, exist_ok=True)
    for split in (*benchmark.train, benchmark.test):
        options = {"train": split == "train"} if dataset.startswith("CIFAR") else {"split": split}
        try:
            getattr(datasets, dataset)(root=root, download=True, **options)
        except (RuntimeError, OSError) as error:
            told = " ".join(str(error).split())
            raise _missing(benchmark, root, f"torchvision could not fetch {dataset} ({told})") from error


# ------------------------------------------------------------------------------------------- annotation files


def _files(benchmark: Benchmark, folder: Path, rows: list[_Row]) -> Files:
    splits = np.array([row.split for row in rows], dtype=object)
    train = np.flatnonzero(np.isin(splits, list(benchmark.train))).astype(np.int64)
    test = np.flatnonzero(splits == benchmark.test).astype(np.int64)
    for split in (*benchmark.train, benchmark.test):
        if not (splits == split).any():
            raise UsageError(f"no image is of the split {split}")
    base = str(folder.absolute())
    return Files(tuple(f"{base}/{row.path}" for row in rows), tuple(row.label for row in rows), train, test)


def _dtd(folder: Path, benchmark: Benchmark) -> Iterator[_Row]:
    """Lines of CLASS/NAME.jpg; the first of the ten divisions, torchvision's default."""
    for split in (*benchmark.train, benchmark.test):
        for line in _lines(folder / "labels" / f"{split}1.txt"):
            yield _Row(split, f"images/{line}", line.partition("/")[0])


def _pets(folder: Path, benchmark: Benchmark) -> Iterator[_Row]:
    """Lines of NAME CLASS SPECIES NUMBER; the class is also the name up to its last underscore."""
    for split in (*benchmark.train, benchmark.test):
        for line in _lines(folder / "annotations" / f"{split}.txt"):
            if not line.startswith("#"):
                name = line.split()[0]
                yield _Row(split, f"images/{name}.jpg", name.rpartition("_")[0])


def _food101(folder: Path, benchmark: Benchmark) -> Iterator[_Row]:
    """Names of images without their ending, by class."""
    for split in (*benchmark.train, benchmark.test):
        by_class = json.loads((folder / "meta" / f"{split}.json").read_text(encoding="utf-8"))
        for label, names in by_class.items():
            for name in names:
                yield _Row(split, f"images/{name}.jpg", label)


def _inat2018(folder: Path, benchmark: Benchmark) -> Iterator[_Row]:
    """In the way of COCO: images with numbers, and the category of each number."""
    for split in (*benchmark.train, benchmark.test):
        told = json.loads((folder / f"{split}2018.json").read_text(encoding="utf-8"))
        category = {one["image_id"]: one["category_id"] for one in told["annotations"]}
        for image in told["images"]:
            yield _Row(split, image["file_name"], str(category[image["id"]]))


def _iwildcam(folder: Path, benchmark: Benchmark) -> Iterator[_Row]:  # noqa: ARG001 - a reader like the others
    """All splits of WILDS: each lacks classes that another has."""
    for row in _table(folder / "metadata.csv"):
        yield _Row(row["split"], f"train/{row['filename']}", row["y"])


def _rxrx1(folder: Path, benchmark: Benchmark) -> Iterator[_Row]:  # noqa: ARG001
    """All splits of WILDS: in the training experiments, site 2 is a split of its own."""
    for row in _table(folder / "metadata.csv"):
        split = "id_test" if (row["dataset"], row["site"]) == ("train", "2") else row["dataset"]
        path = f"images/{row['experiment']}/Plate{row['plate']}/{row['well']}_s{row['site']}.png"
        yield _Row(split, path, row["sirna_id"])


def _domainnet(folder: Path, benchmark: Benchmark) -> Iterator[_Row]:
    """Lines of infograph/CLASS/NAME.jpg and the class's number."""
    for split in (*benchmark.train, benchmark.test):
        for line in _lines(folder / f"infograph_{split}.txt"):
            path = line.rpartition(" ")[0]
            yield _Row(split, path, path.split("/")[1])


_READERS: dict[str, Callable[[Path, Benchmark], Iterator[_Row]]] = {
    "dtd": _dtd,
    "pets": _pets,
    "food101": _food101,
    "inat2018": _inat2018,
    "iwildcam": _iwildcam,
    "rxrx1": _rxrx1,
    "domainnet": _domainnet,
}


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _table(path: Path) -> Iterator[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)
