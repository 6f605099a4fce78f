"""A folder's list is the same however it is found, and an index of it is believed only while it is true."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nextblock.config import DataConfig
from nextblock.data import open_source
from nextblock.data.sources import listing
from nextblock.data.sources.cache import cache_dir, read_index, write_index
from nextblock.data.sources.listing import EXTENSIONS, Listing, Names, extension, list_images

LATER_NS = 10**10


@pytest.fixture
def data(tmp_path, monkeypatch) -> DataConfig:
    """Settings with a cache of their own, in which every folder's index is kept at once."""
    monkeypatch.setattr(listing, "INDEX_FROM", 0)
    monkeypatch.setattr(listing, "SETTLE_S", -1000)
    return DataConfig(cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def said(caplog) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, logger="nextblock"):
        yield caplog


def make(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def names(found: Listing) -> list[str]:
    return [found.names.text(index) for index in range(len(found))]


def indexes(data: DataConfig) -> list[Path]:
    return sorted((cache_dir(data) / "indexes").iterdir())


def no_searching(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("it was searched")

    monkeypatch.setattr(listing, "_scan", refuse)


def slow_walk(root: Path) -> list[str]:
    """The definition: every image's path, sorted by its parts."""
    paths = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    kept = [path for path in paths if not any(part.startswith(".") for part in path.parts)]
    return [
        path.as_posix()
        for path in sorted(kept, key=lambda path: path.parts)
        if path.suffix.lower() in EXTENSIONS
    ]


# ------------------------------------------------------------------------------------------------ searching


def test_many_folders_give_what_a_slow_walk_gives(tmp_path) -> None:
    rng = np.random.default_rng(0)
    folders, ends = ("f", "f-1", "f.2", "g", ".h"), (".png", ".JPG", ".txt", "", ".tar.gif", ".")
    for _ in range(300):
        parts = [folders[rng.integers(len(folders))] for _ in range(rng.integers(0, 4))]
        make(tmp_path, "/".join([*parts, f"n{rng.integers(30)}{ends[rng.integers(len(ends))]}"]))
    assert names(list_images(tmp_path)) == slow_walk(tmp_path)
    assert len(list_images(tmp_path)) > 50


def test_the_fingerprint_of_a_folder_never_changes(tmp_path) -> None:
    make(tmp_path, "b/2.png", "b/10.JPG", "a/x/deep.Tiff", "a/y.jpeg", "a-b/1.webp", "z.bmp")
    assert open_source(str(tmp_path), DataConfig()).fingerprint == "folder-6-816c01c65b10bed03628f43c29fc392f"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (b"a.JPG", b".jpg"),
        (b"a.b.png", b".png"),
        (b"a", b""),
        (b"a.", b""),
        (b".png", b""),
        (b"\xff.Gif", b".gif"),
    ],
)
def test_an_extension_is_what_follows_the_last_dot(name, expected) -> None:
    assert extension(name) == expected


def test_first_folders_are_sorted_and_names_without_one_are_counted() -> None:
    paths = [b"b/1.png", b"a/x/2.png", b"b/3.png", b"4.png"]
    found = Names(b"".join(paths), np.array([len(path) for path in paths]))
    assert found.number_in_root() == 1
    labels, folders = found.first_folders()
    assert folders == ("4.png", "a", "b")
    assert labels.tolist() == [2, 1, 2, 0]


def test_folders_that_are_all_numbers_are_numbered_as_numbers() -> None:
    paths = [b"10/1.png", b"2/2.png", b"1/3.png"]
    labels, folders = Names(b"".join(paths), np.array([len(path) for path in paths])).first_folders()
    assert folders == ("1", "2", "10")
    assert labels.tolist() == [2, 1, 0]


def test_a_million_names_take_their_bytes_and_eight_more_each() -> None:
    number, length = 1_000_000, 30
    found = Names(b"x" * (number * length), np.full(number, length))
    held = sum(sys.getsizeof(part) for part in vars(found).values())
    assert held < number * (length + 8) + 1000
    assert held < 200e6
    assert found[number - 1] == b"x" * length


# ---------------------------------------------------------------------------------------------------- index


def test_an_unchanged_folder_is_not_searched_again_and_says_the_same(
    tmp_path, data, monkeypatch, said
) -> None:
    root = make(tmp_path / "images", "a/1.png", "b/c/2.png", "b/notes.txt", "3.png", ".hidden/4.png")
    first = list_images(root, data)
    no_searching(monkeypatch)
    second = list_images(root, data)
    assert names(second) == names(first) == ["3.png", "a/1.png", "b/c/2.png"]
    assert second.names.digest() == first.names.digest()
    assert second.number_in_root == first.number_in_root == 1
    assert second.path(1) == root / "a" / "1.png"
    messages = {record.getMessage() for record in said.records}
    assert messages == {
        f"{root}: 3 images; ignored 1 file, none with an image's extension (.txt) and 1 hidden (beginning "
        "with a dot)"
    }
    assert len(said.records) == 2


@pytest.mark.parametrize("change", ["add", "remove", "rename", "new folder", "remove folder", "other folder"])
def test_a_change_anywhere_is_noticed(tmp_path, data, change, said) -> None:
    root = make(tmp_path / "images", "a/1.png", "b/c/2.png", "b/c/3.png", "d/4.png")
    list_images(root, data)
    deep = root / "b" / "c"
    if change == "add":
        make(deep, "5.png")
    elif change == "remove":
        (deep / "2.png").unlink()
    elif change == "rename":
        (deep / "2.png").rename(deep / "9.png")
    elif change == "new folder":
        make(deep, "e/5.png")
    elif change == "remove folder":
        (root / "a" / "1.png").unlink()
        (root / "a").rmdir()
    else:  # another directory takes its place, with the same time stamps
        times = (root / "d").stat().st_atime_ns, (root / "d").stat().st_mtime_ns
        (root / "d").rename(tmp_path / "old")
        make(root, "d/5.png")
        os.utime(root / "d", ns=times)
    if change in ("add", "remove", "rename", "new folder"):  # two changes may fall into one tick of the clock
        os.utime(deep, ns=(LATER_NS, LATER_NS))
    else:
        os.utime(root, ns=(LATER_NS, LATER_NS))
    assert names(list_images(root, data)) == slow_walk(root)
    assert f"{root} has changed since it was last searched" in said.text


def test_the_index_is_kept_by_the_absolute_path(tmp_path, data, monkeypatch) -> None:
    make(tmp_path / "x" / "images", "1.png")
    make(tmp_path / "y" / "images", "2.png")
    for folder, name in (("x", "1.png"), ("y", "2.png"), ("x", "1.png")):
        monkeypatch.chdir(tmp_path / folder)
        assert names(list_images(Path("images"), data)) == [name]
    assert len(indexes(data)) == 2


def test_a_folder_that_changed_just_now_is_searched_at_every_start(tmp_path, data, monkeypatch, said) -> None:
    monkeypatch.setattr(listing, "SETTLE_S", 1000)
    root = make(tmp_path / "images", "1.png")
    list_images(root, data)
    make(root, "2.png")
    assert names(list_images(root, data)) == ["1.png", "2.png"]
    assert indexes(data) == []
    assert "still changing: its index will be kept by a later start" in said.text


def test_a_small_folder_has_no_index(tmp_path) -> None:
    data = DataConfig(cache_dir=str(tmp_path / "cache"))
    list_images(make(tmp_path / "images", "1.png"), data)
    assert indexes(data) == []


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text", "lengthened", "header"])
def test_a_damaged_index_is_made_anew_with_one_line(tmp_path, data, damage, said) -> None:
    root = make(tmp_path / "images", "a/1.png", "b/2.png")
    list_images(root, data)
    (index,) = indexes(data)
    whole = index.read_bytes()
    middle = len(whole) - 20
    index.write_bytes(
        {
            "cut": whole[:-1],
            "flip": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "empty": b"",
            "text": b"\xff not json\n",
            "lengthened": whole + b"x",
            "header": whole.replace(b'"number_in_root": 0', b'"number_in_root": 1'),
        }[damage]
    )
    assert names(list_images(root, data)) == ["a/1.png", "b/2.png"]
    (record,) = said.records
    assert record.getMessage().startswith(f"{index} is damaged (")
    assert record.getMessage().endswith("; it is made anew")
    assert index.read_bytes() == whole


def test_an_index_of_another_version_is_made_anew_with_one_line(tmp_path, data, monkeypatch, said) -> None:
    root = make(tmp_path / "images", "1.png")
    monkeypatch.setattr(listing, "_VERSION", "folder 0")
    list_images(root, data)
    monkeypatch.setattr(listing, "_VERSION", "folder 1")
    assert names(list_images(root, data)) == ["1.png"]
    (record,) = said.records
    assert "is of another version ('folder 0'; this is 'folder 1'); it is made anew" in record.getMessage()
    no_searching(monkeypatch)
    list_images(root, data)


def test_a_cache_folder_that_cannot_be_made_is_a_line_of_the_log(tmp_path, data, said) -> None:
    (tmp_path / "file").touch()
    root = make(tmp_path / "images", "1.png")
    found = list_images(root, DataConfig(cache_dir=str(tmp_path / "file" / "cache")))
    assert names(found) == ["1.png"]
    (record,) = said.records
    assert record.getMessage() == (
        f"no indexes are kept: cannot make the cache folder '{tmp_path}/file/cache': Not a directory; set "
        "data.cache_dir to a folder that can be written"
    )


def test_an_index_that_cannot_be_written_is_a_line_of_the_log(tmp_path, data, said) -> None:
    root = make(tmp_path / "images", "1.png")
    list_images(root, data)
    (index,) = indexes(data)
    index.unlink()
    index.mkdir()  # even a superuser cannot put a file in its place
    assert names(list_images(root, data)) == ["1.png"]
    assert f"cannot write {index}: {root} will be searched again" in said.text
    assert indexes(data) == [index]


# ---------------------------------------------------------------------------------------------------- cache


def test_the_cache_folder_is_the_settings_then_xdgs_then_the_homes(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir(DataConfig(cache_dir=str(tmp_path / "own"))) == tmp_path / "own"
    assert cache_dir(DataConfig(cache_dir="~/mine")) == tmp_path / "home" / "mine"
    assert cache_dir(DataConfig()) == tmp_path / "xdg" / "nextblock"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir(DataConfig()) == tmp_path / "home" / ".cache" / "nextblock"
    assert cache_dir(DataConfig()).is_dir()


def test_an_index_comes_back_as_it_was_written(tmp_path) -> None:
    path = tmp_path / "x.index"
    assert read_index(path, version="v", stamp=1) is None
    assert write_index(path, {"a": [1, "é"]}, [b"", b"\n\0{}"], version="v", stamp=(1, 2))
    index = read_index(path, version="v", stamp=(1, 2))
    assert index is not None
    assert index.header == {"a": [1, "é"]}
    assert index.parts == [b"", b"\n\0{}"]
    assert read_index(path, version="v", stamp=(1, 3)) is None
    assert list(tmp_path.iterdir()) == [path]
