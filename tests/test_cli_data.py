"""`nextblock data`: what pack, sample and split write and say, and what is told to someone who errs."""

from __future__ import annotations

import json
import tarfile

import numpy as np
import pytest
import torch

from nextblock.config import DataConfig
from nextblock.data import open_source
from nextblock.data.sources.subsets import absolute_spec, draw, draw_per_class, split, write_subset
from tiny_runs import call_cli, refused, write_images

DATA = DataConfig(workers=0)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_images(tmp_path / "in" / "cat", 8)
    write_images(tmp_path / "in" / "dog", 4)
    return tmp_path / "in"


@pytest.fixture(scope="module")
def digits():
    return open_source("digits", DATA)


# --------------------------------------------------------------------------------------------- drawing


def test_what_is_drawn_is_a_function_of_the_seed_on_every_platform(digits):
    assert draw(digits, 5, seed=0).tolist() == [432, 698, 1456, 1670, 1783]
    assert draw(digits, 5, seed=1).tolist() != draw(digits, 5, seed=0).tolist()


def test_a_smaller_draw_is_part_of_a_larger_one(digits):
    small, large = (set(draw(digits, count, seed=3).tolist()) for count in (18, 180))
    assert len(small) == 18
    assert small < large


def test_as_many_of_each_class_are_drawn(digits):
    numbers = draw_per_class(digits, 7, seed=0)
    assert np.bincount(digits.labels[numbers]).tolist() == [7] * 10
    assert len(set(numbers.tolist())) == 70
    with pytest.raises(ValueError, match=r"fewer than 175 images: 8 \(174\); draw at most 174 per class"):
        draw_per_class(digits, 175, seed=0)


@pytest.mark.parametrize("stratify", [False, True])
def test_parts_hold_every_image_once_and_their_shares_of_it(digits, stratify):
    parts = split(digits, {"train": 0.8, "val": 0.1, "test": 0.1}, seed=0, stratify=stratify)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(len(digits)))
    for name, share in (("train", 0.8), ("val", 0.1), ("test", 0.1)):
        assert abs(len(parts[name]) - share * len(digits)) <= 1
        if stratify:
            of_class = np.bincount(digits.labels[parts[name]])
            assert np.abs(of_class - share * np.bincount(digits.labels)).max() <= 2


def test_shares_below_one_leave_images_out_and_impossible_ones_are_refused(digits):
    parts = split(digits, {"a": 0.25, "b": 0.25}, seed=0)
    assert abs(len(parts["a"]) + len(parts["b"]) - len(digits) / 2) <= 1
    with pytest.raises(ValueError, match="all together at most 1"):
        split(digits, {"a": 0.75, "b": 0.5}, seed=0)
    with pytest.raises(ValueError, match="none is left for b; make that part larger"):
        split(digits, {"a": 0.5, "b": 0.0001}, seed=0)


# ----------------------------------------------------------------------------------------------- lists


def test_a_subset_is_the_images_that_its_list_names(digits, tmp_path):
    numbers = draw_per_class(digits, 2, seed=0)
    subset = open_source(write_subset(tmp_path / "few.txt", digits, numbers), DATA)
    assert len(subset) == 20
    assert subset.class_names == digits.class_names
    assert subset.labels.tolist() == digits.labels[numbers].tolist()
    assert torch.equal(subset.read(3), digits.read(int(numbers[3])))
    assert subset.name(3) == digits.name(int(numbers[3]))
    assert subset.content(3) is None
    assert subset.in_memory


def test_another_list_is_another_fingerprint(digits, tmp_path):
    specs = [write_subset(tmp_path / f"{seed}.txt", digits, draw(digits, 9, seed)) for seed in (0, 1)]
    again = write_subset(tmp_path / "again.txt", digits, draw(digits, 9, 0))
    first, second, third = (open_source(spec, DATA).fingerprint for spec in (*specs, again))
    assert first == third != second


def test_a_list_written_by_hand_needs_only_numbers_and_a_source(tmp_path):
    (tmp_path / "few.txt").write_text("3\n1\n\n")
    subset = open_source(f"subset:{tmp_path / 'few.txt'},of=digits:split=train", DATA)
    assert subset.name(0) == open_source("digits:split=train", DATA).name(3)


@pytest.mark.parametrize(
    ("text", "of", "message"),
    [
        ("1\n", "", "the list names no source; write subset:.*,of=SPEC"),
        ("# of: digits\n", "", "the list names no image"),
        (
            "# of: digits\na.jpg\n",
            "",
            "line 2 of the list begins with 'a.jpg', not with the number of an image",
        ),
        ("# of: digits\n1797\n", "", "the list names image 1797, and 'digits' has 1797, from 0"),
        ("# of: digits\n5\n5\n", "", "the list names an image twice"),
        ("# of: digits\n# fingerprint: other\n5\n", "", "'digits' is not what the list was drawn from"),
        ("1\n", ",of=nowhere", "there is no such directory"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(tmp_path, text, of, message):
    (tmp_path / "few.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        open_source(f"subset:{tmp_path / 'few.txt'}{of}", DATA)


def test_a_list_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"there is no list .*nowhere\.txt"):
        open_source("subset:nowhere.txt", DATA)


# ---------------------------------------------------------------------------------------- the commands


def test_sample_of_a_directory_is_a_list_of_files_with_their_classes(capsys, folder, tmp_path):
    out = tmp_path / "half.txt"
    code, told, _ = call_cli(capsys, "data", "sample", folder, out, "--per_class", "3", "--json")
    assert code == 0
    assert json.loads(told.splitlines()[-1]) == {"spec": f"files:{out}", "images": 6, "of": 12}
    source = open_source(f"files:{out}", DATA)
    assert source.class_names == ("cat", "dog")
    assert source.labels.tolist() == [0] * 3 + [1] * 3
    assert source.read(0).shape == (3, 20, 16)


def test_classes_that_a_list_of_files_lacks_are_told(folder, tmp_path, caplog):
    write_subset(tmp_path / "one.txt", open_source(str(folder), DATA), np.array([0]))
    assert "1 of the 2 classes have no image in the list" in caplog.text


def test_a_directory_whose_names_no_line_holds_gets_a_list_of_numbers(tmp_path):
    write_images(tmp_path / "in", 1)
    (tmp_path / "in" / "0000.png").rename(tmp_path / "in" / "a\tb.png")
    spec = write_subset(tmp_path / "l.txt", open_source(str(tmp_path / "in"), DATA), np.array([0]))
    assert spec.startswith("subset:")
    assert open_source(spec, DATA).name(0) == "a\tb.png"


def test_a_list_holds_from_any_directory_and_tells_where_its_source_is_missing(tmp_path, monkeypatch):
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
    with pytest.raises(ValueError, match=r"the list '.*l\.txt' is of cannot be opened: .*l\.txt,of=SPEC$"):
        open_source(spec, DATA)
    assert len(open_source(f"{spec},of=y.tar", DATA)) == 1


@pytest.mark.parametrize(
    ("spec", "absolute"),
    [
        ("in", "{here}/in"),
        ("files:l.txt", "files:{here}/l.txt"),
        ("s-{0..3}.tar", "{here}/s-{0..3}.tar"),
        ("subset:l.txt,of=files:m.txt", "subset:{here}/l.txt,of=files:{here}/m.txt"),
        ("hf:there,split=train", "hf:{here}/there,split=train"),
        ("hf:cifar10,split=train", "hf:cifar10,split=train"),
        ("digits:split=train", "digits:split=train"),
        ("torchvision:CIFAR10,root=d,train=true", "torchvision:CIFAR10,root={here}/d,train=true"),
        ("https://host/x.tar", "https://host/x.tar"),
    ],
)
def test_sources_on_this_machine_are_named_by_absolute_paths(tmp_path, monkeypatch, spec, absolute):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    assert absolute_spec(spec) == absolute.replace("{here}", str(tmp_path))


def test_sample_by_fraction_rounds_and_draws_at_least_one(capsys, tmp_path):
    for fraction, count in (("0.1", 180), ("0.0001", 1)):
        code, told, _ = call_cli(
            capsys, "data", "sample", "digits", tmp_path / f"{count}.txt", "--fraction", fraction
        )
        assert code == 0
        assert told.startswith(f"{count} of 1797 images: subset:")


def test_split_writes_a_list_of_each_part(capsys, folder, tmp_path):
    words = ("data", "split", folder, "--parts", "train=0.5,val=0.25", "--out", tmp_path / "parts", "--json")
    code, told, _ = call_cli(capsys, *words, "--stratify")
    assert code == 0
    result = json.loads(told.splitlines()[-1])
    assert [(part["part"], part["images"]) for part in result["parts"]] == [("train", 6), ("val", 3)]
    assert (result["of"], result["left_out"]) == (12, 3)
    sources = [open_source(part["spec"], DATA) for part in result["parts"]]
    assert not {sources[0].name(i) for i in range(6)} & {sources[1].name(i) for i in range(3)}
    assert "already" in refused(call_cli(capsys, *words))


def test_pack_writes_shards_that_the_next_command_reads(capsys, folder, tmp_path):
    (folder / "cat" / "broken.png").write_bytes(b"no picture")
    words = ("data", "pack", folder, tmp_path / "out", "--workers", "0", "--data.max_bad_fraction", "0.2")
    code, told, _ = call_cli(capsys, *words, "--json")
    assert code == 0
    line, left_out, result = told.splitlines()
    assert line.startswith("12 images in 1 shard, ")
    assert left_out.startswith("1 of 13 left out, as they cannot be read: ")
    source = open_source(json.loads(result)["spec"], DATA)
    assert np.bincount(source.labels).tolist() == [8, 4]


def test_data_without_a_command_tells_what_there_is(capsys):
    code, told, _ = call_cli(capsys, "data")
    assert code == 0
    assert all(word in told for word in ("pack", "sample", "split"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("pakc",), "unknown command data 'pakc'; did you mean 'pack'?"),
        (("pack", "digits"), "DST must be given"),
        (("pack", "nowhere", "{tmp}/out"), "there is no such directory"),
        (("pack", "digits", "{tmp}/out", "--tile", "5"), "unknown setting --tile; did you mean --tile_px?"),
        (("pack", "digits", "{tmp}/out", "--quality", "high"), "quality is high; it must be int"),
        (("pack", "digits", "{tmp}/out", "--format", "gif"), "format is gif; it must be"),
        (
            ("sample", "digits", "{tmp}/l.txt"),
            "nothing given; give one of --fraction, --count and --per_class",
        ),
        (
            ("sample", "digits", "{tmp}/l.txt", "--count", "3", "--fraction", "0.1"),
            "--fraction and --count given",
        ),
        (
            ("sample", "digits", "{tmp}/l.txt", "--count", "0"),
            "0 of the 1797 images of 'digits'; draw 1 to 1797",
        ),
        (("sample", "digits", "{tmp}/l.txt", "--fraction", "10"), "--fraction is 10.0; use above 0, up to 1"),
        (("sample", "digits", "{tmp}/there.txt", "--count", "3"), "there.txt is there already; remove it"),
        (("split", "digits", "--out", "{tmp}/p"), "--parts must be given"),
        (("split", "digits", "--out", "{tmp}/p", "--parts", "train"), "'train' is no name and share"),
        (("split", "digits", "--out", "{tmp}/p", "--parts", "a/b=0.5"), "'a/b=0.5' is no name and share"),
        (("split", "digits", "--out", "{tmp}/p", "--parts", "a=0.5,a=0.5"), "a is named twice"),
        (("split", "digits", "--out", "{tmp}/p", "--parts", "a=0.9,b=0.2"), "all together at most 1"),
    ],
)
def test_wrong_usage_is_refused_in_one_line(capsys, tmp_path, words, message):
    (tmp_path / "there.txt").write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert message in refused(call_cli(capsys, "data", *(word.format(tmp=tmp_path) for word in words)))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_without_labels_has_no_k_per_class(capsys, tmp_path):
    write_images(tmp_path / "in", 2)
    words = ("data", "sample", tmp_path / "in", tmp_path / "l.txt", "--per_class", "1")
    assert "has no labels" in refused(call_cli(capsys, *words))


def test_too_many_broken_images_end_with_one(capsys, folder, tmp_path):
    (folder / "cat" / "broken.png").write_bytes(b"no picture")
    told = call_cli(capsys, "data", "pack", folder, tmp_path / "out", "--workers", "0")
    assert "1 of 13 files cannot be read" in told[2]
    refused(told, code=1)
