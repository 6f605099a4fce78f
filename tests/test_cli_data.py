"""`nextblock data`: what pack, sample and split write and print, and how they refuse."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from nextblock.config import DataConfig
from nextblock.data import open_source
from tiny_runs import call_cli, refused, write_images

DATA = DataConfig(workers=0)


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "in" / "cat", 8)
    write_images(tmp_path / "in" / "dog", 4)
    return tmp_path / "in"


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
    assert left_out.startswith("1 of 13 cannot be read: ")
    source = open_source(json.loads(result)["spec"], DATA)
    assert np.bincount(source.labels).tolist() == [8, 4]


def test_paths_may_begin_with_the_home_folder(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert call_cli(capsys, "data", "pack", "~/in", "~/out", "--workers", "0")[0] == 0
    assert (tmp_path / "out" / "shard-000000.tar").exists()
    assert call_cli(capsys, "data", "split", "~/in", "--parts", "a=0.5", "--out", "~/p")[0] == 0
    assert (tmp_path / "p" / "a.txt").exists()
    code, told, _ = call_cli(capsys, "data", "sample", "~/in", "~/l.txt", "--per_class", "3", "--json")
    spec = f"files:{tmp_path / 'l.txt'}"
    assert (code, json.loads(told.splitlines()[-1])) == (0, {"spec": spec, "images": 6, "of": 12})
    assert open_source(spec, DATA).labels.tolist() == [0] * 3 + [1] * 3


def test_names_that_are_no_text_are_printed_escaped(capsys, tmp_path):
    out = tmp_path / os.fsdecode(b"l\xff\n.txt")
    code, told, _ = call_cli(capsys, "data", "sample", "digits", out, "--count", "3", "--json")
    assert code == 0
    assert told.splitlines()[0].endswith(r"l\xff\n.txt")
    assert json.loads(told.splitlines()[1])["spec"] == f"subset:{out}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("pakc",), "unknown command 'pakc'; did you mean 'pack'?"),
        (("pack", "digits"), "DST must be given"),
        (("pack", "digits", "{tmp}/out", "--tile", "5"), "unknown setting --tile; did you mean --tile_px?"),
        (("pack", "digits", "{tmp}/out", "--resize_px", "8", "--tile_px", "8"), "either resize_px or tile"),
        (("sample", "digits", "{tmp}/l.txt"), "give one of --fraction, --count and --per_class"),
        (("sample", "digits", "{tmp}/l.txt", "--count", "0"), "cannot draw 0 of 1,797 images"),
        (("sample", "digits", "{tmp}/l.txt", "--fraction", "10"), "fraction is '10'; it must be"),
        (("sample", "digits", "{tmp}/there.txt", "--count", "3"), "there.txt exists already; remove it"),
        (("split", "digits", "--out", "{tmp}/p"), "--parts must be given"),
        (("split", "digits", "--out", "{tmp}/p", "--parts", "a/b=0.5"), "'a/b=0.5' is wrong"),
        (("split", "digits", "--out", "{tmp}/p", "--parts", "a=0.5,a=0.5"), "'a=0.5' is wrong"),
        (("split", "digits", "--out", "{tmp}/p", "--parts", "a=0.9,b=0.2"), "add up to at most 1"),
    ],
)
def test_wrong_usage_is_refused_in_one_line(capsys, tmp_path, words, message):
    (tmp_path / "there.txt").write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert message in refused(call_cli(capsys, "data", *(word.format(tmp=tmp_path) for word in words)))
    assert sorted(tmp_path.rglob("*")) == before
