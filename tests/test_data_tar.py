"""Tar shards of every common form are read at any place, with labels, and broken ones say what is lost."""

from __future__ import annotations

import gzip
import io
import json
import logging
import multiprocessing
import pickle
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from nextblock.config import DataConfig
from nextblock.data import BadImageError, Source, Step, TrainLoader, open_source
from nextblock.data.sources import tar
from nextblock.data.sources.tar import TarSource

DATA = DataConfig()
INDEX = ".nextblock-index"


@pytest.fixture
def said(caplog) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, logger="nextblock"):
        yield caplog


def picture(red: int = 0) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (6, 4), (red, 100, 200)).save(content, "PNG")
    return content.getvalue()


def write(path: Path, members: dict[str, bytes | str], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as file:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def names(source: Source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def reds(source: Source) -> list[int]:
    return [int(source.read(index)[0, 0, 0]) for index in range(len(source))]


# -------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_found_where_tarfile_finds_them(tmp_path, form) -> None:
    long = "f" * 90 + "/" + "g" * 80 + "/3.png"
    members = {"a/1.png": picture(1), "./b/2.png": picture(2), long: picture(3), "/4.png": picture(4)}
    path = write(tmp_path / "x.tar", dict(members), form)
    source = open_source(str(path), DATA)
    assert names(source) == ["x.tar/a/1.png", "x.tar/b/2.png", f"x.tar/{long}", "x.tar/4.png"]
    assert [source.content(index) for index in range(4)] == list(members.values())
    assert reds(source) == [1, 2, 3, 4]
    assert source.in_memory is False


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_longer_than_any_header_or_beyond_ascii_are_whole(tmp_path, form) -> None:
    long = "x" * 300 + "é.png"
    source = open_source(str(write(tmp_path / "x.tar", {long: picture(1), "é.png": picture(2)}, form)), DATA)
    assert names(source) == [f"x.tar/{long}", "x.tar/é.png"]
    assert reds(source) == [1, 2]


def test_numbers_in_base_256_and_sizes_in_pax_headers_are_understood(tmp_path) -> None:
    info = tarfile.TarInfo("1.png")
    content = picture(1)
    info.size, info.mtime = len(content), -5  # a time that octal digits cannot say
    gnu = info.tobuf(tarfile.GNU_FORMAT)
    octal, binary = f"{len(content):011o}\0".encode(), b"\x80" + len(content).to_bytes(11, "big")
    assert octal in gnu
    header = gnu.replace(octal, binary)
    total = sum(header[:148] + header[156:]) + 256
    header = header[:148] + f"{total:06o}\0 ".encode() + header[156:]
    padded = content.ljust(-(-len(content) // 512) * 512, b"\0")
    stated = tarfile.TarInfo("2.png")
    stated.size, stated.pax_headers = len(content), {"size": str(len(content)), "comment": "a = b\nc"}
    pax = stated.tobuf(tarfile.PAX_FORMAT)
    (tmp_path / "x.tar").write_bytes(header + padded + pax + padded + bytes(1024))
    source = open_source(str(tmp_path / "x.tar"), DATA)
    assert names(source) == ["x.tar/1.png", "x.tar/2.png"]
    assert reds(source) == [1, 1]


def test_shards_are_read_in_their_order_by_braces(tmp_path) -> None:
    for part in range(2):
        for number in range(8, 11):
            write(
                tmp_path / f"s{part}-{number:03}.tar",
                {f"{i}.png": picture(number * 10 + i) for i in range(2)},
            )
    source = open_source(f"{tmp_path}/s{{0..1}}-{{008..010}}.tar", DATA)
    assert reds(source) == [80, 81, 90, 91, 100, 101] * 2
    assert names(source)[3:5] == ["s0-009.tar/1.png", "s0-010.tar/0.png"]
    assert len(set(names(source))) == 12


def test_shards_of_one_name_in_two_folders_are_told_apart(tmp_path) -> None:
    for folder in "01":
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "x.tar", {"1.png": picture()})
    source = open_source(f"{tmp_path}/{{0..1}}/x.tar", DATA)
    assert names(source) == [f"{tmp_path}/0/x.tar/1.png", f"{tmp_path}/1/x.tar/1.png"]


def test_a_file_whose_name_has_braces_is_itself(tmp_path) -> None:
    source = open_source(str(write(tmp_path / "x{0..1}.tar", {"1.png": picture(7)})), DATA)
    assert reds(source) == [7]


def test_shards_can_be_called_by_other_names(tmp_path) -> None:
    path = write(tmp_path / "copy-of-it.tar", {"1.png": picture(3)})
    source = TarSource("https://host/x.tar", [path], DATA, names=["https://host/x.tar"])
    assert names(source) == ["https://host/x.tar/1.png"]
    assert source.spec == "https://host/x.tar"
    assert source.fingerprint == open_source(str(path), DATA).fingerprint


def test_every_image_of_a_key_is_a_sample_and_a_later_member_of_a_name_replaces_it(tmp_path, said) -> None:
    path = tmp_path / "x.tar"
    write(path, {"k.left.png": picture(1), "k.right.png": picture(2), "k.cls": "5", "l.png": picture(3)})
    with tarfile.open(path, "a") as file:
        data = picture(9)
        info = tarfile.TarInfo("k.left.png")
        info.size = len(data)
        file.addfile(info, io.BytesIO(data))
    source = open_source(str(path), DATA)
    assert names(source) == ["x.tar/k.left.png", "x.tar/k.right.png", "x.tar/l.png"]
    assert reds(source) == [9, 2, 3]


def test_what_is_no_image_is_ignored_and_counted_in_one_line(tmp_path, said) -> None:
    path = tmp_path / "x.tar"
    write(
        path,
        {"1.png": picture(), "._1.png": b"", "a/.b/2.png": b"", "1.txt": "", "1.cls": "0", "1.json": "{}"},
    )
    with tarfile.open(path, "a") as file:
        for name, kind in (
            ("2.png", tarfile.SYMTYPE),
            ("3.png", tarfile.LNKTYPE),
            ("folder.png", tarfile.DIRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "1.png"
            file.addfile(info)
    assert names(open_source(str(path), DATA)) == ["x.tar/1.png"]
    (record,) = said.records
    assert record.getMessage() == (
        f"{path}: 1 images; ignored 3 files, none with an image's extension (links or special files, .txt) "
        "and 2 hidden (beginning with a dot)"
    )


def test_a_broken_member_is_a_bad_image(tmp_path) -> None:
    source = open_source(str(write(tmp_path / "x.tar", {"1.png": b"no image", "2.png": b""})), DATA)
    with pytest.raises(BadImageError, match="not an image"):
        source.read(0)
    with pytest.raises(BadImageError, match="empty"):
        source.read(1)


def test_a_shard_that_shrinks_or_vanishes_gives_bad_images(tmp_path) -> None:
    for number in range(2):
        write(tmp_path / f"{number}.tar", {"1.png": picture(), "2.png": picture()})
    source = open_source(f"{tmp_path}/{{0..1}}.tar", DATA)
    assert source.read(0).shape == (3, 4, 6)
    with (tmp_path / "0.tar").open("r+b") as file:
        file.truncate(700)
    (tmp_path / "1.tar").unlink()
    with pytest.raises(BadImageError, match="its shard has become shorter"):
        source.read(1)
    with pytest.raises(BadImageError, match="its shard cannot be read: No such file"):
        source.read(2)


def test_few_shards_are_open_at_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tar, "MAX_OPEN", 2)
    for number in range(4):
        write(tmp_path / f"{number}.tar", {"1.png": picture(number)})
    source = open_source(f"{tmp_path}/{{0..3}}.tar", DATA)
    assert isinstance(source, TarSource)
    assert [int(source.read(index)[0, 0, 0]) for index in (0, 1, 0, 2, 0, 3)] == [0, 1, 0, 2, 0, 3]
    assert list(source._maps) == [0, 3]


def test_other_processes_read_it(tmp_path) -> None:
    source = open_source(str(write(tmp_path / "x.tar", {f"{i}.png": picture(i) for i in range(3)})), DATA)
    assert reds(source) == [0, 1, 2]
    assert reds(pickle.loads(pickle.dumps(source))) == [0, 1, 2]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(reds, (source,)) == [0, 1, 2]


def test_training_on_shards_is_the_same_with_and_without_workers(tmp_path) -> None:
    for number in range(2):
        write(tmp_path / f"{number}.tar", {f"{i}.png": picture(number * 10 + i) for i in range(4)})
    source = open_source(f"{tmp_path}/{{0..1}}.tar", DATA)

    def steps(workers: int) -> list[Step]:
        loader = TrainLoader(source, DATA, image_size=8, seed=0, batch_size=4, workers=workers)
        return list(islice(loader, 4))

    for alone, helped in zip(steps(0), steps(2), strict=True):
        assert torch.equal(alone.micro_batches[0].samples, helped.micro_batches[0].samples)
        assert torch.equal(alone.micro_batches[0].images, helped.micro_batches[0].images)


# --------------------------------------------------------------------------------------------------- labels


def test_cls_members_are_labels_by_the_key_sorted_as_numbers(tmp_path) -> None:
    write(tmp_path / "0.tar", {"a/1.png": picture(), "a/1.cls": "10\n", "a/2.left.jpg": b"", "a/2.CLS": b"9"})
    write(tmp_path / "1.tar", {"1.cls": "9", "1.json": '{"label": 3}', "1.png": picture()})
    source = open_source(f"{tmp_path}/{{0..1}}.tar", DATA)
    assert source.has_labels
    assert source.class_names == ("9", "10")
    assert source.labels.tolist() == [1, 0, 0]


@pytest.mark.parametrize("field", ["label", "cls", "class"])
def test_a_field_of_json_is_a_label(tmp_path, field) -> None:
    members = {
        "1.json": json.dumps({"x": [1], field: "dog"}),
        "1.png": b"",
        "2.png": b"",
        "2.json": f'{{"{field}":"cat"}}',
    }
    source = open_source(str(write(tmp_path / "x.tar", members)), DATA)
    assert source.class_names == ("cat", "dog")
    assert source.labels.tolist() == [1, 0]


def test_without_label_members_the_first_folders_are_classes(tmp_path) -> None:
    members = {
        "./b/x/1.png": b"",
        "a/2.png": b"",
        "b/3.png": b"",
        "b/3.json": "[1",
        "a/2.json": '{"label": [1]}',
    }
    source = open_source(str(write(tmp_path / "x.tar", members)), DATA)
    assert source.has_labels
    assert source.class_names == ("a", "b")
    assert source.labels.tolist() == [1, 0, 1]


def test_no_labels_and_half_of_them_are_refused_only_when_asked_for(tmp_path) -> None:
    none = open_source(str(write(tmp_path / "x.tar", {"1.png": b"", "a/2.png": b""})), DATA)
    half = open_source(str(write(tmp_path / "y.tar", {"a/1.png": b"", "a/1.cls": "1", "a/2.png": b""})), DATA)
    assert not none.has_labels
    assert not half.has_labels
    with pytest.raises(
        ValueError, match=r"no labels: there are no \.cls members, no label, cls or class in \.json"
    ):
        none.labels  # noqa: B018 - asking is what fails
    with pytest.raises(ValueError, match=r"no labels for 1 of its 2 images, the first 'y.tar/a/2.png'"):
        half.labels  # noqa: B018 - asking is what fails


# ---------------------------------------------------------------------------------------------------- index


def test_the_index_lies_beside_the_shard_and_is_used_while_the_shard_is_the_same(
    tmp_path, monkeypatch
) -> None:
    path = write(tmp_path / "x.tar", {"1.png": picture(1), "1.cls": "7"})
    first = open_source(str(path), DATA)
    assert path.with_name(f"x.tar{INDEX}").is_file()

    def refuse(*_: object) -> None:
        raise AssertionError("the headers were read again")

    with monkeypatch.context() as patch:
        patch.setattr("nextblock.data.sources.tar_index._members", refuse)
        second = open_source(str(path), DATA)
    assert names(second) == names(first)
    assert second.fingerprint == first.fingerprint
    assert second.class_names == ("7",)
    write(path, {"1.png": picture(1), "2.png": picture(2), "3.png": picture(3), "4.png": picture(4)})
    assert reds(open_source(str(path), DATA)) == [1, 2, 3, 4]


def test_a_broken_index_is_made_anew_with_one_line(tmp_path, said) -> None:
    path = write(tmp_path / "x.tar", {"1.png": picture(1)})
    open_source(str(path), DATA)
    index = path.with_name(f"x.tar{INDEX}")
    whole = index.read_bytes()
    for broken in (b"", whole[:-1], whole[:-1] + b"\7", b"{}\n"):
        said.clear()
        index.write_bytes(broken)
        assert reds(open_source(str(path), DATA)) == [1]
        (record,) = said.records
        assert "is damaged" in record.getMessage()
        assert index.read_bytes() == whole


def test_where_the_shards_folder_cannot_be_written_the_index_lies_in_the_cache(
    tmp_path, monkeypatch, said
) -> None:
    path = write(tmp_path / "x.tar", {"1.png": picture(1)})
    path.with_name(f"x.tar{INDEX}").mkdir()  # even a superuser cannot put a file in its place
    data = DataConfig(cache_dir=str(tmp_path / "cache"))
    assert reds(open_source(str(path), data)) == [1]
    assert len(list((tmp_path / "cache" / "indexes").iterdir())) == 1
    monkeypatch.setattr("nextblock.data.sources.tar_index._members", None)
    said.clear()
    assert reds(open_source(str(path), data)) == [1]


def test_where_nothing_can_be_written_one_line_says_so(tmp_path, said) -> None:
    for number in range(3):
        write(tmp_path / f"{number}.tar", {"1.png": picture(number)})
        (tmp_path / f"{number}.tar{INDEX}").mkdir()
    (tmp_path / "file").touch()
    data = DataConfig(cache_dir=str(tmp_path / "file"))
    assert reds(open_source(f"{tmp_path}/{{0..2}}.tar", data)) == [0, 1, 2]
    lines = [record.getMessage() for record in said.records if "indexes" in record.getMessage()]
    assert len([line for line in lines if line.startswith("no indexes are kept: cannot make the cache")]) == 1
    assert len([line for line in lines if line.startswith("no indexes of shards are kept: neither")]) == 1


def test_progress_is_said_while_many_shards_are_indexed(tmp_path, monkeypatch, said) -> None:
    monkeypatch.setattr(tar, "PROGRESS_S", 0.0)
    for number in range(2):
        write(tmp_path / f"{number}.tar", {"1.png": picture(number)})
    open_source(f"{tmp_path}/{{0..1}}.tar", DATA)
    messages = [record.getMessage() for record in said.records]
    assert f"{tmp_path}/{{0..1}}.tar: read the headers of 1 of 2 shards" in messages
    assert any("read the headers of all 2 shards in" in message for message in messages)


def test_the_fingerprint_is_of_names_and_sizes(tmp_path) -> None:
    def fingerprint(folder: str, members: dict[str, bytes | str]) -> str:
        (tmp_path / folder).mkdir()
        return open_source(str(write(tmp_path / folder / "x.tar", members)), DATA).fingerprint

    base = fingerprint("0", {"1.png": b"123", "2.png": b"45"})
    assert base.startswith("tar-2-")
    assert fingerprint("1", {"1.txt": "!", "1.png": b"abc", "2.png": b"de"}) == base
    assert fingerprint("2", {"1.png": b"123", "2.png": b"456"}) != base
    assert fingerprint("3", {"1.png": b"123", "3.png": b"45"}) != base


# --------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize(
    ("end", "reason", "whole"),
    [
        (1024 + 100, "the file ends within a header at byte 1,024", [1]),
        (1024 + 512 + 20, "the file ends within '2.png'", [1]),
        (2048, "the file ends without the mark of a tar's end", [1, 2]),
    ],
)
def test_of_a_cut_tar_the_whole_members_are_used_and_the_rest_is_told(
    tmp_path, said, end, reason, whole
) -> None:
    assert len(picture()) <= 512
    path = write(tmp_path / "x.tar", {"1.png": picture(1), "2.png": picture(2)})
    path.write_bytes(path.read_bytes()[:end])
    for _ in range(2):  # with a new index, and with the one that was kept
        said.clear()
        assert reds(open_source(str(path), DATA)) == whole
        (record,) = said.records
        assert record.levelname == "WARNING"
        assert record.getMessage() == f"x.tar: {reason}; the {len(whole)} images before that are used"


def test_what_follows_a_damaged_header_is_told(tmp_path, said) -> None:
    path = write(tmp_path / "x.tar", {"1.png": picture(1), "2.png": picture(2)})
    content = bytearray(path.read_bytes())
    content[1030] ^= 1
    path.write_bytes(content)
    assert reds(open_source(str(path), DATA)) == [1]
    assert "x.tar: the header at byte 1,024 is damaged; the 1 images before that are used" in said.text


def test_no_cut_and_no_flipped_byte_of_a_header_raises_anything_but_what_is_said(tmp_path) -> None:
    long = "n" * 120 + ".png"
    whole = write(tmp_path / "x.tar", {long: picture(1), "2.png": picture(2), "2.cls": "1"}).read_bytes()
    path = tmp_path / "y.tar"
    opened = refused = 0
    headers = [*range(0, 512, 7), *range(512, 700, 3), *range(1024, 1536, 7)]
    cuts = [whole[:end] for end in range(0, 4096, 97)]
    for content in [*cuts, *(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :] for at in headers)]:
        path.write_bytes(content)
        try:
            source = open_source(str(path), DATA)
            opened += 1
        except ValueError as error:
            refused += str(path) in str(error)
            continue
        for index in range(len(source)):
            assert len(source.content(index) or b"") > 0
    assert opened > 20
    assert refused > 20
    assert opened + refused == len(cuts) + len(headers)


# ------------------------------------------------------------------------------------------------- refusals


def test_missing_shards_are_counted_and_the_first_three_named(tmp_path) -> None:
    write(tmp_path / "0.tar", {"1.png": picture()})
    with pytest.raises(
        ValueError, match=rf"4 of 5 shards are missing: {tmp_path}/1.tar, .*/2.tar, .*/3.tar, \.\.\.; "
    ):
        open_source(f"{tmp_path}/{{0..4}}.tar", DATA)
    with pytest.raises(ValueError, match=rf"1 of 1 shards are missing: {tmp_path}/x.tar; fetch them"):
        open_source(f"{tmp_path}/x.tar", DATA)


def test_a_pattern_is_refused_with_the_braces_to_write(tmp_path) -> None:
    write(tmp_path / "x-0.tar", {"1.png": picture()})
    with pytest.raises(ValueError, match=r"\* \? \[ have no meaning here.*shards-\{000000\.\.000999\}\.tar"):
        open_source(f"{tmp_path}/*.tar", DATA)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"no tar", r"is no tar \(it begins with b'no tar'\)"),
        (b"no tar" * 1000, "is no tar"),
        (gzip.compress(bytes(2000), mtime=0), r"is compressed \(gzip\)"),
        (bytes(10240), "holds no images: it is empty"),
    ],
)
def test_what_is_no_plain_tar_is_refused(tmp_path, content, message) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path / "x.tar"), DATA)


def test_a_tar_without_images_is_refused_with_what_was_found(tmp_path) -> None:
    write(tmp_path / "x.tar", {"1.txt": "", "1.jpg.gz": b"", "1.cls": "0"})
    with pytest.raises(
        ValueError, match=r"holds no images: 2 files, none with an image's extension \(.gz, .txt\)"
    ):
        open_source(str(tmp_path / "x.tar"), DATA)


@pytest.mark.parametrize("how", ["gnu", "pax"])
def test_sparse_members_are_refused(tmp_path, how) -> None:
    info = tarfile.TarInfo("1.png")
    if how == "gnu":
        info.type = tarfile.GNUTYPE_SPARSE
        header = info.tobuf(tarfile.GNU_FORMAT)
    else:
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
        header = info.tobuf(tarfile.PAX_FORMAT)
    (tmp_path / "x.tar").write_bytes(header + bytes(1024))
    with pytest.raises(ValueError, match=r"'1\.png' is stored sparsely; pack it again without --sparse"):
        open_source(str(tmp_path / "x.tar"), DATA)
