"""A zip's images are read at any place, however packed, and a damaged one never gives wrong bytes."""

from __future__ import annotations

import logging
import pickle
import resource
import zipfile
from multiprocessing import get_context
from pathlib import Path

import pytest

from nextblock.config import DataConfig
from nextblock.data.decode import BadImageError
from nextblock.data.sources import Source, open_source
from test_data_folder import names
from test_data_tar import picture, reds

METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]


def write(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def opened(path: Path, max_pixels: int = 10**8) -> Source:
    return open_source(str(path), DataConfig(max_pixels=max_pixels))


@pytest.mark.parametrize("method", METHODS)
def test_members_are_read_in_the_order_of_the_directory_however_packed(tmp_path, method):
    members = {"b/é.png": picture(1), "a/2.PNG": picture(2), "a/x/3.png": picture(3) + bytes(100_000)}
    source = opened(write(tmp_path / "x.zip", members, method))
    assert names(source) == ["x.zip/b/é.png", "x.zip/a/2.PNG", "x.zip/a/x/3.png"]
    assert [source.content(index) for index in range(3)] == list(members.values())
    assert reds(source) == [1, 2, 3]


def test_a_zip64_behind_other_bytes_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 50)
    path = tmp_path / "x.zip"
    path.write_bytes(b"#!/bin/sh\n" * 20)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file:
        for number in range(3):
            file.writestr(f"{number}.png", picture(number))
    assert reds(opened(path)) == [0, 1, 2]


@pytest.mark.parametrize("slash", ["/", "\\"])
def test_classes_are_the_first_level_folders_also_from_windows(tmp_path, slash, caplog):
    members = ["b/y/1.png", "a/2.png", "b/3.png", "a/", "d.png/", "b/n.txt", "__MACOSX/._1.png", ".x/2.png"]
    with caplog.at_level(logging.INFO, logger="nextblock"):
        source = opened(write(tmp_path / "x.zip", {name.replace("/", slash): b"" for name in members}))
    assert names(source) == ["x.zip/b/y/1.png", "x.zip/a/2.png", "x.zip/b/3.png"]
    assert (source.class_names, source.labels.tolist()) == (("a", "b"), [1, 0, 1])
    assert "3 images; ignored 1 file, none with an image's extension (.txt) and 2 hidden" in caplog.text


def test_other_processes_read_it_at_once(tmp_path):
    source = opened(write(tmp_path / "x.zip", {f"{i}.png": picture(i) for i in range(20)}))
    assert reds(source) == list(range(20))
    with get_context("fork").Pool(4) as pool:
        assert pool.map(reds, [source] * 8) == [list(range(20))] * 8


def test_the_fingerprint_is_of_the_names(tmp_path):
    base = opened(write(tmp_path / "x.zip", {"1.png": b"a", "2.png": b"b"})).fingerprint
    assert base == "zip-2-6c018492f718655911258cb140414fe6"
    assert opened(write(tmp_path / "y.zip", {"1.png": b"c", "2.png": b"d"})).fingerprint == base
    assert opened(write(tmp_path / "z.zip", {"2.png": b"c", "1.png": b"d"})).fingerprint != base


@pytest.mark.parametrize("method", METHODS)
def test_a_flipped_byte_or_a_cut_gives_a_bad_image_or_a_refusal_and_never_wrong_bytes(tmp_path, method):
    members = {"a/1.png": picture(1), "a/2.png": picture(2)}
    whole = write(tmp_path / "x.zip", members, method).read_bytes()
    flipped = [whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :] for at in range(0, len(whole), 3)]
    bad = refused = 0
    for content in [*flipped, *(whole[:end] for end in range(0, len(whole), 9))]:
        (tmp_path / "y.zip").write_bytes(content)
        try:
            source = opened(tmp_path / "y.zip")
            for index in range(len(source)):
                assert source.content(index) in members.values()
        except BadImageError:
            bad += 1
        except ValueError:
            refused += 1
    assert min(bad, refused) > 20


def test_a_zip_that_is_gone_or_cut_since_gives_bad_images(tmp_path):
    path = write(tmp_path / "x.zip", {"1.png": picture(1), "2.png": picture(2)})
    source = opened(path)
    with path.open("r+b") as file:
        file.truncate(50)
    with pytest.raises(BadImageError, match="the zip is damaged here"):
        source.read(1)
    path.unlink()
    with pytest.raises(BadImageError, match="its zip cannot be read: No such file"):
        pickle.loads(pickle.dumps(source)).read(0)


def test_a_bomb_is_not_unpacked_whatever_size_it_states(tmp_path):
    size = 100_000_000
    path = write(tmp_path / "x.zip", {"1.png": bytes(size)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(BadImageError, match=r"100,000,000 bytes, more than data\.max_pixels"):
        opened(path, max_pixels=1000).read(0)
    content = path.read_bytes()
    path.write_bytes(content.replace(size.to_bytes(4, "little"), (100).to_bytes(4, "little")))
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadImageError, match="the zip is damaged here"):
        opened(path).read(0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 50_000


@pytest.mark.parametrize(("place", "value"), [(8, 1), (10, 12)])
def test_encrypted_members_and_other_methods_are_refused_with_a_remedy(tmp_path, place, value):
    path = write(tmp_path / "x.zip", {"a/1.png": picture()})
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\1\2") + place] = value  # in the directory
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"'a/1.png' is encrypted or .*; pack it again by zip -0"):
        opened(path)
    path.write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(ValueError, match="is not a zip, or damaged"):
        opened(path)
