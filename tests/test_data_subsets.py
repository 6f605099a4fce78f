"""Drawing and dividing by a seed; lists of images that are written once and read back; their commands."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from nextblock.atomic import WriteError
from nextblock.data import Source
from nextblock.data.sources import absolute_spec
from nextblock.data.subsets import draw, draw_per_class, split, write_subsets
from sources import archive, classes, names, opened, png
from tiny_runs import call_cli, refused, write_images
from toy import ToySource

THREE = {"train": 0.8, "val": 0.1, "test": 0.1}


@pytest.fixture(scope="module")
def digits():
    return opened("digits")


def write_subset(path: Path, source: Source, numbers: np.ndarray) -> str:
    return write_subsets(source, {path: numbers})[0]


def test_what_is_drawn_is_a_function_of_the_seed_on_every_platform(digits):
    assert draw(digits, 5, seed=0).tolist() == [432, 698, 1456, 1670, 1783]
    assert draw_per_class(digits, 3, seed=0)[:5].tolist() == [94, 190, 320, 348, 407]
    assert set(draw(digits, 18, seed=3).tolist()) < set(draw(digits, 180, seed=3).tolist())
    assert np.bincount(digits.labels[draw_per_class(digits, 7, seed=0)]).tolist() == [7] * 10
    with pytest.raises(ValueError, match=r"fewer than 175 images: 8 \(174\); draw at most 174 per class"):
        draw_per_class(digits, 175, seed=0)


def test_a_class_without_an_image_here_is_not_drawn_from(digits, tmp_path):
    zeros = np.flatnonzero(digits.labels == 0)[:5]
    few = opened(write_subset(tmp_path / "zeros.txt", digits, zeros))
    assert draw_per_class(few, 2, seed=0).tolist() == [1, 3]
    with pytest.raises(ValueError, match=r"fewer than 6 images: 0 \(5\); draw at most 5 per class"):
        draw_per_class(few, 6, seed=0)


@pytest.mark.parametrize("stratify", [False, True])
def test_parts_hold_every_image_once_and_their_shares_and_impossible_ones_are_refused(digits, stratify):
    parts = split(digits, THREE, seed=0, stratify=stratify)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(len(digits)))
    assert all(abs(len(parts[name]) - share * len(digits)) <= 1 for name, share in THREE.items())
    halves = split(digits, {"a": 0.25, "b": 0.25}, seed=0, stratify=stratify)
    assert abs(len(halves["a"]) + len(halves["b"]) - len(digits) / 2) <= 1
    with pytest.raises(ValueError, match="add up to at most 1"):
        split(digits, {"a": 0.75, "b": 0.5}, seed=0, stratify=stratify)
    with pytest.raises(ValueError, match="is left for b; give larger shares"):
        split(digits, {"a": 0.5, "b": 0.0001}, seed=0)


@pytest.mark.parametrize("shares", [(0.8, 0.1, 0.1), (0.98, 0.01, 0.01), (0.5, 0.2, 0.1), (0.9, 0.05)])
def test_every_class_with_enough_images_has_one_in_every_part_and_others_are_named(shares, caplog):
    sizes = [2, 3, 4, 5, 8, 9, 10, 12, 30, 3, 3]
    source = ToySource(sum(sizes), class_names=tuple(f"c{n}" for n in range(len(sizes))))
    source.toy_labels = np.repeat(np.arange(len(sizes)), sizes)
    parts = split(source, {str(n): share for n, share in enumerate(shares)}, seed=0, stratify=True)
    counts = np.stack([np.bincount(source.labels[part], minlength=len(sizes)) for part in parts.values()])
    assert counts[:, np.array(sizes) >= len(shares)].min() >= 1
    assert (np.abs(counts - np.outer(shares, sizes)) <= 2).all()
    together = np.concatenate(list(parts.values())).tolist()
    assert len(set(together)) == len(together)
    is_told = "fewer images than the 3 parts, and are missing from some: c0 (2)" in caplog.text
    assert is_told == (len(shares) == 3)


def test_a_subset_is_the_images_that_its_list_names(digits, tmp_path):
    numbers = draw_per_class(digits, 2, seed=0)
    subset = opened(write_subset(tmp_path / "few.txt", digits, numbers))
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
    for number, of in enumerate((place, archive(place / "x.tar", {"cat/1.png": png()}))):
        source = opened(of)
        read = opened(write_subset(tmp_path / f"{number}.txt", source, np.array([0])))
        assert (read.content(0), classes(read)) == (source.content(0), classes(source)[:1])


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
    path, children = tmp_path / "l.txt", []
    for number in range(6):
        if not (child := os.fork()):
            with contextlib.suppress(ValueError):
                write_subset(path, digits, np.full(100, number))
                os._exit(0)
            os._exit(2)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sorted(codes) == [0, 2, 2, 2, 2, 2]
    assert f"\n{codes.index(0)}\t" in path.read_text()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\n", "the list names no source; write subset:.*,of=SPEC"),
        ("# of: digits\na.jpg\n", "line 2 of the list begins with 'a.jpg', not with the number of"),
        ("# of: digits\n1797\n", "the list names image 1797, but 'digits' has 1797, from 0"),
        (f"# of: digits\n{10**30}\n", "the list names image 9223372036854775807, but 'digits' has 1797"),
        ("# of: digits\n5\n5\n", "the list names an image twice"),
        ("# of: digits\n# fingerprint: other\n5\n", "'digits' is not what the list was drawn from"),
        ("# of: subset:again.txt\n0\n", "the list 'few.txt' is its own source, perhaps through others; draw"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few.txt").write_text(text)
    (tmp_path / "again.txt").write_text("# of: subset:few.txt\n0\n")
    with pytest.raises(ValueError, match=message):
        opened("subset:few.txt")


def test_a_list_holds_from_any_directory_and_names_the_source_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    archive(tmp_path / "x.tar", {"1.png": png(1), "2.png": png(2)})
    write_subset(tmp_path / "l.txt", opened("x.tar"), np.array([1]))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    spec = f"subset:{tmp_path / 'l.txt'}"
    assert names(opened(spec)) == ["x.tar/2.png"]
    (tmp_path / "x.tar").rename("y.tar")
    remedy = r"1 of 1 shards are missing: .*source has moved, write subset:.*l\.txt,of=SPEC$"
    with pytest.raises(ValueError, match=remedy):
        opened(spec)
    assert names(opened(f"{spec},of=y.tar")) == ["y.tar/2.png"]


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


def test_sample_and_split_write_lists_also_below_the_home_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_images(tmp_path / "in" / "cat", 8)
    write_images(tmp_path / "in" / "dog", 4)
    code, told, _ = call_cli(capsys, "data", "sample", "~/in", "~/l.txt", "--per_class", "3", "--json")
    spec = f"files:{tmp_path / 'l.txt'}"
    assert (code, json.loads(told.splitlines()[-1])) == (0, {"spec": spec, "images": 6, "of": 12})
    assert classes(opened(spec)) == ["cat"] * 3 + ["dog"] * 3
    words = ("data", "split", "~/in", "--parts", "train=0.5,val=0.25", "--out", "~/parts", "--json")
    code, told, _ = call_cli(capsys, *words, "--stratify")
    result = json.loads(told.splitlines()[-1])
    assert (code, result["of"], result["left_out"]) == (0, 12, 3)
    assert [(part["part"], part["images"]) for part in result["parts"]] == [("train", 6), ("val", 3)]
    train, val = (opened(part["spec"]) for part in result["parts"])
    assert [classes(train).count("dog"), classes(val).count("dog")] == [2, 1]
    assert not set(names(train)) & set(names(val))
    assert (tmp_path / "parts" / "train.txt").exists()
    (tmp_path / "parts" / "train.txt").unlink()
    assert "val.txt exists already" in refused(call_cli(capsys, *words))
    assert not (tmp_path / "parts" / "train.txt").exists()  # lists of two seeds would share images
    assert call_cli(capsys, "data", "split", "~/in", "--parts", "all=1", "--out", "~/parts")[0] == 0


def test_a_list_in_a_folder_whose_name_looks_like_an_option_is_read_back(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = write_subset(Path("a,of=b/l.txt"), digits, np.array([7]))
    assert spec == "subset:a,of=b/l.txt"
    assert names(opened(spec)) == names(opened(absolute_spec(spec))) == ["digits[7]"]


def test_names_that_are_no_text_are_printed_escaped_and_a_tilde_may_begin_one(capsys, tmp_path, monkeypatch):
    out = tmp_path / os.fsdecode(b"l\xff\n.txt")
    code, told, _ = call_cli(capsys, "data", "sample", "digits", out, "--count", "3", "--json")
    assert code == 0
    assert told.splitlines()[0].endswith(r"l\xff\n.txt")
    assert json.loads(told.splitlines()[1])["spec"] == f"subset:{out}"
    monkeypatch.chdir(tmp_path)
    assert call_cli(capsys, "data", "sample", "digits", "~x.txt", "--count", "3")[0] == 0
    assert (tmp_path / "~x.txt").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("pakc", "unknown command 'pakc'; did you mean 'pack'?"),
        ("pack digits {tmp}/out --resize_px 8 --tile_px 8", "give either resize_px or tile_px, not both"),
        ("sample digits {tmp}/l.txt", "give one of --fraction, --count and --per_class"),
        ("sample digits {tmp}/l.txt --count 0", "cannot draw 0 of 1,797 images"),
        ("sample digits {tmp}/l.txt --fraction 10", "fraction is '10'; it must be"),
        ("split digits --out {tmp}/p --parts a/b=0.5", "'a/b=0.5' is wrong"),
        ("split digits --out {tmp}/p --parts a=0.5,a=0.5", "'a=0.5' is wrong"),
    ],
)
def test_wrong_usage_is_refused_in_one_line_and_nothing_is_written(capsys, tmp_path, words, message):
    assert message in refused(call_cli(capsys, "data", *words.format(tmp=tmp_path).split()))
    assert not list(tmp_path.iterdir())
