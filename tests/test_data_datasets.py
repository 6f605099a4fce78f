"""Datasets of scikit-learn, torchvision and Hugging Face: pixels, labels, names, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # read when the library is imported

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import config

from nextblock.config import DataConfig
from nextblock.data import BadImageError, DataError, eval_batches
from nextblock.errors import UsageError
from sources import names, opened, png, reds
from suite_copies import cifar10, picture, trust_cifar

LABEL = datasets.ClassLabel(names=["cat", "dog"])


def test_digits_are_the_1797_scaled_to_bytes_and_grey() -> None:
    from sklearn.datasets import load_digits

    values, classes = load_digits(return_X_y=True)
    source = opened("digits")
    assert (len(source), source.in_memory, source.content(0)) == (1797, True, None)
    assert np.array_equal(source.labels, np.asarray(classes))
    assert source.class_names == tuple("0123456789")
    for index in (0, 900, 1796):
        expected = np.rint(np.asarray(values)[index].reshape(8, 8) / 16 * 255)
        assert np.array_equal(source.read(index).numpy(), np.stack([expected] * 3))
    grey = opened("digits", channels=1, mean=(0.5,), std=(0.5,))
    assert torch.equal(grey.read(5), source.read(5)[:1])


def test_the_digits_splits_are_disjoint_whole_stratified_and_never_change() -> None:
    train, test, everything = (opened(f"digits:split={s}") for s in ("train", "test", "all"))
    assert (len(train), len(test)) == (1437, 360)
    assert len(set(names(train) + names(test))) == 1797
    assert np.abs(np.bincount(test.labels) - np.bincount(everything.labels) / 5).max() < 1
    number = int(test.name(7).removeprefix("digits[").removesuffix("]"))
    assert torch.equal(test.read(7), everything.read(number))
    assert test.labels[7] == everything.labels[number]
    assert train.fingerprint == "digits-train-1437-7a84af1c3e21a699"


@pytest.mark.parametrize(("split", "labels"), [("train", [*range(10)] * 5), ("test", [*np.arange(20) // 2])])
def test_cifar10_is_read_with_its_split_labels_and_classes(tmp_path, monkeypatch, split, labels) -> None:
    trust_cifar(monkeypatch)
    cifar10(tmp_path)
    spec = f"torchvision:CIFAR10,root={tmp_path},split={split}"
    source = opened(spec)
    first = 0 if split == "train" else 500
    expected = [picture(label, first + number, 32) for number, label in enumerate(labels[:10])]
    assert np.array_equal([source.read(i).permute(1, 2, 0).numpy() for i in range(10)], expected)
    assert source.labels.tolist() == labels
    assert (source.class_names[3], source.name(0), source.in_memory) == ("class 3", "CIFAR10[0]", True)
    assert source.fingerprint == f"torchvision-CIFAR10-{split}-{len(labels)}"
    with pytest.raises(BadImageError, match=r"more than data.max_pixels \(1,000\)"):
        opened(spec, max_pixels=1000).read(0)


def test_files_of_a_torchvision_dataset_are_decoded_by_the_rules_of_all_files(tmp_path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(b"no image")
    Image.new("LA", (6, 4), (0, 0)).save(tmp_path / "dog" / "2.png")
    source = opened(f"torchvision:ImageFolder,root={tmp_path}", background="grey")
    assert (source.labels.tolist(), source.class_names) == ([0, 1], ("cat", "dog"))
    assert source.name(1).endswith("dog/2.png")
    assert source.read(1)[:, 0, 0].tolist() == [128, 128, 128]
    fingerprint = source.fingerprint
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert opened(f"torchvision:ImageFolder,root={moved}").fingerprint == fingerprint
    (moved / "dog" / "2.png").rename(moved / "dog" / "3.png")
    assert opened(f"torchvision:ImageFolder,root={moved}").fingerprint != fingerprint
    source = opened(f"torchvision:ImageFolder,root={moved}")
    with pytest.raises(BadImageError, match="not an image"):
        source.read(0)


def test_labels_that_are_not_stated_are_read_with_the_images(monkeypatch) -> None:
    from torchvision.datasets import FakeData

    source = opened("torchvision:FakeData,size=5,num_classes=3")
    assert (source.has_labels, len(source.labels)) == (True, 5)
    assert source.class_names == tuple("012")[: source.labels.max() + 1]
    monkeypatch.setattr(FakeData, "__getitem__", lambda self, index: (Image.new("RGB", (6, 4)), [1, 2]))
    source = opened("torchvision:FakeData")
    assert not source.has_labels
    with pytest.raises(ValueError, match="has no labels"):
        _ = source.labels


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("CIFAR1O,root=x", UsageError, "no dataset 'CIFAR1O'; did you mean 'CIFAR10'"),
        ("CIFAR10", UsageError, "missing 1 required positional argument: 'root'"),
        ("CIFAR10,root=x,split=val", UsageError, "no split 'val'; known: train, test"),
        ("CIFAR10,root=x,splt=train", UsageError, "unexpected keyword argument 'splt'"),
        ("CIFAR10,root={tmp},split=train", UsageError, "not found.*download"),
        ("CIFAR10,root={tmp},download=true", DataError, "download=true': x"),
        ("MovingMNIST,root={tmp}", UsageError, "yields no pictures but Tensor"),
    ],
)
def test_what_torchvision_cannot_open_is_refused(tmp_path, monkeypatch, spec, error, message) -> None:
    def download(_: object) -> None:
        raise OSError("x")

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", download)
    (tmp_path / "MovingMNIST").mkdir()
    np.save(tmp_path / "MovingMNIST" / "mnist_test_seq.npy", np.zeros((20, 2, 4, 4), np.uint8))
    with pytest.raises(error, match=message):
        opened("torchvision:" + spec.format(tmp=tmp_path))


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
    datasets.disable_progress_bars()


def dataset(images: list, feature: datasets.Image | None = None, **labels: list[int]) -> datasets.Dataset:
    """Images, and columns of cats and dogs."""
    features = datasets.Features({"image": feature or datasets.Image(), **dict.fromkeys(labels, LABEL)})
    return datasets.Dataset.from_dict({"image": images, **labels}, features=features)


def parquet(path: Path, columns: dict) -> str:
    """A parquet file that says nothing of features."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return str(path)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """Saved datasets of no split, one and two, parquet files, and a folder of pictures with a link to it."""
    shelf = tmp_path_factory.mktemp("shelf")
    rows: list[Any] = [{"bytes": png(value), "path": f"{value}.png"} for value in (10, 20, 30)]
    rows[2:2] = [{"bytes": b"\x89PNG\r\n\x1a\nbroken", "path": "x.png"}, None]
    dataset(rows, datasets.Image(decode=False), label=[0, 1, 1, 0, 1]).save_to_disk(shelf / "cats")
    dataset(rows[:2], fine_label=[-1, 1], coarse=[0, 1]).save_to_disk(shelf / "fine")
    one = dataset(rows[:1], label=[0])
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(shelf / "two")
    datasets.DatasetDict({"only": one}).save_to_disk(shelf / "one")
    (shelf / "damaged.parquet").write_bytes(b"PAR1 and nothing else")
    for label, name in enumerate(("cat", "dog")):
        row = {"image": [{"bytes": png(40 + label), "path": None}], "label": [40 + label]}
        parquet(shelf / "p" / f"train-[{40 + label}].parquet", row)
        (shelf / "photos" / "train" / name).mkdir(parents=True)
        (shelf / "photos" / "train" / name / "1.png").write_bytes(png(50 + label))
    (shelf / "link").symlink_to("photos")
    return shelf


def test_a_saved_dataset_yields_pictures_labels_names_and_holes(shelf) -> None:
    source = opened(f"hf:{shelf}/cats")
    assert (len(source), source.in_memory, source.content(4)) == (5, False, png(30))
    assert source.read(1)[:, 0, 0].tolist() == [20, 100, 200]
    assert source.name(4) == "cats[all][4]"
    assert source.labels.tolist() == [0, 1, 1, 0, 1]
    data = DataConfig(val_resize_px=8)
    batches = [next(iter(eval_batches(source, data, 8, batch_size=5, workers=n))) for n in (0, 2)]
    assert batches[0].samples.tolist() == [0, 1, 4]
    assert [bad.name for bad in batches[0].bad] == ["cats[all][2]", "cats[all][3]"]
    assert "the row contains no image" in batches[0].bad[1].reason
    assert torch.equal(batches[0].images, batches[1].images)


@pytest.mark.parametrize(
    ("spec", "values", "class_names"),
    [
        ("hf:{shelf}/two,split=test", [10], ("cat", "dog")),
        ("hf:{shelf}/one", [10], ("cat", "dog")),
        ("{shelf}/p/train-[41].parquet", [41], ("41",)),
        ("hf:{shelf}/p/train-[41].parquet", [41], ("41",)),
        ("hf:{shelf}/p,split=train", [40, 41], ("40", "41")),
        ("hf:{shelf}/photos,split=train", [50, 51], ("cat", "dog")),
        ("hf:{shelf}/link,split=train", [50, 51], ("cat", "dog")),
    ],
)
def test_a_split_parquet_and_a_folder_of_pictures_are_read(shelf, spec, values, class_names) -> None:
    source = opened(spec.format(shelf=shelf))
    assert (reds(source), source.class_names) == (values, class_names)
    assert source.labels.tolist() == list(range(len(values)))


def test_rows_may_name_files_of_the_dataset_and_no_others(tmp_path) -> None:
    inside, secret = tmp_path / "d" / "7.png", tmp_path / "secret.png"
    inside.parent.mkdir()
    for path in (inside, secret):
        path.write_bytes(png(7))
    others = [str(secret), "../secret.png", "x/../../secret.png", "\0"]
    file = parquet(tmp_path / "d" / "x.parquet", {"file": ["7.png", str(inside), "gone.png", *others]})
    source = opened(f"hf:{file},image=file")
    assert source.content(0) == source.content(1) == inside.read_bytes()
    for index in range(2, 7):
        with pytest.raises(BadImageError, match="No such file" if index == 2 else "a file not below"):
            source.read(index)


@pytest.mark.parametrize(
    ("columns", "options", "has_labels", "message"),
    [
        ({"a": [b"x"], "b": [b"x"]}, "", None, r"\(a, b could hold it\); choose by image=COLUMN"),
        ({"a": [b"x"]}, ",image=b", None, r"image=b does not fit.* the columns are a \(binary\)"),
        ({"text": ["a"]}, "", None, r"none could hold it.* the columns are text \(string\)"),
        ({"l": [[b"x"]]}, ",image=l", None, r"image=l does not fit.*l \(List\)"),
        ({"s": [{"a": 1, "b": 2}]}, ",image=s", None, r"s \(dict\)"),
        ({"i": [b"x"], "label": [0.5]}, ",label=label", None, r"label=label does not fit.*label \(float64\)"),
        ({"i": [b"x"], "tags": [[1]]}, ",label=tags", None, r"tags \(List\)"),
        ({"i": [b"x"], "species": ["a"]}, "", False, r"choose by label=COLUMN.*species \(string\)"),
        ({"i": [b"x"] * 2, "label": [0.5, 1.0]}, "", False, r"label \(float64\)"),
        ({"i": [b"x"], "label": [[1]]}, "", False, r"label \(List\)"),
        ({"i": [b"x"] * 2, "label": [0, None]}, "", True, "1 of 2 rows have no label"),
        ({"i": [b"x"] * 2, "label": [0.0, float("nan")]}, "", True, "1 of 2 rows have no label"),
        ({"i": [b"x"], "label": [0], "target": [0]}, "", False, "label, target could hold it"),
    ],
)
def test_a_column_that_cannot_be_meant_is_refused(tmp_path, columns, options, has_labels, message) -> None:
    path = parquet(tmp_path / "x.parquet", columns)
    with pytest.raises(ValueError, match=message):
        source = opened(f"hf:{path}{options}")
        assert source.has_labels is has_labels  # not None, which is refused at opening
        _ = source.labels


@pytest.mark.parametrize(
    ("column", "values", "class_names"),
    [
        ("Class", ["owl", "bee", "owl"], ("bee", "owl")),
        ("label", [10, 9, 10], ("9", "10")),
        ("label", ["10", "9", "10"], ("9", "10")),
        ("target", [10.0, 9.0, 10.0], ("9", "10")),
        ("label", [True, False, True], ("False", "True")),
    ],
)
def test_distinct_values_of_a_label_column_are_its_classes(tmp_path, column, values, class_names) -> None:
    source = opened(parquet(tmp_path / "x.parquet", {"image": [png(1)] * 3, column: values}))
    assert source.has_labels
    assert (source.labels.tolist(), source.class_names) == ([1, 0, 1], class_names)


def test_of_two_columns_of_class_labels_one_is_chosen_and_minus_one_is_no_class(shelf) -> None:
    assert not opened(f"hf:{shelf}/fine").has_labels
    assert opened(f"hf:{shelf}/fine,label=coarse").labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match="1 of 2 rows have fine_label -1, which is no class"):
        _ = opened(f"hf:{shelf}/fine,label=fine_label").labels


def test_a_fingerprint_is_the_same_in_another_process_cache_and_place(shelf, tmp_path) -> None:
    file, copy = shelf / "p" / "train-[40].parquet", tmp_path / "y.parquet"
    copy.write_bytes(file.read_bytes())
    code = (
        "import sys, datasets; datasets.disable_progress_bars(); "
        "from nextblock.config import DataConfig; from nextblock.data import open_source; "
        "print(*(open_source(spec, DataConfig()).fingerprint for spec in sys.argv[1:]))"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "another")}
    command = [sys.executable, "-c", code, f"hf:{shelf}/cats", str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == [opened(spec).fingerprint for spec in (f"hf:{shelf}/cats", file)]


def test_other_rows_orders_splits_and_columns_have_another_fingerprint(tmp_path) -> None:
    rows = [b"one", b"two", b"three"]
    structs = [{"bytes": row, "path": None} for row in rows]
    columns = [rows, rows[::-1], [*rows[:2], b"thre"], [b"two", b"one", b"three"], structs, structs[::-1]]
    for number, images in enumerate(columns):
        parquet(tmp_path / f"{number}-test.parquet", {"image": images, "other": rows})
    options = [f"{number}-test.parquet,image=image" for number in range(len(columns))]
    options += ["0-test.parquet,image=other", "0-test.parquet,image=image,split=test"]
    found = {opened(f"hf:{tmp_path}/{option}").fingerprint for option in options}
    assert len(found) == len(options)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("hf:", UsageError, "no path and no name .*write hf:NAME,split=train"),
        ("hf:my folder,split=train", UsageError, "there is no file or folder /.*my folder$"),
        ("hf:data/train.parquet", UsageError, "there is no file or folder /.*data/train.parquet$"),
        ("hf:{shelf}/two", UsageError, r"several splits \(train, test\); choose one by split=NAME"),
        ("hf:{shelf}/two,split=tset", UsageError, "no split 'tset'; did you mean 'test'"),
        ("hf:{shelf}/cats,spilt=train", UsageError, "no option 'spilt'; did you mean 'split'"),
        ("hf:{shelf}/cats,config=plain", UsageError, "no config or revision"),
        ("hf:{shelf}/cats/dataset_info.json", UsageError, "dataset_info.json is no parquet file"),
        ("hf:{shelf}/p/train-[40].parquet,split=test", UsageError, "does not say test; leave split= out"),
        ("{shelf}/damaged.parquet", UsageError, r"damaged\.parquet': .*corrupted"),
        ("hf:{shelf}/p,split=tset", UsageError, "Unknown split"),
        ("hf:nobody/nothing,split=train", DataError, "Couldn't reach 'nobody/nothing'"),
    ],
)
def test_what_cannot_be_opened_is_refused_in_one_line(shelf, spec, error, message, caplog) -> None:
    with pytest.raises(error, match=message) as told:
        opened(spec.format(shelf=shelf))
    assert "\n" not in str(told.value)
    assert "hub" not in str(told.value).lower() or error is DataError
    assert not caplog.records


def test_without_the_package_the_extra_is_named(shelf, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install datasets"):
        opened(f"hf:{shelf}/cats")
