"""What a spec names, and the images of directories and lists."""

from __future__ import annotations

import inspect
import logging
import os
import pickle
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import pytest

from nextblock.atomic import mark_output
from nextblock.data import BadImageError, Source
from nextblock.data.sources import absolute_spec
from sources import classes, names, opened, png, reds

NFC, NFD = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))


def make_images(root: Path, names: Iterable[str | bytes]) -> Path:
    for number, name in enumerate(names):
        path = root / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    return root


def listed(folder: Path, content: str) -> Source:
    (folder / "list.txt").write_bytes(content.encode())
    return opened(f"files:{folder / 'list.txt'}")


def test_a_directory_is_searched_in_the_order_of_its_paths_parts_and_the_rest_is_counted(tmp_path, caplog):
    make_images(tmp_path, ["b/1.png", "a/z/1.JPG", "a-b/1.png", "a/2.webp", "c.png", "a/10.png", ".x/1.png"])
    for name in ("a/a.txt", "b.txt", "README", "a/.hidden.png"):
        (tmp_path / name).touch()
    make_images(tmp_path / "run", ["pictures/1.png"])
    mark_output(tmp_path / "run")
    caplog.set_level(logging.INFO, logger="nextblock")
    source = opened(tmp_path)
    assert names(source) == ["a/10.png", "a/2.webp", "a/z/1.JPG", "a-b/1.png", "b/1.png", "c.png"]
    kinds = ".txt, no extension, written by nextblock"
    assert f"6 images; ignored 4 files, none with an image's extension ({kinds}) and 2 hidden" in caplog.text
    assert not source.has_labels
    assert "has no labels: 'c.png' is in no folder; put every image into a folder" in caplog.text
    with pytest.raises(ValueError, match=r"'c\.png' is in no folder"):
        _ = source.labels
    caplog.clear()
    assert not opened(tmp_path / "a-b").has_labels
    assert not caplog.text  # nobody expects labels there
    assert names(opened(tmp_path / "run")) == ["pictures/1.png"]


def test_folders_may_be_nested_deeper_than_pythons_stack(tmp_path):
    make_images(tmp_path, ["a/" * 300 + "x.png"])
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 150)
    try:
        (name,) = names(opened(tmp_path))
    finally:
        sys.setrecursionlimit(limit)
    assert name == "a/" * 300 + "x.png"


def test_links_are_followed_but_no_loop_and_broken_ones_are_unreadable(tmp_path):
    make_images(tmp_path / "a", ["x/1.png"])
    for link, target in (("x/up", tmp_path / "a"), ("y", "x"), ("z.png", "z.png"), ("self", "self")):
        (tmp_path / "a" / link).symlink_to(target)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a" / "zz.png").symlink_to(tmp_path / "pipe")
    source = opened(tmp_path / "a")
    assert names(source) == ["x/1.png", "y/1.png", "z.png", "zz.png"]
    for index, reason in ((2, "cannot be read"), (3, "no regular file")):
        with pytest.raises(BadImageError, match=reason):
            source.read(index)


def test_odd_names_are_read_and_shown_printable(tmp_path):
    odd = ["a b [/bold] ~x.png", NFD + ".png", "line\nend\x1b[31m\t.png", b"\xff\xe9.png"]
    source = opened(make_images(tmp_path, odd))
    assert names(source) == [odd[0], NFC + ".png", "line\\nend\\x1b[31m\\t.png", "\\xff\\xe9.png"]
    assert reds(source) == [0, 1, 2, 3]


@pytest.mark.parametrize("form", [NFC, NFD])
def test_classes_are_first_level_folders_alike_in_both_unicode_forms_and_empty_ones_are_none(tmp_path, form):
    source = opened(make_images(tmp_path, [f"{form}/1.png", "b/x/1.png"]))
    for empty in ("empty", "run"):
        (tmp_path / empty).mkdir()
    mark_output(tmp_path / "run")
    (tmp_path / "self").symlink_to(".")
    assert (classes(source), source.class_names) == (["b", NFC], ("b", NFC))
    assert source.empty_classes() == ["empty"]


def test_the_fingerprint_depends_on_the_names_only_and_travels_to_a_worker(tmp_path):
    images = [["a/1.png", "a/2.png"]] * 2 + [["a/1.png"], ["a/1.png", "b/2.png"]]
    sources = [opened(make_images(tmp_path / str(n), names)) for n, names in enumerate(images)]
    prints = [pickle.loads(pickle.dumps(source)).fingerprint for source in sources]
    assert prints[0] == prints[1] == "folder-2-e5e64092a8e7fdef566a86d7612afef0"
    assert len(set(prints)) == 3


@pytest.mark.parametrize("name", ["a.png", "A.PNG", "ü\udcff.png"])
def test_an_image_file_is_a_source_of_one_image_without_a_label(tmp_path, name):
    make_images(tmp_path, ["other.png", name])
    source = opened(os.fsdecode(os.fsencode(tmp_path / name)))
    travelled = pickle.loads(pickle.dumps(source))
    assert (len(source), source.has_labels) == (1, False)
    assert travelled.read(0)[:, 0, 0].tolist() == [1, 100, 200]
    assert travelled.fingerprint == source.fingerprint != opened(tmp_path).fingerprint


@pytest.mark.parametrize("name", ["digits", "hf"])
def test_a_path_is_a_path_and_the_message_names_the_keyword_too(tmp_path, monkeypatch, caplog, name):
    make_images(tmp_path / name, ["1.png"])
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING, logger="nextblock"):
        assert names(opened(name)) == ["1.png"]
    assert f"is read as the path {tmp_path / name}" in caplog.text
    assert f"{name}:" in caplog.text
    assert len(opened("digits:split=all")) == 1797
    assert absolute_spec(name) == str(tmp_path / name)


def test_a_tilde_and_the_other_unicode_form_lead_to_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make_images(tmp_path / f"B{NFD}cher", ["1.png"])
    assert len(opened(f"~/B{NFC}cher")) == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "the name of a source is empty"),
        ("empty", "no images in '.*empty' and its folders: it is empty; an image's name ends in .avif"),
        ("other", r"2 files, none with an image's extension \(.csv, .txt\)"),
        ("gone", "no such directory or file .searched /.*/gone"),
        ("x.rar", r"is a file; give the directory that contains it, or files:x.rar"),
        ("x.tar.gz", "in a compressed tar cannot be read in random order; unpack it"),
        ("torchvison:CIFAR10", "no kind of source 'torchvison'; did you mean 'torchvision'"),
        ("s3:x.tar", "no such path; write an address as s3://HOST/X.tar"),
        ("tables", "2 files, none .*parquet.*; read a folder of parquet files as hf:DIR"),
        ("digits:splt=train", "no option 'splt'; did you mean 'split'"),
    ],
)
def test_a_spec_that_names_nothing_is_refused_with_the_remedy(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "other/a", "tables"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("x.rar", "other/a/1.txt", "other/2.csv", "tables/1.parquet", "tables/2.md"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=message):
        opened(spec)


def test_a_list_has_paths_relative_to_its_folder_or_absolute_with_classes_after_a_tab(tmp_path):
    make_images(tmp_path, ["lists/b/2.dat", "far/1.png", f"lists/{NFD}.png"])
    far = tmp_path / "far" / "1.png"
    lines = f"\ufeff# comment\r\n\n{far}\t10\r\nb/2.dat\t9\n../far/1.png\t-1.5\n{NFC}.png\t10\ngone.png\t9"
    source = listed(tmp_path / "lists", lines)
    assert names(source) == [str(far), "b/2.dat", "../far/1.png", NFC + ".png", "gone.png"]
    assert (source.class_names, source.labels.tolist()) == (("-1.5", "9", "10"), [2, 1, 0, 2, 1])
    assert source.content(1) == (tmp_path / "lists" / "b" / "2.dat").read_bytes()
    assert source.path(2) == tmp_path / "lists" / "../far/1.png"
    assert source.read(3).shape == (3, 4, 6)
    with pytest.raises(BadImageError, match=r"No such file or directory$"):
        source.read(4)
    with pytest.raises(ValueError, match="add a tab and a class"):
        _ = listed(tmp_path, "1.png").labels


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("# only\n\n", "lists no images"),
        ("1.png\n2.png\n1.png\n", r"line 3: '1.png' is already in line 1"),
        ("1.png\ta\n2.png\n", "line 2: some lines have a class after a tab, others none"),
        ("1.png\ta\tb\n", "line 1: write PATH, or PATH, one tab and its class"),
        ("a\0b.png\n", "line 1: write PATH"),
        ("# images of a source of nextblock; read it as subset:THIS_FILE\n4\t1.png\n", "read it as subset:"),
    ],
)
def test_a_wrong_line_is_refused_by_its_number(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        listed(tmp_path, content)
