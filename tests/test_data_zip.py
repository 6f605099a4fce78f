"""A zip's images are read at any place, stored or deflated, and a damaged one never gives wrong bytes."""

from __future__ import annotations

import io
import logging
import multiprocessing
import pickle
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from nextblock.config import DataConfig
from nextblock.data import BadImageError, Source, open_source
from nextblock.data.sources import zip as zip_source

DATA = DataConfig()
ZIP64_LIMIT = "ZIP64_LIMIT"


def picture(red: int = 0) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (6, 4), (red, 100, 200)).save(content, "PNG")
    return content.getvalue()


def write(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def names(source: Source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def reds(source: Source) -> list[int]:
    return [int(source.read(index)[0, 0, 0]) for index in range(len(source))]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_are_read_in_the_order_of_the_directory(tmp_path, method) -> None:
    members = {"b/é.png": picture(1), "a/2.PNG": picture(2), "a/x/3.png": picture(3)}
    source = open_source(str(write(tmp_path / "x.zip", members, method)), DATA)
    assert names(source) == ["x.zip/b/é.png", "x.zip/a/2.PNG", "x.zip/a/x/3.png"]
    assert [source.content(index) for index in range(3)] == list(members.values())
    assert reds(source) == [1, 2, 3]
    assert source.in_memory is False


def test_a_zip_in_the_64_bit_form_behind_other_bytes_is_read(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(zipfile, ZIP64_LIMIT, 50)
    path = tmp_path / "x.zip"
    path.write_bytes(b"#!/bin/sh\n" * 20)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file:
        for number in range(3):
            file.writestr(f"{number}.png", picture(number))
    assert reds(open_source(str(path), DATA)) == [0, 1, 2]


def test_classes_are_the_first_level_folders_and_need_every_image_in_one(tmp_path) -> None:
    source = open_source(
        str(write(tmp_path / "x.zip", {"b/y/1.png": b"", "./a/2.png": b"", "b/3.png": b""})), DATA
    )
    assert source.has_labels
    assert source.class_names == ("a", "b")
    assert source.labels.tolist() == [1, 0, 1]
    without = open_source(str(write(tmp_path / "y.zip", {"a/1.png": b"", "2.png": b""})), DATA)
    assert not without.has_labels
    with pytest.raises(ValueError, match="first-level folders, but 1 of its 2 images lie in none"):
        without.labels  # noqa: B018 - asking is what fails


def test_other_members_are_ignored_and_counted_in_one_line(tmp_path, caplog) -> None:
    members = {
        "1.png": picture(),
        "notes.txt": b"",
        "__MACOSX/._1.png": b"",
        ".x/2.png": b"",
        "folder.png/": b"",
    }
    with caplog.at_level(logging.INFO, logger="nextblock"):
        source = open_source(str(write(tmp_path / "x.zip", members)), DATA)
    assert names(source) == ["x.zip/1.png"]
    (record,) = caplog.records
    assert (
        "1 images; ignored 1 file, none with an image's extension (.txt) and 2 hidden" in record.getMessage()
    )


def test_other_processes_read_it(tmp_path) -> None:
    source = open_source(str(write(tmp_path / "x.zip", {f"{i}.png": picture(i) for i in range(3)})), DATA)
    assert reds(source) == [0, 1, 2]
    assert len(pickle.dumps(source)) < 2000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(reds, (source,)) == [0, 1, 2]


def test_the_fingerprint_is_of_the_names(tmp_path) -> None:
    base = open_source(str(write(tmp_path / "x.zip", {"1.png": b"a", "2.png": b"b"})), DATA).fingerprint
    assert base.startswith("zip-2-")
    assert (
        open_source(str(write(tmp_path / "y.zip", {"1.png": b"c", "2.png": b"d"})), DATA).fingerprint == base
    )
    assert (
        open_source(str(write(tmp_path / "z.zip", {"2.png": b"c", "1.png": b"d"})), DATA).fingerprint != base
    )


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_flipped_byte_or_a_cut_gives_a_bad_image_or_a_refusal_and_never_wrong_bytes(
    tmp_path, method
) -> None:
    members = {"a/1.png": picture(1), "a/2.png": picture(2)}
    whole = write(tmp_path / "x.zip", members, method).read_bytes()
    path = tmp_path / "y.zip"
    flipped = [whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :] for at in range(len(whole))]
    bad = refused = 0
    for content in [*flipped, *(whole[:end] for end in range(0, len(whole), 5))]:
        path.write_bytes(content)
        try:
            source = open_source(str(path), DATA)
        except ValueError as error:
            refused += str(path) in str(error)
            continue
        for index in range(len(source)):
            try:
                assert source.content(index) in members.values()
            except BadImageError:
                bad += 1
    assert bad > 50
    assert refused > 50


def test_a_zip_that_is_gone_or_cut_since_gives_bad_images(tmp_path) -> None:
    path = write(tmp_path / "x.zip", {"1.png": picture(1), "2.png": picture(2)})
    source = open_source(str(path), DATA)
    copy = pickle.loads(pickle.dumps(source))
    assert reds(source) == [1, 2]
    with path.open("r+b") as file:
        file.truncate(50)
    with pytest.raises(BadImageError, match="the zip is damaged"):
        source.read(1)
    path.unlink()
    with pytest.raises(BadImageError, match="its zip cannot be read: No such file"):
        copy.read(0)


def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(zip_source, "_MAX_BYTES", 1000)
    path = write(tmp_path / "x.zip", {"1.png": bytes(1001)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(BadImageError, match="says that it is 1,001 bytes large, more than 1,000"):
        open_source(str(path), DATA).read(0)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused_by_the_member(tmp_path, method) -> None:
    path = write(tmp_path / "x.zip", {"a/1.png": picture()}, method)
    with pytest.raises(
        ValueError, match=rf"'a/1.png' is compressed by the zip method {method}; pack it again"
    ):
        open_source(str(path), DATA)


def test_an_encrypted_member_is_refused(tmp_path) -> None:
    path = write(tmp_path / "x.zip", {"a/1.png": picture()})
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\1\2") + 8] |= 1  # the flag in the directory
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"'a/1.png' is encrypted; unpack it, and pack it again without"):
        open_source(str(path), DATA)


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\3\4" + bytes(100)])
def test_what_is_no_zip_is_refused(tmp_path, content) -> None:
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(ValueError, match="is no zip, or a cut or damaged one"):
        open_source(str(tmp_path / "x.zip"), DATA)


def test_a_zip_without_images_is_refused_with_what_was_found(tmp_path) -> None:
    with pytest.raises(ValueError, match="holds no images: it is empty; an image's name ends in"):
        open_source(str(write(tmp_path / "x.zip", {})), DATA)
    with pytest.raises(ValueError, match=r"holds no images: 1 file, none with an image's extension \(.txt\)"):
        open_source(str(write(tmp_path / "y.zip", {"1.txt": b""})), DATA)


def test_a_zip_that_is_not_there_is_refused_with_where_it_was_sought(tmp_path) -> None:
    with pytest.raises(ValueError, match=f"there is no such file .searched {tmp_path}/gone.zip"):
        open_source(str(tmp_path / "gone.zip"), DATA)
