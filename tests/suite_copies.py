"""Small copies of the benchmarks' data sets, each in the layout in which the data set is distributed."""

from __future__ import annotations

import io
import json
import pickle
import zlib
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nextblock.tables import write_csv

KINDS = ("t-shirt", "The_Mona_Lisa", "ant")


def picture(label: int, number: int = 0, size: int = 16) -> np.ndarray:
    """A picture whose colour tells its class, and its number a little."""
    noise = np.random.default_rng((label, number)).integers(-20, 21, (size, size, 3))
    return (np.random.default_rng(label).integers(20, 236, 3) + noise).clip(0, 255).astype(np.uint8)


def encoded(label: int, number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(label, number)).save(file, "PNG")
    return file.getvalue()


def write(path: Path, content: bytes | str | Iterable[str]) -> None:
    """Bytes, text, or lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str | bytes) else "".join(f"{line}\n" for line in content)
    path.write_bytes(text.encode() if isinstance(text, str) else text)


def write_pictures(folder: Path, labels: Mapping[str, int]) -> None:
    for name, label in labels.items():
        write(folder / name, encoded(label, zlib.crc32(name.encode())))


def trust_cifar(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hashes that torchvision checks are those of the real files."""
    from torchvision.datasets import CIFAR10, cifar

    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: True)


def cifar10(root: Path) -> None:
    """Five batches of one image a class, and two a class to test on."""
    names = {f"data_batch_{number}": 1 for number in range(1, 6)} | {"test_batch": 2}
    for start, (name, count) in enumerate(names.items()):
        labels = [label for label in range(10) for _ in range(count)]
        images = [picture(label, 100 * start + i, 32) for i, label in enumerate(labels)]
        data = np.stack(images).transpose(0, 3, 1, 2).reshape(len(labels), -1)
        write(root / "cifar-10-batches-py" / name, pickle.dumps({"data": data, "labels": labels}))
    meta = {"label_names": [f"class {number}" for number in range(10)]}
    write(root / "cifar-10-batches-py" / "batches.meta", pickle.dumps(meta))


def dtd(root: Path, classes: int = 3) -> None:
    """One image a class in each of the three splits, and other splits in the second of the ten divisions."""
    folder = root / "dtd" / "dtd"
    for number, split in enumerate(("train", "val", "test")):
        names = {f"texture{label}/texture{label}_{number:04}.jpg": label for label in range(classes)}
        write(folder / "labels" / f"{split}1.txt", names)
        write(folder / "labels" / f"{split}2.txt", list(names)[::-1])
        write_pictures(folder / "images", names)


def pets(root: Path) -> None:
    folder = root / "oxford-iiit-pet"
    for split, numbers in (("trainval", (1, 2)), ("test", (3,))):
        names = {f"big_breed_{label}_{n}": label for label in range(3) for n in numbers}
        lines = (f"{name} {label + 1} 1 1" for name, label in names.items())
        write(folder / "annotations" / f"{split}.txt", lines)
        write_pictures(folder / "images", {f"{name}.jpg": label for name, label in names.items()})


def pcam(root: Path) -> None:
    import h5py

    (root / "pcam").mkdir(parents=True)
    for split, count in (("train", 6), ("valid", 4)):
        labels = np.arange(count) % 2
        images = np.stack([picture(int(label), number) for number, label in enumerate(labels)])
        for kind, values in (("x", images), ("y", labels.reshape(-1, 1, 1, 1).astype(np.uint8))):
            name = f"camelyonpatch_level_2_split_{split}_{kind}.h5"
            with h5py.File(root / "pcam" / name, "w") as file:
                file[kind] = values


def hub(root: Path, name: str, splits: str, config: str | None = None) -> None:
    """A repository of parquet files, four classes, twice as many images in the first split."""
    import datasets

    names = datasets.ClassLabel(names=[f"kind {n}" for n in range(4)])
    features = datasets.Features({"image": datasets.Image(), "label": names})
    folder, inside = root / name, config or "data"
    (folder / inside).mkdir(parents=True)
    for start, split in enumerate(splits.split()):
        labels = [label for label in range(4) for _ in range(2 if start == 0 else 1)]
        images = [{"bytes": encoded(label, 100 * start + i), "path": None} for i, label in enumerate(labels)]
        rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        rows.to_parquet(folder / inside / f"{split}-00000-of-00001-0c47fc6c1fd0d1.parquet")
    files = [f"  - {{split: {split}, path: {inside}/{split}-*}}" for split in splits.split()]
    lines = [line for one in (config, "other") for line in (f"- config_name: {one}", "  data_files:", *files)]
    write(folder / "README.md", ["---", *(["configs:", *lines] if config else ["license: unknown"]), "---"])


cars = partial(hub, name="stanford_cars", splits="train test contrast")
camelyon17 = partial(hub, name="camelyon17", splits="id_train id_val ood_val")
fmow = partial(hub, name="fMoW", splits="train val test", config="WILDS")


def imagenet1k(root: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        names = {f"n{label:08}/{label}_{n}.JPEG": label for label in range(3) for n in range(count)}
        write_pictures(root / "imagenet" / split, names)


def inat18(root: Path) -> None:
    for split, numbers in (("train", (0, 1)), ("val", (2,))):
        names = {f"train_val2018/Plantae/{label}/{n:032x}.jpg": label for label in range(3) for n in numbers}
        images = [{"id": 10 * i + len(split), "file_name": name} for i, name in enumerate(names)]
        annotations = [{"image_id": one["id"], "category_id": names[one["file_name"]]} for one in images]
        found = {"images": images, "annotations": annotations[::-1], "categories": []}
        write(root / "inat2018" / f"{split}2018.json", json.dumps(found))
        write_pictures(root / "inat2018", names)


def iwildcam(root: Path) -> None:
    """Five classes: the last is in neither train nor val; one of val is not in train."""
    of_splits = {"train": (0, 1, 2), "val": (0, 1, 3), "test": (4, 0), "id_val": (0,), "id_test": (1,)}
    pairs = [(split, label) for split, labels in of_splits.items() for label in labels]
    rows = [{"split": split, "filename": f"{split}-{label}.jpg", "y": label} for split, label in pairs]
    write(root / "iwildcam_v2.0" / "metadata.csv", write_csv(rows))
    write_pictures(root / "iwildcam_v2.0" / "train", {f"{s}-{label}.jpg": label for s, label in pairs})


def rxrx1(root: Path) -> None:
    """Three classes, two sites of each well."""
    rows, names = [], {}
    for e, split in enumerate(("train", "val", "test")):
        for label in range(3):
            for site in (1, 2):
                well = {"experiment": f"HEPG2-0{e}", "plate": 1, "well": f"B0{label}", "site": site}
                rows.append({"dataset": split, **well, "cell_type": "HEPG2", "sirna_id": label})
                names[f"HEPG2-0{e}/Plate1/B0{label}_s{site}.png"] = label
    write(root / "rxrx1_v1.0" / "metadata.csv", write_csv(rows))
    write_pictures(root / "rxrx1_v1.0" / "images", names)


def infograph(root: Path) -> None:
    for split, numbers in (("train", (1, 2)), ("test", (3,))):
        names = {f"infograph/{kind}/{c}_{n:06}.jpg": c for c, kind in enumerate(KINDS) for n in numbers}
        lines = (f"{name} {c}" for name, c in names.items())
        write(root / "domainnet" / f"infograph_{split}.txt", lines)
        write_pictures(root / "domainnet", names)
