"""Tar shards of every common form are read at any place, with labels, and broken ones say what is lost."""

from __future__ import annotations

import gzip
import io
import logging
import os
import subprocess
import tarfile
from collections.abc import Mapping
from multiprocessing import get_context
from pathlib import Path

import pytest
from PIL import Image

from nextblock.config import DataConfig
from nextblock.data.decode import BadImageError
from nextblock.data.sources import Source, archives, open_source

DATA = DataConfig()
END = bytes(1024)


def picture(red: int = 0) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (6, 4), (red, 100, 200)).save(content, "PNG")
    return content.getvalue()


def write(path: Path, members: Mapping[str, bytes | str], form: int = tarfile.PAX_FORMAT, mode="w") -> Path:
    with tarfile.open(path, mode, format=form, errors="surrogateescape") as file:  # type: ignore[call-overload]
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def member(name: str, content: bytes, **changes: object) -> bytes:
    """One member of a tar, its header changed."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in changes.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.PAX_FORMAT) + content + bytes(-len(content) % 512)


def opened(path: object, data: DataConfig = DATA) -> Source:
    return open_source(str(path), data)


def names(source: Source) -> list[str]:
    return [source.name(index).removeprefix("x.tar/") for index in range(len(source))]


def reds(source: Source) -> list[int]:
    return [int(source.read(index)[0, 0, 0]) for index in range(len(source))]


def classes(source: Source) -> list[str]:
    return [source.class_names[label] for label in source.labels]


# ---------------------------------------------------------------------------------------------- members


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_every_form_are_found_in_their_order(tmp_path, form):
    long, longer = "f" * 90 + "/" + "g" * 80 + "/3.png", "x" * 300 + "é.png"
    stored = ["b/1.png", "./a/2.png", long, "/4.png", longer, "b\udcff.png"]
    stored = stored[:4] if form == tarfile.USTAR_FORMAT else stored
    members = {name: picture(number) for number, name in enumerate(stored)}
    source = opened(write(tmp_path / "x.tar", members, form))
    found = ["b/1.png", "a/2.png", long, "4.png", longer, "b\\xff.png"]
    assert names(source) == found[: len(stored)]
    assert reds(source) == list(range(len(stored)))


def test_a_later_member_of_a_name_replaces_the_first(tmp_path):
    path = write(tmp_path / "x.tar", {"k.left.png": picture(1), "k.right.png": picture(2)})
    write(path, {"k.left.png": picture(9)}, mode="a")
    assert reds(opened(path)) == [9, 2]


def test_tars_joined_by_cat_are_read_to_the_last(tmp_path):
    parts = [write(tmp_path / f"{n}.tar", {f"{n}.png": picture(n), f"{n}.cls": str(n)}) for n in range(3)]
    path = tmp_path / "x.tar"
    path.write_bytes(b"".join(part.read_bytes() for part in parts) + b"what follows is no tar" * 50)
    source = opened(path)
    assert (reds(source), classes(source), source.damage) == ([0, 1, 2], ["0", "1", "2"], ())


def test_backslashes_are_folders_where_no_name_has_a_slash(tmp_path):
    members = {"a\\1.png": picture(1), "b\\c\\2.png": picture(2), "b\\c\\2.cls": "z", "a\\1.cls": "y"}
    source = opened(write(tmp_path / "x.tar", members))
    assert (names(source), classes(source)) == (["a/1.png", "b/c/2.png"], ["y", "z"])


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_sparse_members_are_unreadable_images_and_the_others_are_read(tmp_path, form):
    (tmp_path / "1.png").write_bytes(picture(1))
    (tmp_path / "2.png").touch()
    os.truncate(tmp_path / "2.png", 300_000)
    path = tmp_path / "x.tar"
    options = [f"--format={form}", "--sparse", "-C", str(tmp_path), "-cf", str(path)]
    subprocess.run(["tar", *options, "2.png", "1.png"], check=True)
    if path.stat().st_size > 200_000:
        pytest.skip("this file system keeps no holes")
    source = opened(path)
    assert (names(source), source.content(1)) == (["2.png", "1.png"], picture(1))
    with pytest.raises(BadImageError, match="pack the tar again without --sparse"):
        source.read(0)


def test_what_is_no_image_is_ignored_and_counted_in_one_line(tmp_path, caplog):
    members = {"1.png": picture(), "._1.png": "", "a/.b/2.png": "", "1.txt": "", "1.cls": "0", "1.json": "{}"}
    path = write(tmp_path / "x.tar", members)
    with tarfile.open(path, "a") as file:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo("2.png")
            info.type, info.linkname = kind, "1.png"
            file.addfile(info)
    with caplog.at_level(logging.INFO, logger="nextblock"):
        assert names(opened(path)) == ["1.png"]
    assert "ignored 3 files, none with an image's extension (links or special files, .txt)" in caplog.text


# ----------------------------------------------------------------------------------------------- shards


def test_shards_are_read_in_the_order_of_braces_and_a_file_named_with_braces_is_a_file(tmp_path):
    for folder in "01":
        (tmp_path / folder).mkdir()
        for number in range(8, 11):
            write(tmp_path / folder / f"s-{number:03}.tar", {"1.png": picture(number)})
    source = opened(f"{tmp_path}/0/s-{{008..010}}.tar")
    assert (reds(source), source.name(2)) == ([8, 9, 10], "s-010.tar/1.png")
    both = opened(f"{tmp_path}/{{0..1}}/s-{{008..009}}.tar")
    assert (reds(both), both.name(2)) == ([8, 9, 8, 9], f"{tmp_path}/1/s-008.tar/1.png")
    write(tmp_path / "{0..1}.tar", {"1.png": picture(5)})
    assert reds(opened(tmp_path / "{0..1}.tar")) == [5]
    with pytest.raises(ValueError, match=r"3 of 5 shards are missing: .*011.tar, .*012.tar, .*013.tar$"):
        opened(f"{tmp_path}/0/s-{{009..013}}.tar")
    with pytest.raises(ValueError, match=r"\{5\.\.1\} must run upwards"):
        opened(f"{tmp_path}/{{5..1}}.tar")


def test_few_shards_are_open_at_once_and_other_processes_open_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_OPEN", 2)
    for number in range(4):
        write(tmp_path / f"{number}.tar", {"1.png": picture(number)})
    source = opened(f"{tmp_path}/{{0..3}}.tar")
    assert isinstance(source, archives.TarSource)
    assert [int(source.read(i)[0, 0, 0]) for i in (0, 1, 0, 2, 0, 3)] == [0, 1, 0, 2, 0, 3]
    assert list(source._files) == [0, 3]
    with get_context("fork").Pool(2) as pool:
        assert pool.map(reds, [source] * 4) == [[0, 1, 2, 3]] * 4


def test_a_shard_that_shrinks_or_vanishes_and_a_huge_member_give_bad_images(tmp_path):
    for number in range(2):
        write(tmp_path / f"{number}.tar", {"1.png": picture(), "2.png": picture()})
    source = opened(f"{tmp_path}/{{0..1}}.tar")
    os.truncate(tmp_path / "0.tar", 700)
    (tmp_path / "1.tar").unlink()
    with pytest.raises(BadImageError, match="its shard has changed since it was indexed"):
        source.read(1)
    with pytest.raises(BadImageError, match="its shard cannot be read: No such file"):
        source.read(2)
    path = tmp_path / "x.tar"
    size = 2**40  # a file of holes: as large as it says, and nothing is read of it
    path.write_bytes(member("1.png", b"", size=size)[:1536])
    os.truncate(path, path.stat().st_size + size)
    with pytest.raises(BadImageError, match=r"more than data\.max_pixels"):
        opened(path).read(0)


# ----------------------------------------------------------------------------------------------- labels


def sample(key: str, **labels: str) -> dict[str, str]:
    """An image and its labels, by ending."""
    return {f"{key}.png": "", **{f"{key}.{ending}": label for ending, label in labels.items()}}


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (
            sample("a/1", cls="10\n") | {"a/2.left.jpg": "", "a/2.CLS": "9", "a/2.json": '{"cls": 3}'},
            ["10", "9"],
        ),
        (sample("v1.0_3", cls="x") | sample("v1.0_4", json='{"label": "y"}'), ["x", "y"]),
        (sample("1", json='{"x": [1], "class": " dog "}'), ["dog"]),
        (sample("1", json='{"label": 2.0}') | sample("2", json='{"label": 0.5}'), ["2", "0.5"]),
        (sample("1", json='{"label": true}') | sample("2", json='{"label": null, "cls": 7}'), ["True", "7"]),
        (sample("b/x/1") | sample("./a/2", json='{"x": 1}') | {"b/n.json": "[", "b/.1.cls": "x"}, ["b", "a"]),
    ],
)
def test_labels_come_from_cls_then_json_then_folders(tmp_path, members, expected):
    assert classes(opened(write(tmp_path / "x.tar", members))) == expected


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (sample("1"), r"has no labels; add \.cls members"),
        (sample("a/1", cls="1") | sample("a/2"), r"no labels for 1 of its 2 images, the first 'x.tar/a/2"),
        (sample("a/1", json='{"label": [1, 2]}'), r"unusable label: x.tar/a/1.json: 'label' is \[1, 2\]"),
        (sample("1", json='{"cls": NaN}'), "'cls' is NaN"),
        (sample("1", json='{"cls"'), "1.json is not JSON"),
    ],
)
def test_missing_and_unusable_labels_are_told_only_when_asked_for(tmp_path, members, message):
    source = opened(write(tmp_path / "x.tar", members))
    assert not source.has_labels
    with pytest.raises(ValueError, match=message):
        _ = source.labels


def test_in_a_directory_of_tars_each_is_a_class(tmp_path):
    write(tmp_path / "n02.tar", {"n02_1.png": picture(2), "n02_2.png": picture(3)})
    write(tmp_path / "n01.tar", {"n01_1.png": picture(1)})
    write(tmp_path / "n03.tar", {})
    (tmp_path / "words.txt").write_text("n01 cat")
    source = opened(tmp_path)
    assert (reds(source), classes(source)) == ([1, 2, 3], ["n01", "n02", "n02"])
    assert (source.name(0), source.empty_classes()) == ("n01.tar/n01_1.png", ["n03"])
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="no images in"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("tars", "expected"),
    [
        ({"a": {"1.png": "", "1.cls": "x"}, "b": {"2.png": "", "2.cls": "y"}}, ["x", "y"]),
        ({"a": {"cat/1.png": ""}, "b": {"dog/2.png": ""}}, ["cat", "dog"]),
        ({"a": {"all/1.png": ""}, "b": {"all/2.png": ""}}, ["a", "b"]),
        ({"shard-000000": {"1.png": ""}, "train_003": {"2.png": ""}, "00001": {"2.png": ""}}, None),
        ({"only": {"1.png": ""}}, None),
    ],
)
def test_names_of_tars_are_classes_unless_they_state_others_or_are_shards(tmp_path, tars, expected):
    for name, members in tars.items():
        write(tmp_path / f"{name}.tar", members)
    source = opened(tmp_path)
    assert (classes(source) if source.has_labels else None) == expected


# ---------------------------------------------------------------------------------------------- indexes


def test_the_index_is_kept_while_the_tar_is_the_same_and_a_damaged_one_is_rebuilt(tmp_path, monkeypatch):
    path = write(tmp_path / "x.tar", {"1.png": picture(1), "1.cls": "7"})
    first = opened(path)
    index = tmp_path / "x.tar.nextblock-index"
    with monkeypatch.context() as patch:
        patch.setattr(archives, "build_index", None)
        again = opened(path)
    assert (again.fingerprint, names(again), classes(again)) == (first.fingerprint, ["1.png"], ["7"])
    whole = index.read_bytes()
    for broken in (b"", b"nonsense", b"[]\n", whole[:-40], whole[:-20] + b"!" + whole[-19:]):
        index.write_bytes(broken)
        assert reds(opened(path)) == [1]
        assert index.read_bytes() == whole
    write(path, {"2.png": picture(2), "3.png": picture(3)}, mode="a")
    assert reds(opened(path)) == [1, 2, 3]


def test_without_a_place_beside_the_tar_the_index_lies_in_the_cache_or_nowhere(tmp_path, monkeypatch):
    path = write(tmp_path / "x.tar", {"1.png": picture(1)})
    path.with_name("x.tar.nextblock-index").mkdir()  # even root cannot put a file in its place
    (tmp_path / "file").touch()
    assert reds(opened(path, DataConfig(cache_dir=str(tmp_path / "file")))) == [1]
    data = DataConfig(cache_dir=str(tmp_path / "cache"))
    opened(path, data)
    monkeypatch.setattr(archives, "build_index", None)
    assert reds(opened(path, data)) == [1]


def test_the_fingerprint_is_of_names_and_sizes(tmp_path):
    for first, second, is_same in (("1.png", b"45", True), ("1.png", b"456", False), ("0.png", b"45", False)):
        source = opened(write(tmp_path / "x.tar", {"1.txt": "!", first: b"123", "2.png": second}))
        assert (source.fingerprint == "tar-2-3bba02540a5bf8882a87d3058684ecc5") == is_same


# ----------------------------------------------------------------------------------------------- damage

CUT = "the header at byte 1,024 is cut off"
ONE, TWO = member("1.png", picture(1)), member("2.png", picture(2))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (ONE + TWO[:100], f"{CUT} or damaged"),
        (ONE + TWO[:520], "the file ends within '2.png'"),
        (ONE + member("2.png", b"", size=10**12), "the file ends within '2.png'"),
        (ONE, "the file ends without the mark of a tar's end"),
        (ONE + member("p", b"", size=2**30, type=b"x") + END, f"{CUT} or damaged"),
    ],
)
def test_the_images_before_damage_are_used_and_the_rest_is_told(tmp_path, caplog, content, reason):
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    told = f"x.tar: {reason}; 1 image before that can be used"
    for _ in range(2):  # with a new index, and with the one that was kept
        source = opened(path)
        assert reds(source) == [1]
        assert list(map(str, source.damage)) == [told]
    assert caplog.text.count(told) == 2


def test_cut_and_damaged_headers_are_refused_by_name_or_give_whole_images(tmp_path):
    path = write(tmp_path / "x.tar", {"n" * 120 + ".png": picture(1), "2.png": picture(2), "2.cls": "1"})
    whole = path.read_bytes()
    contents = [whole[:end] for end in range(0, 4096, 97)]
    places = [*range(0, 512, 7), *range(512, 700, 3), *range(1024, 1536, 7)]
    contents += [whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :] for at in places]
    refused = 0
    for content in contents:
        path.write_bytes(content)
        try:
            source = opened(path)
            assert all(source.content(index) for index in range(len(source)))
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert 20 < refused < len(contents) - 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty \(0 bytes\); fetch or pack it again"),
        (gzip.compress(END, mtime=0), "unpack it if it is compressed"),
        (b"<html>" * 200, r"is not a plain tar, or cut off \(it starts with '<html><h'\)"),
        (END, "no images in .*: it is empty"),
        (member("n01.tar", b"x") + END, "no images in .*unpack a tar of tars"),
        (member("1.png", bytes(9000))[:5000], "the file ends within '1.png'; 0 images .* pack it again"),
    ],
)
def test_what_is_no_plain_tar_of_images_is_refused_with_a_remedy(tmp_path, content, message):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / "x.tar")
