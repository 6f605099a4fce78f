"""Tars and zips of every form are read at any place, with labels; damaged ones never give wrong bytes."""

from __future__ import annotations

import gzip
import logging
import os
import pickle
import resource
import subprocess
import tarfile
import zipfile
from multiprocessing import get_context
from pathlib import Path

import pytest

from nextblock.config import DataConfig
from nextblock.data import BadImageError
from nextblock.data.sources import archives
from nextblock.errors import UsageError
from sources import archive, classes, names, opened, png, reds

END = bytes(1024)


def member(name: str, content: bytes, **changes: object) -> bytes:
    """One member of a tar, its header changed."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in changes.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.PAX_FORMAT) + content + bytes(-len(content) % 512)


@pytest.mark.parametrize(
    ("kind", "form", "count"),
    [
        ("tar", tarfile.USTAR_FORMAT, 4),
        ("tar", tarfile.GNU_FORMAT, 6),
        ("tar", tarfile.PAX_FORMAT, 6),
        ("zip", zipfile.ZIP_STORED, 5),
        ("zip", zipfile.ZIP_DEFLATED, 5),
    ],
)
def test_members_of_every_form_are_read_in_their_order(tmp_path, kind, form, count):
    long, longer = "f" * 90 + "/" + "g" * 80 + "/3.PNG", "x" * 300 + "é.png"
    written = ["b/1.png", "./a/2.png", long, "/4.png", longer, "b\udcff.png"][:count]
    members = {name: png(number) + bytes(100_000) for number, name in enumerate(written)}
    source = opened(archive(tmp_path / f"x.{kind}", members, form))
    found = ["b/1.png", "a/2.png", long, "4.png", longer, "b\\xff.png"]
    assert names(source) == [f"x.{kind}/{name}" for name in found[:count]]
    assert [source.content(index) for index in range(count)] == list(members.values())
    assert reds(source) == list(range(count))


def test_a_zip64_behind_other_bytes_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 50)
    path = tmp_path / "x.zip"
    path.write_bytes(b"#!/bin/sh\n" * 20)
    members = {f"{number}.png": png(number) for number in range(3)}
    assert reds(opened(archive(path, members, zipfile.ZIP_DEFLATED, mode="a"))) == [0, 1, 2]


def test_tars_joined_by_cat_are_read_to_the_last_whose_member_of_a_name_counts(tmp_path):
    content = b""
    for n in range(3):
        members = {f"{n}.png": png(n), f"{n}.cls": str(n), "k.left.png": png(10 + n), "k.cls": str(n)}
        content += archive(tmp_path / f"{n}.tar", members).read_bytes()
    (tmp_path / "x.tar").write_bytes(content + b"what follows is no tar" * 50)
    source = opened(tmp_path / "x.tar")
    assert (reds(source), classes(source), source.damage) == ([0, 12, 1, 2], ["0", "2", "1", "2"], ())


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_sparse_members_are_unreadable_images_and_the_others_are_read(tmp_path, form):
    (tmp_path / "1.png").write_bytes(png(1))
    (tmp_path / "2.png").touch()
    os.truncate(tmp_path / "2.png", 300_000)
    path = tmp_path / "x.tar"
    options = [f"--format={form}", "--sparse", "-C", str(tmp_path), "-cf", str(path)]
    subprocess.run(["tar", *options, "2.png", "1.png"], check=True)
    if path.stat().st_size > 200_000:
        pytest.skip("this file system keeps no holes")
    source = opened(path)
    assert (names(source), source.content(1)) == (["x.tar/2.png", "x.tar/1.png"], png(1))
    with pytest.raises(BadImageError, match="pack the tar again without --sparse"):
        source.read(0)


@pytest.mark.parametrize("slash", ["/", "\\"])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_classes_are_first_level_folders_with_slashes_of_either_kind(tmp_path, kind, slash, caplog):
    files = ["b/y/1.png", "a/2.png", "b/3.png", "b/n.txt", "__MACOSX/._1.png", ".x/2.png"]
    files += ["a/", "d.png/"] if kind == "zip" else []
    members = {name.replace("/", slash): b"" for name in files}
    with caplog.at_level(logging.INFO, logger="nextblock"):
        source = opened(archive(tmp_path / f"x.{kind}", members))
    assert names(source) == [f"x.{kind}/{name}" for name in files[:3]]
    assert (source.class_names, source.labels.tolist()) == (("a", "b"), [1, 0, 1])
    assert "3 images; ignored 1 file, none with an image's extension (.txt) and 2 hidden" in caplog.text


def test_links_in_a_tar_are_ignored_and_folders_and_labels_are_not_even_counted(tmp_path, caplog):
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE)
    links = b"".join(member("2.png", b"", type=kind, linkname="1.png") for kind in kinds)
    path = tmp_path / "x.tar"
    path.write_bytes(member("1.png", png()) + member("1.cls", b"0") + member("1.json", b"{}") + links + END)
    with caplog.at_level(logging.INFO, logger="nextblock"):
        assert names(opened(path)) == ["x.tar/1.png"]
    assert "ignored 2 files, none with an image's extension (links or special files)" in caplog.text


def test_shards_are_read_in_the_order_of_braces_and_a_file_named_with_braces_is_a_file(tmp_path):
    for folder in "01":
        (tmp_path / folder).mkdir()
        for number in range(8, 11):
            archive(tmp_path / folder / f"s-{number:03}.tar", {"1.png": png(number)})
    source = opened(f"{tmp_path}/0/s-{{008..010}}.tar")
    assert (reds(source), source.name(2)) == ([8, 9, 10], "s-010.tar/1.png")
    both = opened(f"{tmp_path}/{{0..1}}/s-{{008..009}}.tar")
    assert (reds(both), both.name(2)) == ([8, 9, 8, 9], f"{tmp_path}/1/s-008.tar/1.png")
    archive(tmp_path / "{0..1}.tar", {"1.png": png(5)})
    assert reds(opened(tmp_path / "{0..1}.tar")) == [5]
    with pytest.raises(ValueError, match=r"3 of 5 shards are missing: .*011.tar, .*012.tar, .*013.tar$"):
        opened(f"{tmp_path}/0/s-{{009..013}}.tar")
    with pytest.raises(ValueError, match=r"\{5\.\.1\} must run upwards"):
        opened(f"{tmp_path}/{{5..1}}.tar")


def test_few_shards_are_open_at_once_and_other_processes_open_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_OPEN", 2)
    for number in range(4):
        archive(tmp_path / f"{number}.tar", {"1.png": png(number)})
    source = opened(f"{tmp_path}/{{0..3}}.tar")
    assert isinstance(source, archives.TarSource)
    assert [int(source.read(i)[0, 0, 0]) for i in (0, 1, 0, 2, 0, 3)] == [0, 1, 0, 2, 0, 3]
    assert list(source._files) == [0, 3]
    with get_context("fork").Pool(4) as pool:
        assert pool.map(reds, [source] * 8) == [[0, 1, 2, 3]] * 8


@pytest.mark.parametrize(
    ("kind", "golden"),
    [("tar", "tar-2-3bba02540a5bf8882a87d3058684ecc5"), ("zip", "zip-2-6c018492f718655911258cb140414fe6")],
)
def test_the_fingerprint_is_of_the_names_and_in_a_tar_of_the_sizes(tmp_path, kind, golden):
    for name, content, is_same in (("2", "45", True), ("2", "456", kind == "zip"), ("0", "45", False)):
        members = {"1.txt": "!", "1.png": "123", f"{name}.png": content}
        source = opened(archive(tmp_path / f"{name}{content}.{kind}", members))
        assert (source.fingerprint == golden) == is_same


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
        ({"a\\1.png": "", "b\\c\\2.png": "", "b\\c\\2.cls": "z", "a\\1.cls": "y"}, ["y", "z"]),
        (sample("1", json='{"x": [1], "class": " dog "}'), ["dog"]),
        (sample("1", json='{"label": 2.0}') | sample("2", json='{"label": 0.5}'), ["2", "0.5"]),
        (sample("1", json='{"label": true}') | sample("2", json='{"label": null, "cls": 7}'), ["True", "7"]),
        (sample("b/x/1") | sample("./a/2", json='{"x": 1}') | {"b/n.json": "[", "b/.1.cls": "x"}, ["b", "a"]),
    ],
)
def test_labels_come_from_cls_then_json_then_folders(tmp_path, members, expected):
    assert classes(opened(archive(tmp_path / "x.tar", members))) == expected


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
def test_missing_and_unusable_labels_are_told_only_when_asked_for(tmp_path, members, message, caplog):
    caplog.set_level(logging.INFO, logger="nextblock")
    source = opened(archive(tmp_path / "x.tar", members))
    assert not source.has_labels
    assert ("add .cls members" in caplog.text) == ("of its" in message)
    with pytest.raises(ValueError, match=message):
        _ = source.labels


@pytest.mark.parametrize(
    ("tars", "expected", "empty"),
    [
        (
            {"n02": {"1.png": "", "2.png": ""}, "n01": {"1.png": ""}, "n03": {}},
            ["n01", "n02", "n02"],
            ["n03"],
        ),
        ({"a": sample("1", cls="x"), "b": sample("2", cls="y")}, ["x", "y"], []),
        ({"a": {"cat/1.png": ""}, "b": {"dog/2.png": ""}}, ["cat", "dog"], []),
        ({"a": {"all/1.png": ""}, "b": {"all/2.png": ""}}, ["a", "b"], []),
        ({"shard-000000": {"1.png": ""}, "train_003": {"2.png": ""}, "00001": {"2.png": ""}}, None, []),
        ({"only": {"1.png": ""}}, None, []),
    ],
)
def test_each_tar_of_a_directory_is_a_class_unless_it_states_others(tmp_path, tars, expected, empty):
    for name, members in tars.items():
        archive(tmp_path / f"{name}.tar", members)
    (tmp_path / "words.txt").write_text("n01 cat")
    source = opened(tmp_path)
    assert (classes(source) if source.has_labels else None) == expected
    assert expected is None or source.empty_classes() == empty
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="no images in"):
        opened(tmp_path)


def test_the_index_is_kept_while_the_tar_is_the_same_and_a_damaged_one_is_rebuilt(tmp_path, monkeypatch):
    path = archive(tmp_path / "x.tar", {"1.png": png(1), "1.cls": "7"})
    first = opened(path)
    index = tmp_path / "x.tar.nextblock-index"
    with monkeypatch.context() as patch:
        patch.setattr(archives, "build_index", None)
        again = opened(path)
    assert (again.fingerprint, names(again), classes(again)) == (first.fingerprint, ["x.tar/1.png"], ["7"])
    whole = index.read_bytes()
    for broken in (b"", b"nonsense", b"[]\n", whole[:-40], whole[:-20] + b"!" + whole[-19:]):
        index.write_bytes(broken)
        assert reds(opened(path)) == [1]
        assert index.read_bytes() == whole
    assert reds(opened(archive(path, {"2.png": png(2), "3.png": png(3)}, mode="a"))) == [1, 2, 3]


def test_without_a_place_beside_the_tar_the_index_lies_in_the_cache_or_nowhere(tmp_path, monkeypatch):
    path = archive(tmp_path / "x.tar", {"1.png": png(1)})
    path.with_name("x.tar.nextblock-index").mkdir()  # even root cannot put a file in its place
    (tmp_path / "file").touch()
    assert reds(opened(path, cache_dir=str(tmp_path / "file"))) == [1]
    opened(path, cache_dir=str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(archives, "build_index", None)
        assert reds(opened(path, cache_dir=str(tmp_path / "cache"))) == [1]
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless(_: Path) -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "expanduser", homeless)
    assert reds(opened(path)) == [1]
    with pytest.raises(UsageError, match=r"no cache folder \(no home\); set data.cache_dir"):
        archives.cache_dir(DataConfig(), "remote")


CUT = "the header at byte 1,024 is cut off"
ONE, TWO = member("1.png", png(1)), member("2.png", png(2))


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


@pytest.mark.parametrize(
    ("kind", "form"), [("tar", None), ("zip", zipfile.ZIP_STORED), ("zip", zipfile.ZIP_DEFLATED)]
)
def test_a_flipped_byte_or_a_cut_gives_a_bad_image_or_a_refusal_and_never_wrong_bytes(tmp_path, kind, form):
    members = {"n" * 120 + ".png": png(1), "2.png": png(2), "2.txt": b"1"}
    path = archive(tmp_path / f"x.{kind}", members, form)
    whole = path.read_bytes()
    places, ends = [*range(0, len(whole), 3)], range(0, len(whole), 9)
    if kind == "tar":  # which has checksums of headers alone
        places = [*range(0, 512, 7), *range(512, 700, 3), *range(1024, 1536, 7)]
        ends = range(0, 4096, 97)
    contents = [whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :] for at in places]
    contents += [whole[:end] for end in ends]
    bad = refused = 0
    for content in contents:
        path.write_bytes(content)
        try:
            source = opened(path)
            assert all(source.content(index) in members.values() for index in range(len(source)))
        except BadImageError:
            bad += 1
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert 20 < refused < len(contents) - 20
    assert bad > 20 if kind == "zip" else bad == 0


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_archive_that_is_cut_or_gone_since_gives_bad_images(tmp_path, kind):
    path = archive(tmp_path / f"x.{kind}", {"1.png": png(1), "2.png": png(2)})
    source = opened(path)
    os.truncate(path, 50)
    with pytest.raises(BadImageError, match=r"its shard has changed since it was indexed|the zip is damaged"):
        source.read(1)
    path.unlink()
    with pytest.raises(BadImageError, match=r"its (shard|zip) cannot be read: No such file"):
        pickle.loads(pickle.dumps(source)).read(0)


def test_what_is_larger_than_any_image_is_not_read_whatever_size_it_states(tmp_path):
    packed = archive(tmp_path / "x.zip", {"1.png": bytes(100_000_000)}, zipfile.ZIP_DEFLATED)
    (tmp_path / "1.tif").touch()
    (tmp_path / "x.tar").write_bytes(member("1.png", b"", size=2**40))
    for name in ("1.tif", "x.tar"):  # files of holes
        os.truncate(tmp_path / name, 2**40 + 1536)
    for name, size in (("1.tif", 2**40 + 1536), ("x.tar", 2**40), ("x.zip", 10**8)):
        with pytest.raises(BadImageError, match=rf"{size:,} bytes, more than data\.max_pixels"):
            opened(tmp_path / name, max_pixels=1000).read(0)
    content = packed.read_bytes().replace((10**8).to_bytes(4, "little"), (100).to_bytes(4, "little"))
    packed.write_bytes(content)
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadImageError, match="the zip is damaged here"):
        opened(packed).read(0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 50_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.tar", b"", r"is empty \(0 bytes\); fetch or pack it again"),
        ("x.tar", gzip.compress(END, mtime=0), "unpack it if it is compressed"),
        ("x.tar", b"<html>" * 200, r"is not a plain tar, or cut off \(it starts with '<html><h'\)"),
        ("x.tar", END, "no images in .*: it is empty"),
        ("x.tar", member("n01.tar", b"x") + END, "no images in .*unpack a tar of tars"),
        ("x.tar", member("1.png", bytes(9000))[:5000], "ends within '1.png'; 0 images .* pack it again"),
        ("x.zip", b"PK\3\4" + bytes(100), "is not a zip, or damaged: .*; fetch or pack it again"),
    ],
)
def test_what_is_no_archive_of_images_is_refused_with_a_remedy(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / name)


@pytest.mark.parametrize(("place", "value"), [(8, 1), (10, 12)])
def test_encrypted_members_and_other_methods_are_refused_with_a_remedy(tmp_path, place, value):
    path = archive(tmp_path / "x.zip", {"a/1.png": png()})
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\1\2") + place] = value  # in the directory
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"'a/1.png' is encrypted or .*; pack it again by zip -0"):
        opened(path)
