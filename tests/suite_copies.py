"""Small copies of the benchmarks' data sets, each in the layout in which the data set is distributed."""

from __future__ import annotations

import csv
import importlib
import io
import json
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def picture(label: int, number: int = 0) -> np.ndarray:
    """A 16-px picture whose colour tells its class, and its number a little."""
    rng = np.random.default_rng(label)
    noise = np.random.default_rng((label, number)).integers(-20, 21, (16, 16, 3))
    return (rng.integers(20, 236, 3) + noise).clip(0, 255).astype(np.uint8)


def encoded(label: int, number: int = 0) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(label, number)).save(file, "PNG")
    return file.getvalue()


def write_picture(path: Path, label: int, number: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(label, number))


def write_text(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


# ------------------------------------------------------------------------------------------ of torchvision


def trust_cifar(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hashes that torchvision checks are those of the real files."""
    from torchvision.datasets import CIFAR10, cifar

    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: True)


def _cifar_rows(classes: int, per_class: int, start: int) -> tuple[np.ndarray, list[int]]:
    labels = [label for label in range(classes) for _ in range(per_class)]
    images = [
        np.asarray(Image.fromarray(picture(label, start + i)).resize((32, 32)))
        for i, label in enumerate(labels)
    ]
    return np.stack(images).transpose(0, 3, 1, 2).reshape(len(labels), -1), labels


def cifar10(root: Path, *, classes: int = 10, names: int = 10) -> None:
    """Five batches of one image a class, and two a class to test on."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for number in range(1, 6):
        data, labels = _cifar_rows(classes, 1, 100 * number)
        (folder / f"data_batch_{number}").write_bytes(pickle.dumps({"data": data, "labels": labels}))
    data, labels = _cifar_rows(classes, 2, 900)
    (folder / "test_batch").write_bytes(pickle.dumps({"data": data, "labels": labels}))
    told = {"label_names": [f"class {number}" for number in range(names)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(told))


def cifar100(root: Path) -> None:
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for split, count in (("train", 2), ("test", 1)):
        data, labels = _cifar_rows(100, count, 0)
        coarse = [label // 5 for label in labels]
        entry = {"data": data, "fine_labels": labels, "coarse_labels": coarse}
        (folder / split).write_bytes(pickle.dumps(entry))
    told = {"fine_label_names": [f"fine {number}" for number in range(100)]}
    (folder / "meta").write_bytes(pickle.dumps(told))


def food101(root: Path, classes: int = 101) -> None:
    for split, numbers in (("train", (1, 2)), ("test", (3,))):
        by_class = {f"dish_{n}": [f"dish_{n}/{number}{n}" for number in numbers] for n in range(classes)}
        write_text(root / "food-101" / "meta" / f"{split}.json", [json.dumps(by_class)])
        for label, names in enumerate(by_class.values()):
            for name in names:
                write_picture(root / "food-101" / "images" / f"{name}.jpg", label, len(name))


def dtd(root: Path, classes: int = 47) -> None:
    """One image a class in each of the three splits, and other splits in the second of the ten divisions."""
    folder = root / "dtd" / "dtd"
    for number, split in enumerate(("train", "val", "test")):
        names = [f"texture{label}/texture{label}_{number:04}.jpg" for label in range(classes)]
        write_text(folder / "labels" / f"{split}1.txt", names)
        write_text(folder / "labels" / f"{split}2.txt", names[::-1])
        for label, name in enumerate(names):
            write_picture(folder / "images" / name, label, number)


def pets(root: Path, classes: int = 37) -> None:
    folder = root / "oxford-iiit-pet"
    for split, numbers in (("trainval", (1, 2)), ("test", (3,))):
        rows = [(f"big_breed_{label}_{number}", label) for label in range(classes) for number in numbers]
        write_text(
            folder / "annotations" / f"{split}.txt", [f"{name} {label + 1} 1 1" for name, label in rows]
        )
        for number, (name, label) in enumerate(rows):
            write_picture(folder / "images" / f"{name}.jpg", label, number)


def pcam(root: Path) -> None:
    h5py = importlib.import_module("h5py")
    folder = root / "pcam"
    folder.mkdir(parents=True)
    for split, count in (("train", 6), ("valid", 4)):
        labels = np.arange(count) % 2
        images = np.stack([picture(int(label), number) for number, label in enumerate(labels)])
        for kind, name, values in (
            ("x", "x", images),
            ("y", "y", labels.reshape(-1, 1, 1, 1).astype(np.uint8)),
        ):
            with h5py.File(folder / f"camelyonpatch_level_2_split_{split}_{kind}.h5", "w") as file:
                file[name] = values


# ------------------------------------------------------------------------------------- of the hub, as copied


def hub(folder: Path, splits: Mapping[str, int], classes: int, *, config: str | None = None) -> None:
    """A repository of parquet files, `splits` images a class in each, with its card."""
    import datasets

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"kind {n}" for n in range(classes)])}
    )
    inside = "data" if config is None else config
    (folder / inside).mkdir(parents=True)
    for start, (split, count) in enumerate(splits.items()):
        labels = [label for label in range(classes) for _ in range(count)]
        images = [{"bytes": encoded(label, 100 * start + i), "path": None} for i, label in enumerate(labels)]
        rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        rows.to_parquet(folder / inside / f"{split}-00000-of-00001-0c47fc6c1fd0d1.parquet")
    card = ["---", "license: unknown"]
    if config is not None:
        files = [f"  - {{split: {split}, path: {inside}/{split}-*}}" for split in splits]
        card += ["configs:", f"- config_name: {config}", "  data_files:", *files]
        card += ["- config_name: other", "  data_files:", *files]
    write_text(folder / "README.md", [*card, "---"])


# ------------------------------------------------------------------------------------------------ of others


def imagenet(root: Path, classes: int = 3) -> None:
    for split, count in (("train", 3), ("val", 2)):
        for label in range(classes):
            for number in range(count):
                name = f"n{label:08}_{number}.JPEG"
                write_picture(root / "imagenet" / split / f"n{label:08}" / name, label, number)


def inat2018(root: Path, classes: int = 3) -> None:
    folder = root / "inat2018"
    for split, numbers in (("train", (0, 1)), ("val", (2,))):
        rows = [(label, number) for label in range(classes) for number in numbers]
        names = [f"train_val2018/Plantae/{label}/{number:032x}.jpg" for label, number in rows]
        images = [{"id": 10 * i + len(split), "file_name": name} for i, name in enumerate(names)]
        annotations = [
            {"id": i, "image_id": image["id"], "category_id": label}
            for i, (image, (label, _)) in enumerate(zip(images, rows, strict=True))
        ]
        told = {"images": images, "annotations": annotations[::-1], "categories": []}
        write_text(folder / f"{split}2018.json", [json.dumps(told)])
        for name, (label, number) in zip(names, rows, strict=True):
            write_picture(folder / name, label, number)


def iwildcam(root: Path) -> None:
    """Five classes: the last is in neither train nor val, which lacks another as well."""
    folder = root / "iwildcam_v2.0"
    of_splits = {"train": (0, 1, 2, 3), "val": (0, 1, 3), "test": (4, 0), "id_val": (0,), "id_test": (1,)}
    rows = [
        {"split": split, "location_remapped": 7, "filename": f"{split}-{label}.jpg", "y": label}
        for split, labels in of_splits.items()
        for label in labels
    ]
    write_csv(folder / "metadata.csv", rows)
    for row in rows:
        if row["split"] in ("train", "val"):
            write_picture(folder / "train" / str(row["filename"]), int(str(row["y"])))


def rxrx1(root: Path) -> None:
    """Three classes, two sites of each well."""
    folder = root / "rxrx1_v1.0"
    rows = [
        {"dataset": split, "experiment": f"HEPG2-0{e}", "plate": 1, "well": f"B0{label}", "site": site}
        | {"cell_type": "HEPG2", "sirna": f"s{label}", "sirna_id": label}
        for e, split in enumerate(("train", "val", "test"))
        for label in range(3)
        for site in (1, 2)
    ]
    write_csv(folder / "metadata.csv", rows)
    for row in rows:
        name = f"{row['well']}_s{row['site']}.png"
        write_picture(
            folder / "images" / str(row["experiment"]) / f"Plate{row['plate']}" / name,
            int(str(row["sirna_id"])),
        )


def domainnet(root: Path) -> None:
    folder = root / "domainnet"
    for split, numbers in (("train", (1, 2)), ("test", (3,))):
        rows = [(label, n, c) for c, label in enumerate(("t-shirt", "The_Mona_Lisa", "ant")) for n in numbers]
        names = [f"infograph/{label}/infograph_{c:03}_{number:06}.jpg" for label, number, c in rows]
        write_text(
            folder / f"infograph_{split}.txt",
            [f"{name} {c}" for name, (_, _, c) in zip(names, rows, strict=True)],
        )
        for name, (_, number, c) in zip(names, rows, strict=True):
            write_picture(folder / name, c, number)
