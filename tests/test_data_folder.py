"""What a spec names, and the images of directories, lists and parts of other sources."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nextblock.atomic import InUseError, exclusive, mark_output
from nextblock.config import DataConfig
from nextblock.data import BadImageError, Source, open_source, open_sources
from nextblock.data.sources import absolute_spec
from nextblock.data.sources.names import in_class_order, member_names
from nextblock.data.subsets import write_subset

DATA = DataConfig()


def make_images(root: Path, names: Iterable[str | bytes]) -> Path:
    for number, name in enumerate(names):
        path = root / (os.fsdecode(name) if isinstance(name, bytes) else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            Image.new("RGB", (6, 4), (number, 100, 200)).save(file, "PNG")
    return root


def opened(spec: object, data: DataConfig = DATA) -> Source:
    return open_source(str(spec), data)


def listed(folder: Path, content: str | bytes) -> Source:
    (folder / "list.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    return opened(f"files:{folder / 'list.txt'}")


def names(source: Source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


# ------------------------------------------------------------------------------------------------ directories


def test_a_directory_is_searched_in_the_order_of_its_paths_parts(tmp_path) -> None:
    make_images(tmp_path, ["b/1.png", "a/z/1.JPG", "a-b/1.png", "a/2.webp", "c.png", "a/10.png", ".x/1.png"])
    (tmp_path / "a" / "notes.txt").touch()
    (tmp_path / "a" / ".hidden.png").touch()
    assert names(opened(tmp_path)) == ["a/10.png", "a/2.webp", "a/z/1.JPG", "a-b/1.png", "b/1.png", "c.png"]


def test_what_is_no_image_is_counted_in_one_line(tmp_path, caplog) -> None:
    make_images(tmp_path, ["1.png", ".2.png"])
    for name in ("a.txt", "b.txt", "README"):
        (tmp_path / name).touch()
    with caplog.at_level(logging.INFO, logger="nextblock"):
        opened(tmp_path)
    assert "1 images; ignored 3 files, none with an image's extension (.txt, no extension)" in caplog.text
    assert "1 hidden" in caplog.text


def test_links_are_followed_but_no_loop_and_broken_ones_are_unreadable(tmp_path) -> None:
    make_images(tmp_path / "a", ["x/1.png"])
    (tmp_path / "a" / "x" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "y").symlink_to(tmp_path / "a" / "x")
    (tmp_path / "a" / "z.png").symlink_to("z.png")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a" / "zz.png").symlink_to(tmp_path / "pipe")
    source = opened(tmp_path / "a")
    assert names(source) == ["x/1.png", "y/1.png", "z.png", "zz.png"]
    for index, reason in ((2, "cannot be read"), (3, "no regular file")):
        with pytest.raises(BadImageError, match=reason):
            source.read(index)


def test_directories_that_nextblock_wrote_are_passed_by_unless_they_are_named(tmp_path) -> None:
    make_images(tmp_path, ["1.png", "run/pictures/2.png"])
    mark_output(tmp_path / "run")
    assert names(opened(tmp_path)) == ["1.png"]
    assert names(opened(tmp_path / "run")) == ["pictures/2.png"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a b [/bold] ~x.png", "a b [/bold] ~x.png"),
        ("tab\there.png", "tab\\there.png"),
        ("line\nend\x1b[31m.png", "line\\nend\\x1b[31m.png"),
        (b"\xff\xe9.png", "\\xff\\xe9.png"),
        (unicodedata.normalize("NFD", "é.png"), "é.png"),
        ("=cmd|x.png", "=cmd|x.png"),
    ],
)
def test_odd_names_are_read_and_shown_printable(tmp_path, name, shown) -> None:
    source = opened(make_images(tmp_path, [name]))
    assert names(source) == [shown]
    assert source.read(0).shape == (3, 4, 6)


def test_classes_are_first_level_folders_alike_in_both_unicode_forms(tmp_path) -> None:
    forms = [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]
    one, two = (opened(make_images(tmp_path / form, [f"{form}/1.png", "b/1.png"])) for form in forms)
    assert one.class_names == two.class_names == ("b", "é")
    assert [one.class_names[label] for label in one.labels] == [name.split("/")[0] for name in names(one)]


def test_images_in_the_root_have_no_labels_and_are_refused_only_when_labels_are_asked_for(tmp_path) -> None:
    source = opened(make_images(tmp_path, ["a/1.png", "b/1.png", "stray.png"]))
    assert not source.has_labels
    with pytest.raises(ValueError, match="first-level folders, but 1 of its 3 images lie directly in it"):
        _ = source.labels


def test_empty_folders_are_named_and_are_no_classes(tmp_path) -> None:
    make_images(tmp_path, ["a/1.png"])
    (tmp_path / "b").mkdir()
    (tmp_path / "self").symlink_to(".")
    source = opened(tmp_path)
    assert (source.class_names, source.empty_classes()) == (("a",), ["b"])


def test_the_fingerprint_depends_on_the_names_only(tmp_path) -> None:
    def fingerprint(folder: str, *images: str) -> str:
        return opened(make_images(tmp_path / folder, images)).fingerprint

    base = fingerprint("0", "a/1.png", "a/2.png")
    assert fingerprint("1", "a/1.png", "a/2.png") == base
    assert len({base, fingerprint("2", "a/1.png"), fingerprint("3", "a/1.png", "b/2.png")}) == 3


def test_a_source_travels_to_a_worker_process(tmp_path) -> None:
    source = opened(make_images(tmp_path, ["a/1.png", "b/2.png"]))
    copy = pickle.loads(pickle.dumps(source))
    assert (names(copy), copy.fingerprint) == (names(source), source.fingerprint)


def test_a_file_larger_than_any_image_is_unreadable_and_is_not_read(tmp_path) -> None:
    make_images(tmp_path, ["1.png"])
    with (tmp_path / "2.tif").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BadImageError, match=r"1,099,511,627,776 bytes, more than an image of"):
        opened(tmp_path).read(1)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "searched with all its folders: it is empty"),
        (["a/1.txt", "2.csv"], r"2 files, none with an image's extension \(.csv, .txt\)"),
    ],
)
def test_a_directory_without_images_is_refused_with_what_was_found(tmp_path, files, message) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=message):
        opened(tmp_path)


# ------------------------------------------------------------------------------------------------------ specs


@pytest.mark.parametrize("name", ["digits", "files", "subset", "hf", "torchvision"])
def test_a_path_is_a_path_and_the_message_names_the_keyword_too(tmp_path, monkeypatch, caplog, name) -> None:
    make_images(tmp_path / name, ["1.png"])
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING, logger="nextblock"):
        assert names(opened(name)) == ["1.png"]
    assert f"is read as the path {tmp_path / name}" in caplog.text
    assert f"{name}:" in caplog.text
    assert len(opened("digits:split=all")) == 1797
    assert absolute_spec(name) == str(tmp_path / name)


def test_a_tilde_and_the_other_unicode_form_lead_to_a_path(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make_images(tmp_path / unicodedata.normalize("NFD", "Bücher"), ["1.png"])
    assert len(opened("~/" + unicodedata.normalize("NFC", "Bücher"))) == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "the name of a source is empty"),
        ("gone", "no such directory .searched /.*/gone"),
        ("x.rar", r"is a file; give the directory that holds it, or files:x.rar"),
        ("x.tar.gz", "in a compressed tar cannot be read in random order; unpack it"),
        ("shards-{000..009}.tar.zst", "unpack it"),
        ("digits,split=train", "a colon; write digits:split=train"),
        ("[imgs,tars/x.tar]", "one by one: --data.train A --data.train B"),
        ("torchvison:CIFAR10", "no kind of source 'torchvison'; did you mean 'torchvision'"),
        ("data/train.parquet", r"no such file \(searched /.*/data/train.parquet\)"),
        ("x.zip", "no such file"),
        ("subset:list.txt", "there is no list"),
    ],
)
def test_a_spec_that_names_nothing_is_refused_with_the_remedy(tmp_path, monkeypatch, spec, message) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.rar").touch()
    with pytest.raises(ValueError, match=message):
        opened(spec)


def test_opening_a_directory_imports_no_torchvision(tmp_path) -> None:
    make_images(tmp_path, ["1.png"])
    code = (
        "import sys; from nextblock.data import open_source; from nextblock.config import DataConfig\n"
        f"open_source({str(tmp_path)!r}, DataConfig()).read(0)\n"
        "assert 'torchvision' not in sys.modules and 'sklearn' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("given", "ordered"),
    [
        (["10", "9", "-1", "2.5"], ("-1", "2.5", "9", "10")),
        (["10", "9", "x"], ("10", "9", "x")),
        (["1", "01", "0", "1"], ("0", "01", "1")),
        ([], ()),
    ],
)
def test_classes_are_sorted_as_numbers_if_all_are(given, ordered) -> None:
    numbers, classes = in_class_order(given)
    assert classes == ordered
    assert [classes[number] for number in numbers] == given


def test_backslashes_separate_folders_only_if_no_name_has_a_slash() -> None:
    assert member_names([b"a\\1.png", b".\\b\\2.png"]) == [b"a/1.png", b"b/2.png"]
    assert member_names([b"./a/1.png", b"/x\\y.png"]) == [b"a/1.png", b"x\\y.png"]


# ------------------------------------------------------------------------------------------------------ lists


def test_a_list_has_paths_relative_to_its_folder_or_absolute_with_classes_after_a_tab(tmp_path) -> None:
    make_images(tmp_path, ["lists/b/2.dat", "far/1.png"])
    far = tmp_path / "far" / "1.png"
    source = listed(tmp_path / "lists", f"\ufeff# comment\r\n\n{far}\t10\r\nb/2.dat\t9\n../far/1.png\t9")
    assert names(source) == [str(far), "b/2.dat", "../far/1.png"]
    assert (source.class_names, source.labels.tolist()) == (("9", "10"), [1, 0, 0])
    assert source.content(1) == (tmp_path / "lists" / "b" / "2.dat").read_bytes()
    assert source.path(2) == tmp_path / "lists" / "../far/1.png"


def test_a_listed_file_is_found_in_the_other_unicode_form_and_without_spaces_is_hinted_at(tmp_path) -> None:
    make_images(tmp_path, [unicodedata.normalize("NFD", "é.png"), "1.png"])
    source = listed(tmp_path, unicodedata.normalize("NFC", "é.png") + "\n1.png \ngone.png\n")
    assert source.read(0).shape == (3, 4, 6)
    with pytest.raises(BadImageError, match="it is there without the spaces around its path"):
        source.read(1)
    with pytest.raises(BadImageError, match=r"No such file or directory$"):
        source.read(2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("# only\n\n", "lists no images"),
        ("1.png\n2.png\n1.png\n", r"line 3: '1.png' is already in line 1"),
        ("1.png\ta\n2.png\n", "line 2 has no class after a tab, unlike the lines before"),
        ("1.png\n2.png\ta\n", "line 2 has a class after a tab"),
        ("1.png\ta\tb\n", "line 1: write PATH, or PATH, one tab and its class"),
        (b"a\0b.png\n", "line 1: a zero byte"),
    ],
)
def test_a_wrong_line_is_refused_by_its_number(tmp_path, content, message) -> None:
    with pytest.raises(ValueError, match=message):
        listed(tmp_path, content)


# ------------------------------------------------------------------------------------ parts of other sources


def test_a_subset_has_its_sources_images_labels_and_classes(tmp_path, monkeypatch) -> None:
    digits = open_source("digits", DATA)
    spec = write_subset(tmp_path / "some.txt", digits, np.array([4, 900]))
    source = opened(spec)
    assert (len(source), source.class_names) == (2, digits.class_names)
    assert torch.equal(source.read(1), digits.read(900))
    assert source.labels.tolist() == digits.labels[[4, 900]].tolist()
    assert source.name(1) == digits.name(900)
    assert source.content(0) is None
    with pytest.raises(ValueError, match="is not what the list was drawn from"):
        opened(f"{spec},of=digits:split=train")
    with pytest.raises(ValueError, match="list of image numbers that `nextblock data` wrote"):
        opened(spec.replace("subset:", "files:"))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("# of: digits\n1797\n", "the list names image 1797, but 'digits' has 1797"),
        ("# of: digits\n3\n3\n", "names an image twice"),
        ("# of: digits\nx.png\n", "line 2 of the list begins with 'x.png'"),
        ("# of: digits\n", "names no image"),
        ("3\n", r"names no source; write subset:.*,of=SPEC"),
        ("# of: nowhere\n3\n", "cannot open the source .* write subset:.*,of=SPEC"),
    ],
)
def test_a_wrong_list_of_numbers_is_refused(tmp_path, lines, message) -> None:
    (tmp_path / "l.txt").write_text(lines)
    with pytest.raises(ValueError, match=message):
        opened(f"subset:{tmp_path}/l.txt")


def test_the_parts_of_a_mixture_keep_their_files(tmp_path) -> None:
    make_images(tmp_path, ["a/1.png", "b/1.png"])
    mixture = open_sources([str(tmp_path / "a"), "digits", str(tmp_path / "b")], DATA)
    assert mixture.content(1798) == (tmp_path / "b" / "1.png").read_bytes()
    assert mixture.content(1) is None
    assert mixture.path(0) == tmp_path / "a" / "1.png"
    assert mixture.parts[1].spec == "digits"


# ------------------------------------------------------------------------------------------------ one process


def test_a_second_process_on_an_output_is_refused_with_who_is_at_work(tmp_path) -> None:
    code = (
        "import sys; from pathlib import Path; from nextblock.atomic import exclusive\n"
        f"with exclusive(Path({str(tmp_path / 'out')!r})): print('in', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with (
            pytest.raises(InUseError, match=rf"process {other.pid} on \S+, since 20\d\d-"),
            exclusive(tmp_path / "out"),
        ):
            pass
        other.kill()
    with exclusive(tmp_path / "out"):
        assert (tmp_path / "out" / ".nextblock").exists()
