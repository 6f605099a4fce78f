"""Datasets of scikit-learn, torchvision and Hugging Face: pixels, labels, names, and what is refused."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

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
from nextblock.data import BadImageError, DataError, eval_batches, open_source
from nextblock.errors import UsageError
from test_data_tar import picture as png
from test_data_tar import reds

DATA = DataConfig(workers=0, val_resize_px=8)
IMAGE, LABEL = datasets.Image(), datasets.ClassLabel(names=["cat", "dog"])


# -------------------------------------------------------------------------------------------------- digits


def test_digits_are_the_1797_scaled_to_bytes_and_grey() -> None:
    from sklearn.datasets import load_digits

    values, classes = load_digits(return_X_y=True)
    source = open_source("digits", DATA)
    assert (len(source), source.in_memory, source.content(0)) == (1797, True, None)
    assert np.array_equal(source.labels, np.asarray(classes))
    assert source.class_names == tuple("0123456789")
    for index in (0, 900, 1796):
        expected = np.rint(np.asarray(values)[index].reshape(8, 8) / 16 * 255)
        assert np.array_equal(source.read(index).numpy(), np.stack([expected] * 3))
    grey = open_source("digits", DataConfig(channels=1, mean=(0.5,), std=(0.5,)))
    assert torch.equal(grey.read(5), source.read(5)[:1])


def test_the_digits_splits_are_disjoint_whole_stratified_and_never_change() -> None:
    train, test, everything = (open_source(f"digits:split={s}", DATA) for s in ("train", "test", "all"))
    names = [[source.name(index) for index in range(len(source))] for source in (train, test)]
    assert list(map(len, names)) == [1437, 360]
    assert len(set(names[0] + names[1])) == 1797
    assert np.abs(np.bincount(test.labels) - np.bincount(everything.labels) / 5).max() < 1
    number = int(names[1][7].removeprefix("digits[").removesuffix("]"))
    assert torch.equal(test.read(7), everything.read(number))
    assert test.labels[7] == everything.labels[number]
    assert train.fingerprint == "digits-train-1437-7a84af1c3e21a699"


# --------------------------------------------------------------------------------------------- torchvision


@pytest.fixture
def cifar10(tmp_path, monkeypatch) -> np.ndarray:
    """A CIFAR-10 of six images in its original layout, in `tmp_path`; its checksums are not looked at."""
    from torchvision.datasets import CIFAR10, cifar

    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    for number in range(6):
        name = f"data_batch_{number + 1}" if number < 5 else "test_batch"
        entry = {"data": images[[number]].reshape(1, -1), "labels": [number + 1]}
        (folder / name).write_bytes(pickle.dumps(entry))
    names = [f"class {number}" for number in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    return images


@pytest.mark.parametrize(("split", "where"), [("train", slice(0, 5)), ("test", slice(5, 6))])
def test_cifar10_is_read_with_its_split_labels_and_classes(cifar10, tmp_path, split, where) -> None:
    source = open_source(f"torchvision:CIFAR10,root={tmp_path},split={split}", DATA)
    images = np.stack([source.read(index).numpy() for index in range(len(source))])
    assert np.array_equal(images, cifar10[where])
    assert source.labels.tolist() == [1, 2, 3, 4, 5, 6][where]
    assert source.class_names[3] == "class 3"
    assert source.in_memory
    assert source.fingerprint == f"torchvision-CIFAR10-{split}-{len(source)}"
    assert source.name(0) == "CIFAR10[0]"
    small = DataConfig(max_pixels=1000)
    with pytest.raises(BadImageError, match=r"more than data.max_pixels \(1,000\)"):
        open_source(f"torchvision:CIFAR10,root={tmp_path}", small).read(0)


def test_files_of_a_torchvision_dataset_are_decoded_by_the_rules_of_all_files(tmp_path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(b"no image")
    Image.new("LA", (6, 4), (0, 0)).save(tmp_path / "dog" / "2.png")
    source = open_source(f"torchvision:ImageFolder,root={tmp_path}", DataConfig(background="grey"))
    assert (source.labels.tolist(), source.class_names) == ([0, 1], ("cat", "dog"))
    assert source.name(1).endswith("dog/2.png")
    assert source.read(1)[:, 0, 0].tolist() == [128, 128, 128]
    with pytest.raises(BadImageError, match="not an image"):
        source.read(0)


def test_labels_that_are_not_stated_are_read_with_the_images(monkeypatch) -> None:
    from torchvision.datasets import FakeData

    source = open_source("torchvision:FakeData,size=5,num_classes=3", DATA)
    assert (source.has_labels, len(source.labels)) == (True, 5)
    assert source.class_names == tuple("012")[: source.labels.max() + 1]
    monkeypatch.setattr(FakeData, "__getitem__", lambda self, index: (Image.new("RGB", (6, 4)), [1, 2]))
    source = open_source("torchvision:FakeData", DATA)
    assert not source.has_labels
    with pytest.raises(ValueError, match="has no labels"):
        _ = source.labels


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("CIFAR1O,root=x", "no dataset 'CIFAR1O'; did you mean 'CIFAR10'"),
        ("CIFAR10", "missing 1 required positional argument: 'root'"),
        ("CIFAR10,root=x,split=val", "no split 'val'; known: train, test"),
        ("CIFAR10,root=x,splt=train", "unexpected keyword argument 'splt'"),
        ("CIFAR10,root={tmp},split=train", "not found.*download"),
        ("MovingMNIST,root={tmp}", "yields no pictures but Tensor"),
    ],
)
def test_a_torchvision_dataset_that_cannot_be_opened_is_refused(tmp_path, spec, message) -> None:
    (tmp_path / "MovingMNIST").mkdir()
    np.save(tmp_path / "MovingMNIST" / "mnist_test_seq.npy", np.zeros((20, 2, 4, 4), np.uint8))
    with pytest.raises(UsageError, match=message):
        open_source("torchvision:" + spec.format(tmp=tmp_path), DATA)


def test_a_failed_download_is_no_mistake_of_the_user(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        "torchvision.datasets.CIFAR10.download", lambda self: (_ for _ in ()).throw(OSError("x"))
    )
    with pytest.raises(DataError, match="download=true': x"):
        open_source(f"torchvision:CIFAR10,root={tmp_path},download=true", DATA)


# -------------------------------------------------------------------------------------------- Hugging Face


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
    datasets.disable_progress_bars()


def saved(folder: Path, columns: dict, features: dict) -> str:
    """A dataset as `save_to_disk` writes it."""
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(folder)
    return f"hf:{folder}"


def parquet(path: Path, columns: dict) -> str:
    """A parquet file that says nothing of features."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return str(path)


@pytest.fixture
def cats(tmp_path) -> str:
    rows = [
        *({"bytes": png(value), "path": None} for value in (10, 20)),
        {"bytes": b"\x89PNG\r\n\x1a\nbroken", "path": "x.png"},
        None,
        {"bytes": png(30), "path": "y.png"},
    ]
    features = {"image": datasets.Image(decode=False), "label": LABEL}
    return saved(tmp_path / "cats", {"image": rows, "label": [0, 1, 1, 0, 1]}, features)


def test_a_saved_dataset_yields_pictures_labels_names_and_holes(cats) -> None:
    source = open_source(cats, DATA)
    assert (len(source), source.in_memory, source.content(4)) == (5, False, png(30))
    assert source.read(1)[:, 0, 0].tolist() == [20, 100, 200]
    assert source.name(4) == "cats[all][4]"
    assert source.labels.tolist() == [0, 1, 1, 0, 1]
    assert source.class_names == ("cat", "dog")
    batches = [next(iter(eval_batches(source, DATA, 8, batch_size=5, workers=n))) for n in (0, 2)]
    assert batches[0].samples.tolist() == [0, 1, 4]
    assert [bad.name for bad in batches[0].bad] == ["cats[all][2]", "cats[all][3]"]
    assert "the row contains no image" in batches[0].bad[1].reason
    assert torch.equal(batches[0].images, batches[1].images)


def test_a_split_is_chosen_by_name_or_by_being_the_only_one(tmp_path) -> None:
    rows = {"image": [{"bytes": png(9), "path": None}]}
    one = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": IMAGE}))
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "two")
    datasets.DatasetDict({"only": one}).save_to_disk(tmp_path / "one")
    assert len(open_source(f"hf:{tmp_path / 'two'},split=test", DATA)) == 1
    assert len(open_source(f"hf:{tmp_path / 'one'}", DATA)) == 1
    with pytest.raises(UsageError, match=r"several splits \(train, test\); choose one by split=NAME"):
        open_source(f"hf:{tmp_path / 'two'}", DATA)
    with pytest.raises(ValueError, match="no split 'tset'; did you mean 'test'"):
        open_source(f"hf:{tmp_path / 'two'},split=tset", DATA)


def test_parquet_is_read_as_one_file_or_as_a_folder_of_them(tmp_path) -> None:
    folder = tmp_path / "p"
    files = [
        parquet(folder / f"train-[{i}].parquet", {"image": [{"bytes": png(i), "path": None}], "label": [i]})
        for i in (40, 41)
    ]
    for spec, values in ((files[1], [41]), (f"hf:{files[1]}", [41]), (f"hf:{folder},split=train", [40, 41])):
        source = open_source(spec, DATA)
        assert reds(source) == values
        assert source.class_names == tuple(map(str, values))


def test_a_folder_of_pictures_in_the_librarys_layout_is_read_also_through_a_link(tmp_path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "photos" / "train" / name).mkdir(parents=True)
        (tmp_path / "photos" / "train" / name / "1.png").write_bytes(png(50))
    (tmp_path / "link").symlink_to("photos")
    for folder in ("photos", "link"):
        source = open_source(f"hf:{tmp_path / folder},split=train", DATA)
        assert (source.class_names, source.labels.tolist()) == (("cat", "dog"), [0, 1])
        assert reds(source) == [50, 50]


def test_rows_may_name_files_of_the_dataset_and_no_others(tmp_path) -> None:
    (tmp_path / "d").mkdir()
    for path in (tmp_path / "secret.png", tmp_path / "d" / "7.png"):
        path.write_bytes(png(7))
    inside = str(tmp_path / "d" / "7.png")
    rows = [
        "7.png",
        inside,
        "gone.png",
        str(tmp_path / "secret.png"),
        "../secret.png",
        "x/../../secret.png",
        "\0",
    ]
    source = open_source(f"hf:{parquet(tmp_path / 'd' / 'x.parquet', {'file': rows})},image=file", DATA)
    assert source.content(0) == source.content(1) == Path(inside).read_bytes()
    with pytest.raises(BadImageError, match="No such file"):
        source.read(2)
    for index in range(3, len(rows)):
        with pytest.raises(BadImageError, match="a file not below"):
            source.read(index)


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"a": [b"x"], "b": [b"x"]}, "", r"\(a, b could hold it\); choose by image=COLUMN"),
        ({"a": [b"x"]}, ",image=b", r"image=b does not fit.* the columns are a \(binary\)"),
        ({"text": ["a"]}, "", r"none could hold it.* the columns are text \(string\)"),
        ({"l": [[b"x"]]}, ",image=l", r"image=l does not fit.*l \(List\)"),
        ({"s": [{"a": 1, "b": 2}]}, ",image=s", r"s \(dict\)"),
        ({"i": [b"x"], "label": [0.5]}, ",label=label", r"label=label does not fit.*label \(float64\)"),
        ({"i": [b"x"], "tags": [[1]]}, ",label=tags", r"tags \(List\)"),
    ],
)
def test_a_column_that_cannot_be_meant_is_refused_at_opening(tmp_path, columns, options, message) -> None:
    path = parquet(tmp_path / "x.parquet", columns)
    with pytest.raises(ValueError, match=message):
        open_source(f"hf:{path}{options}", DATA)


@pytest.mark.parametrize(
    ("column", "values", "labels", "names"),
    [
        ("Class", ["owl", "bee", "owl"], [1, 0, 1], ("bee", "owl")),
        ("label", [10, 9, 10], [1, 0, 1], ("9", "10")),
        ("label", ["10", "9", "10"], [1, 0, 1], ("9", "10")),
        ("target", [10.0, 9.0, 10.0], [1, 0, 1], ("9", "10")),
        ("label", [True, False, True], [1, 0, 1], ("False", "True")),
    ],
)
def test_distinct_values_of_a_label_column_are_its_classes(tmp_path, column, values, labels, names) -> None:
    source = open_source(parquet(tmp_path / "x.parquet", {"image": [png(1)] * 3, column: values}), DATA)
    assert source.has_labels
    assert (source.labels.tolist(), source.class_names) == (labels, names)


@pytest.mark.parametrize(
    ("columns", "has_labels", "message"),
    [
        ({"species": ["a", "b"]}, False, r"choose by label=COLUMN.*species \(string\)"),
        ({"label": [0.5, 1.0]}, False, r"label \(float64\)"),
        ({"label": [[1], [2]]}, False, r"label \(List\)"),
        ({"label": [0, None]}, True, "1 of 2 rows have no label"),
        ({"label": [0.0, float("nan")]}, True, "1 of 2 rows have no label"),
        ({"label": [0, 1], "target": [0, 1]}, False, "label, target could hold it"),
    ],
)
def test_labels_that_cannot_be_read_say_what_is_there(tmp_path, columns, has_labels, message) -> None:
    source = open_source(parquet(tmp_path / "x.parquet", {"image": [png(1), png(2)], **columns}), DATA)
    assert source.has_labels == has_labels
    with pytest.raises(ValueError, match=message):
        _ = source.labels


def test_of_two_columns_of_class_labels_one_is_chosen_and_minus_one_is_no_class(tmp_path) -> None:
    row = {"bytes": png(1), "path": None}
    columns = {"image": [row, row], "fine_label": [-1, 1], "coarse": [0, 1]}
    spec = saved(tmp_path / "t", columns, {"image": IMAGE, "fine_label": LABEL, "coarse": LABEL})
    assert not open_source(spec, DATA).has_labels
    assert open_source(f"{spec},label=coarse", DATA).labels.tolist() == [0, 1]
    with pytest.raises(ValueError, match="1 of 2 rows have fine_label -1, which is no class"):
        _ = open_source(f"{spec},label=fine_label", DATA).labels


FINGERPRINT = """
import sys, datasets
datasets.disable_progress_bars()
from nextblock.config import DataConfig
from nextblock.data import open_source
print(*(open_source(spec, DataConfig()).fingerprint for spec in sys.argv[1:]), sep=chr(10))
"""


def test_a_fingerprint_is_the_same_in_another_process_cache_and_place(cats, tmp_path) -> None:
    original = Path(parquet(tmp_path / "x.parquet", {"image": [png(1)], "label": [0]}))
    copy = tmp_path / "elsewhere" / "y.parquet"
    copy.parent.mkdir()
    copy.write_bytes(original.read_bytes())
    environment = {**os.environ, "HF_HOME": str(tmp_path / "another")}
    command = [sys.executable, "-c", FINGERPRINT, cats, str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == [open_source(spec, DATA).fingerprint for spec in (cats, str(original))]


def test_other_rows_orders_splits_and_columns_have_another_fingerprint(tmp_path) -> None:
    rows = [b"one", b"two", b"three"]
    structs = [{"bytes": row, "path": None} for row in rows]
    columns = [rows, rows[::-1], [*rows[:2], b"thre"], [b"two", b"one", b"three"], structs, structs[::-1]]
    for number, images in enumerate(columns):
        parquet(tmp_path / f"{number}-test.parquet", {"image": images, "other": rows})
    options = [f"{number}-test.parquet,image=image" for number in range(len(columns))]
    options += ["0-test.parquet,image=other", "0-test.parquet,image=image,split=test"]
    found = {open_source(f"hf:{tmp_path}/{option}", DATA).fingerprint for option in options}
    assert len(found) == len(options)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("hf:", UsageError, "no path and no name .*write hf:NAME,split=train"),
        ("hf:my folder,split=train", UsageError, "there is no file or folder /.*my folder$"),
        ("hf:data/train.parquet", UsageError, "there is no file or folder /.*data/train.parquet$"),
        ("{cats},spilt=train", UsageError, "no option 'spilt'; did you mean 'split'"),
        ("{cats},config=plain", UsageError, "no config or revision"),
        ("{cats}/dataset_info.json", UsageError, "dataset_info.json is no parquet file"),
        ("hf:{tmp}/a-train.parquet,split=test", UsageError, "does not say test; leave split= out"),
        ("{tmp}/damaged.parquet", UsageError, r"damaged\.parquet': .*corrupted"),
        ("hf:{tmp}/p,split=tset", UsageError, "Unknown split"),
        ("hf:nobody/nothing,split=train", DataError, "Couldn't reach 'nobody/nothing'"),
    ],
)
def test_what_cannot_be_opened_is_refused_in_one_line(cats, tmp_path, spec, error, message, caplog) -> None:
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and nothing else")
    for name in ("a-train.parquet", "p/train.parquet"):
        parquet(tmp_path / name, {"image": [png(1)]})
    with pytest.raises(error, match=message) as told:
        open_source(spec.format(cats=cats, tmp=tmp_path), DATA)
    assert "\n" not in str(told.value)
    assert "hub" not in str(told.value).lower() or error is DataError
    assert not caplog.records


def test_without_the_package_the_extra_is_named(cats, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install datasets"):
        open_source(cats, DATA)
