"""Drawing and dividing by a seed; lists of images that are written once and read back."""

from __future__ import annotations

import os
import tarfile

import numpy as np
import pytest
import torch

from nextblock.atomic import WriteError
from nextblock.config import DataConfig
from nextblock.data import open_source
from nextblock.data.sources import absolute_spec
from nextblock.data.subsets import draw, draw_per_class, split, write_subset
from tiny_runs import write_images
from toy import ToySource

DATA = DataConfig(workers=0)
THREE = {"train": 0.8, "val": 0.1, "test": 0.1}


@pytest.fixture(scope="module")
def digits():
    return open_source("digits", DATA)


class Classes(ToySource):
    """Images of classes of the given sizes."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(sum(sizes), class_names=tuple(f"c{n}" for n in range(len(sizes))))
        self.toy_labels = np.repeat(np.arange(len(sizes)), sizes)


# --------------------------------------------------------------------------------------------- drawing


def test_what_is_drawn_is_a_function_of_the_seed_on_every_platform(digits):
    assert draw(digits, 5, seed=0).tolist() == [432, 698, 1456, 1670, 1783]
    assert draw_per_class(digits, 3, seed=0)[:5].tolist() == [94, 190, 320, 348, 407]
    assert set(draw(digits, 18, seed=3).tolist()) < set(draw(digits, 180, seed=3).tolist())
    assert np.bincount(digits.labels[draw_per_class(digits, 7, seed=0)]).tolist() == [7] * 10
    with pytest.raises(ValueError, match=r"fewer than 175 images: 8 \(174\); draw at most 174 per class"):
        draw_per_class(digits, 175, seed=0)


@pytest.mark.parametrize("stratify", [False, True])
def test_parts_hold_every_image_once_and_their_shares_of_it(digits, stratify):
    parts = split(digits, THREE, seed=0, stratify=stratify)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(len(digits)))
    for name, share in THREE.items():
        assert abs(len(parts[name]) - share * len(digits)) <= 1
        if stratify:
            of_class = np.bincount(digits.labels[parts[name]])
            assert np.abs(of_class - share * np.bincount(digits.labels)).max() <= 2


@pytest.mark.parametrize("shares", [(0.8, 0.1, 0.1), (0.98, 0.01, 0.01), (0.5, 0.2, 0.1), (0.9, 0.05)])
def test_every_class_with_enough_images_has_one_in_every_part_and_others_are_named(shares, caplog):
    sizes = [2, 3, 4, 5, 8, 9, 10, 12, 30, 3, 3]
    source = Classes(*sizes)
    parts = split(source, {str(n): share for n, share in enumerate(shares)}, seed=0, stratify=True)
    counts = np.stack([np.bincount(source.labels[part], minlength=len(sizes)) for part in parts.values()])
    enough = np.array(sizes) >= len(shares)
    assert counts[:, enough].min() >= 1
    assert (np.abs(counts - np.outer(shares, sizes)) <= 2).all()
    together = np.concatenate(list(parts.values()))
    assert len(set(together.tolist())) == len(together)
    assert ("fewer images than the 3 parts, and are missing from some: c0 (2)" in caplog.text) == (
        len(shares) == 3
    )


def test_shares_below_one_leave_images_out_and_impossible_ones_are_refused(digits):
    parts = split(digits, {"a": 0.25, "b": 0.25}, seed=0)
    assert abs(len(parts["a"]) + len(parts["b"]) - len(digits) / 2) <= 1
    with pytest.raises(ValueError, match="add up to at most 1"):
        split(digits, {"a": 0.75, "b": 0.5}, seed=0)
    with pytest.raises(ValueError, match="is left for b; give larger shares"):
        split(digits, {"a": 0.5, "b": 0.0001}, seed=0)


# ----------------------------------------------------------------------------------------------- lists


def test_a_subset_is_the_images_that_its_list_names(digits, tmp_path):
    numbers = draw_per_class(digits, 2, seed=0)
    spec = write_subset(tmp_path / "few.txt", digits, numbers)
    subset = open_source(spec, DATA)
    assert (len(subset), subset.class_names, subset.in_memory) == (20, digits.class_names, True)
    assert subset.labels.tolist() == digits.labels[numbers].tolist()
    assert torch.equal(subset.read(3), digits.read(int(numbers[3])))
    assert (subset.name(3), subset.content(3)) == (digits.name(int(numbers[3])), None)
    assert subset.fingerprint == "subset-20-409657050d1e0fd4ac85401427774bd6"


@pytest.mark.parametrize("folder", ["a b ", "[x]", "#1", "ä", os.fsdecode(b"b\xff"), "two\nlines"])
def test_lists_of_oddly_named_folders_and_tars_are_read_back(tmp_path, folder):
    place = tmp_path / folder
    write_images(place / "cat ", 2)
    write_images(place / "cat", 1)
    with tarfile.open(place / "x.tar", "w") as tar:
        tar.add(place / "cat", "cat")
    for number, of in enumerate((place, place / "x.tar")):
        source = open_source(str(of), DATA)
        read = open_source(write_subset(tmp_path / f"{number}.txt", source, np.array([0])), DATA)
        assert read.content(0) == source.content(0)
        assert read.class_names[read.labels[0]] == source.class_names[source.labels[0]]


def test_a_list_is_written_once_and_whole_or_not_at_all(digits, tmp_path, monkeypatch):
    path = tmp_path / "l.txt"
    write_subset(path, digits, np.array([1]))
    written = path.read_bytes()
    assert write_subset(path, digits, np.array([1])) == f"subset:{path}"
    with pytest.raises(ValueError, match=r"l\.txt exists already; remove it"):
        write_subset(path, digits, np.array([2]))
    assert path.read_bytes() == written

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match=r"m\.txt: .*No space left on device"):
        write_subset(tmp_path / "m.txt", digits, np.array([1]))
    assert list(tmp_path.iterdir()) == [path]


def test_of_many_that_write_a_list_at_once_one_does(digits, tmp_path):
    path, codes = tmp_path / "l.txt", []
    children = []
    for number in range(6):
        child = os.fork()
        if child == 0:
            try:
                write_subset(path, digits, np.full(100, number))
                os._exit(0)
            except ValueError:
                os._exit(2)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sorted(codes) == [0, 2, 2, 2, 2, 2]
    assert f"\n{codes.index(0)}\t" in path.read_text()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "of", "message"),
    [
        ("1\n", "", "the list names no source; write subset:.*,of=SPEC"),
        ("# of: digits\na.jpg\n", "", "line 2 of the list begins with 'a.jpg', not with the number of"),
        ("# of: digits\n1797\n", "", "the list names image 1797, but 'digits' has 1797, from 0"),
        (f"# of: digits\n{10**30}\n", "", "the list names image 9223372036854775807, but 'digits' has 1797"),
        ("# of: digits\n5\n5\n", "", "the list names an image twice"),
        ("# of: digits\n# fingerprint: other\n5\n", "", "'digits' is not what the list was drawn from"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(tmp_path, text, of, message):
    (tmp_path / "few.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_source(f"subset:{tmp_path / 'few.txt'}{of}", DATA)


def test_a_list_holds_from_any_directory_and_names_the_source_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "in", 2)
    with tarfile.open("x.tar", "w") as tar:
        tar.add("in")
    write_subset(tmp_path / "l.txt", open_source("x.tar", DATA), np.array([1]))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    spec = f"subset:{tmp_path / 'l.txt'}"
    assert len(open_source(spec, DATA)) == 1
    (tmp_path / "x.tar").rename("y.tar")
    with pytest.raises(
        ValueError, match=r"1 of 1 shards are missing: .*source has moved, write subset:.*l\.txt,of=SPEC$"
    ):
        open_source(spec, DATA)
    assert len(open_source(f"{spec},of=y.tar", DATA)) == 1


@pytest.mark.parametrize(
    ("spec", "absolute"),
    [
        ("in", "{here}/in"),
        ("s-{0..3}.tar", "{here}/s-{0..3}.tar"),
        ("subset:l.txt,of=files:m.txt", "subset:{here}/l.txt,of=files:{here}/m.txt"),
        ("hf:there,split=train", "hf:{here}/there,split=train"),
        ("hf:cifar10,split=train", "hf:cifar10,split=train"),
        ("torchvision:CIFAR10,root=d,train=true", "torchvision:CIFAR10,root={here}/d,train=true"),
    ],
)
def test_sources_on_this_machine_are_named_by_absolute_paths(tmp_path, monkeypatch, spec, absolute):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    assert absolute_spec(spec) == absolute.replace("{here}", str(tmp_path))
