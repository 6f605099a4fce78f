"""Hugging Face datasets on disk as sources: which columns count, what a row may hold, what is refused."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # read when the library is imported

datasets = pytest.importorskip("datasets")
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from PIL import Image  # noqa: E402

from nextblock.config import DataConfig  # noqa: E402
from nextblock.data import BadImageError, eval_batches, open_source  # noqa: E402
from nextblock.data.sources import hf as hf_source  # noqa: E402
from nextblock.data.sources.hf import DatasetError  # noqa: E402
from nextblock.data.sources.subsets import write_subset  # noqa: E402

DATA = DataConfig(workers=0, val_resize_px=8)
IMAGE, LABEL = datasets.Image(), datasets.ClassLabel(names=["cat", "dog"])


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    """Arrow files are made anew by every test, and nothing is printed."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


def grey(value: int) -> np.ndarray:
    return np.full((8, 8, 3), value, dtype=np.uint8)


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(grey(value)).save(file, "PNG")
    return file.getvalue()


def saved(folder: Path, columns: dict, features: dict) -> Path:
    """A dataset as `save_to_disk` writes it."""
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(folder)
    return folder


def parquet(path: Path, columns: dict) -> Path:
    """A parquet file that says nothing of features."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture
def cats(tmp_path):
    """Three pictures, a broken one and a row without one."""
    rows = [
        *({"bytes": png(value), "path": None} for value in (10, 20)),
        {"bytes": b"\x89PNG\r\n\x1a\nbroken", "path": "x.png"},
        None,
        {"bytes": png(30), "path": "y.png"},
    ]
    features = {"image": datasets.Image(decode=False), "label": LABEL}
    return saved(tmp_path / "cats", {"image": rows, "label": [0, 1, 1, 0, 1]}, features)


# ----------------------------------------------------------------------------------------------- rows


def test_a_dataset_on_disk_yields_its_pictures_labels_and_names(cats):
    source = open_source(f"hf:{cats}", DATA)
    assert len(source) == 5
    assert torch.equal(source.read(1), torch.from_numpy(grey(20)).permute(2, 0, 1))
    assert source.content(4) == png(30)
    assert source.name(4) == "cats[all][4]"
    assert source.has_labels
    assert source.labels.tolist() == [0, 1, 1, 0, 1]
    assert source.class_names == ("cat", "dog")
    assert not source.in_memory


def test_broken_and_missing_pictures_are_told_from_whole_ones(cats):
    source = open_source(f"hf:{cats}", DATA)
    with pytest.raises(BadImageError, match=r"truncated or corrupt|not an image"):
        source.read(2)
    with pytest.raises(BadImageError, match="the row holds no image"):
        source.read(3)
    (batch,) = eval_batches(source, DATA, 8, batch_size=5)
    assert batch.samples.tolist() == [0, 1, 4]
    assert [bad.name for bad in batch.bad] == ["cats[all][2]", "cats[all][3]"]


def test_worker_processes_read_what_the_main_process_reads(cats):
    source = open_source(f"hf:{cats}", DATA)
    here, there = (
        next(iter(eval_batches(source, DATA, 8, batch_size=5, workers=workers))) for workers in (0, 2)
    )
    assert torch.equal(here.images, there.images)
    assert here.bad == there.bad


def test_a_split_is_chosen_by_name_or_by_being_the_only_one(tmp_path):
    rows = {"image": [{"bytes": png(9), "path": None}]}
    one = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": IMAGE}))
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "two")
    datasets.DatasetDict({"only": one}).save_to_disk(tmp_path / "one")
    assert len(open_source(f"hf:{tmp_path / 'two'},split=test", DATA)) == 1
    assert len(open_source(f"hf:{tmp_path / 'one'}", DATA)) == 1
    with pytest.raises(ValueError, match=r"several splits \(train, test\); choose one by split=NAME"):
        open_source(f"hf:{tmp_path / 'two'}", DATA)
    with pytest.raises(ValueError, match="no split 'tset'; did you mean 'test'"):
        open_source(f"hf:{tmp_path / 'two'},split=tset", DATA)


@pytest.mark.parametrize("how", ["file", "hf file", "folder"])
def test_parquet_is_read_as_one_file_or_as_a_folder_of_them(tmp_path, how):
    files = [
        parquet(
            tmp_path / "p" / f"train-0000{i}-of-00002.parquet",
            {"image": [{"bytes": png(40 + i), "path": f"{i}.png"}], "label": [i]},
        )
        for i in range(2)
    ]
    spec = {"file": str(files[1]), "hf file": f"hf:{files[1]}", "folder": f"hf:{tmp_path / 'p'},split=train"}
    source = open_source(spec[how], DATA)
    assert len(source) == (2 if how == "folder" else 1)
    assert source.read(len(source) - 1)[0, 0, 0] == 41
    assert source.class_names == (("0", "1") if how == "folder" else ("1",))


def test_columns_of_bytes_and_of_paths_are_images_too(tmp_path):
    Image.fromarray(grey(77)).save(tmp_path / "seven.png")
    columns = {"jpg": [png(5), png(6)], "file": ["seven.png", str(tmp_path / "none.png")]}
    path = parquet(tmp_path / "x.parquet", columns)
    assert open_source(str(path), DATA).read(1)[0, 0, 0] == 6
    by_path = open_source(f"hf:{path},image=file", DATA)
    assert by_path.read(0)[0, 0, 0] == 77
    with pytest.raises(BadImageError, match="No such file"):
        by_path.read(1)


def test_kinds_that_are_named_count_before_the_ending_parquet(tmp_path):
    path = parquet(tmp_path / "x.parquet", {"image": [png(5), png(6)]})
    spec = write_subset(tmp_path / "part.txt", open_source(str(path), DATA), np.array([1]))
    assert open_source(f"{spec},of={path}", DATA).read(0)[0, 0, 0] == 6
    Image.fromarray(grey(7)).save(tmp_path / "7.png")
    (tmp_path / "list.parquet").write_text("7.png\n")
    source = open_source(f"files:{tmp_path / 'list.parquet'}", DATA)
    assert source.read(0)[0, 0, 0] == 7


def test_an_imagefolder_is_read_with_its_classes(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "photos" / "train" / name).mkdir(parents=True)
        Image.fromarray(grey(50)).save(tmp_path / "photos" / "train" / name / "1.png")
    (tmp_path / "photos" / "train" / "dog" / "2.png").write_bytes(b"no picture")
    source = open_source(f"hf:{tmp_path / 'photos'},split=train", DATA)
    assert source.class_names == ("cat", "dog")
    assert source.labels.tolist() == [0, 1, 1]
    assert source.read(0)[0, 0, 0] == 50
    with pytest.raises(BadImageError):
        source.read(2)


# --------------------------------------------------------------------------------------------- columns


def test_of_several_image_columns_one_must_be_chosen(tmp_path):
    row = [{"bytes": png(1), "path": None}]
    folder = saved(tmp_path / "pairs", {"left": row, "right": row}, {"left": IMAGE, "right": IMAGE})
    with pytest.raises(ValueError, match=r"several columns hold images \(left, right\).*image=COLUMN"):
        open_source(f"hf:{folder}", DATA)
    assert len(open_source(f"hf:{folder},image=left", DATA)) == 1
    with pytest.raises(ValueError, match="image=lefd is no column; did you mean 'left'"):
        open_source(f"hf:{folder},image=lefd", DATA)


def test_a_dataset_without_images_is_refused_with_its_columns(tmp_path):
    path = parquet(tmp_path / "x.parquet", {"text": ["a"], "label": [0]})
    with pytest.raises(ValueError, match="no column holds images or bytes; its columns are text, label"):
        open_source(str(path), DATA)


def test_of_several_label_columns_one_must_be_chosen_when_labels_are_asked_for(tmp_path):
    folder = saved(
        tmp_path / "cifar",
        {"img": [{"bytes": png(1), "path": None}], "fine_label": [1], "coarse_label": [0]},
        {"img": IMAGE, "fine_label": LABEL, "coarse_label": LABEL},
    )
    source = open_source(f"hf:{folder}", DATA)
    assert not source.has_labels
    with pytest.raises(ValueError, match=r"\(fine_label, coarse_label\); choose one by label=COLUMN"):
        _ = source.labels
    assert open_source(f"hf:{folder},label=fine_label", DATA).labels.tolist() == [1]


def test_labels_as_text_or_numbers_are_numbered_in_sorted_order(tmp_path):
    images = [png(1)] * 3
    text = parquet(tmp_path / "text.parquet", {"image": images, "Class": ["owl", "bee", "owl"]})
    source = open_source(str(text), DATA)
    assert (source.labels.tolist(), source.class_names) == ([1, 0, 1], ("bee", "owl"))
    numbers = parquet(tmp_path / "numbers.parquet", {"image": images, "label": [10, 9, 10]})
    source = open_source(str(numbers), DATA)
    assert (source.labels.tolist(), source.class_names) == ([1, 0, 1], ("9", "10"))
    digits = parquet(tmp_path / "digits.parquet", {"image": images, "label": ["10", "9", "10"]})
    source = open_source(str(digits), DATA)
    assert (source.labels.tolist(), source.class_names) == ([1, 0, 1], ("9", "10"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"other": [0.5, 1.5]}, "has no labels: none of its columns image, other"),
        ({"label": [0, None]}, "1 of 2 rows have no label"),
    ],
)
def test_missing_labels_are_refused(tmp_path, columns, message):
    source = open_source(str(parquet(tmp_path / "x.parquet", {"image": [png(1), png(2)], **columns})), DATA)
    with pytest.raises(ValueError, match=message):
        _ = source.labels


def test_class_labels_of_minus_one_are_none(tmp_path):
    row = {"bytes": png(1), "path": None}
    folder = saved(tmp_path / "t", {"image": [row, row], "label": [-1, 1]}, {"image": IMAGE, "label": LABEL})
    with pytest.raises(ValueError, match="1 of 2 rows have label -1"):
        _ = open_source(f"hf:{folder}", DATA).labels


# ----------------------------------------------------------------------------------------- fingerprints


FINGERPRINT = """
import sys, datasets
datasets.disable_progress_bars()
from nextblock.config import DataConfig
from nextblock.data import open_source
print(*(open_source(spec, DataConfig()).fingerprint for spec in sys.argv[1:]), sep=chr(10))
"""


def test_a_fingerprint_is_the_same_in_another_process_cache_and_place(cats, tmp_path):
    original = parquet(tmp_path / "x.parquet", {"image": [png(1)], "label": [0]})
    copy = tmp_path / "elsewhere" / "y.parquet"
    copy.parent.mkdir()
    copy.write_bytes(original.read_bytes())
    here = [open_source(spec, DATA).fingerprint for spec in (f"hf:{cats}", str(original))]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "another"), "HASHSEED": "3"}
    done = subprocess.run(
        [sys.executable, "-c", FINGERPRINT, f"hf:{cats}", str(copy)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert done.stdout.split() == here


def test_another_dataset_split_or_column_has_another_fingerprint(tmp_path):
    first = parquet(tmp_path / "1.parquet", {"image": [png(1)], "other": [png(2)]})
    second = parquet(tmp_path / "2.parquet", {"image": [png(1) + b"0"], "other": [png(2)]})
    specs = (f"hf:{first},image=image", f"hf:{first},image=other", f"hf:{second},image=image")
    (tmp_path / "x-test.parquet").write_bytes(first.read_bytes())
    specs = (*specs, f"hf:{tmp_path / 'x-test.parquet'},image=image,split=test")
    assert len({open_source(spec, DATA).fingerprint for spec in specs}) == len(specs)


@pytest.mark.parametrize("same_size", [False, True])
def test_reordered_rows_have_another_fingerprint(tmp_path, monkeypatch, same_size):
    rows = [b"one", b"two" if same_size else b"three"]
    if not same_size:
        monkeypatch.setattr(hf_source, "SAMPLED_ROWS", 0)
    as_bytes = [{"image": order} for order in (rows, rows[::-1])]
    in_structs = [{"image": [{"bytes": row, "path": None} for row in order]} for order in (rows, rows[::-1])]
    as_paths = [{"file": order} for order in (["/x/a.png", "b.png"], ["b.png", "/x/a.png"])]
    for kind, columns in enumerate([as_bytes, in_structs, as_paths]):
        files = [parquet(tmp_path / f"{kind}-{i}.parquet", rows) for i, rows in enumerate(columns)]
        option = ",image=file" if columns is as_paths else ""
        assert len({open_source(f"hf:{path}{option}", DATA).fingerprint for path in files}) == 2


# ------------------------------------------------------------------------------------------- refusals


def test_a_dataset_of_the_hub_is_refused_offline_with_a_remedy():
    with pytest.raises(DatasetError, match=r"cannot be fetched: .*; go online .*hf:PATH") as told:
        open_source("hf:nobody/nothing-at-all,split=train", DATA)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("hf:", ValueError, "names no dataset; write hf:NAME,split=train"),
        ("hf:./nowhere,split=train", ValueError, "there is no .*nowhere"),
        ("hf:{cats},spilt=train", ValueError, "no option 'spilt'; did you mean 'split'"),
        ("hf:{cats},config=plain", ValueError, "written by save_to_disk has no config"),
        ("hf:{cats}/dataset_info.json", ValueError, "dataset_info.json is no parquet file"),
        (
            "hf:{one},split=test",
            ValueError,
            r"the name one-train.parquet does not say test; leave split= out",
        ),
        (
            "hf:{one},split=train[:50%]",
            ValueError,
            r"slices of a split are not read; .*split=train, and draw",
        ),
        ("{damaged}", ValueError, r"damaged\.parquet' cannot be read: .*; fetch or write it anew"),
        ("hf:{empty},split=train", ValueError, "empty doesn't contain any data files; name one of the hub"),
    ],
)
def test_what_cannot_be_opened_is_refused_in_one_line(cats, tmp_path, spec, error, message, caplog):
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and nothing else")
    (tmp_path / "empty").mkdir()
    one = parquet(tmp_path / "one-train.parquet", {"image": [png(1)]})
    spec = spec.format(cats=cats, damaged=tmp_path / "damaged.parquet", empty=tmp_path / "empty", one=one)
    with pytest.raises(error, match=message) as told:
        open_source(spec, DATA)
    assert "\n" not in str(told.value)
    assert not caplog.records


def test_without_the_package_the_extra_is_named(cats, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DatasetError, match=r"pip install 'nextblock\[datasets\]'"):
        open_source(f"hf:{cats}", DATA)
