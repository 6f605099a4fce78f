"""Packing: the same images come out of the shards; large scenes in tiles; interrupted and continued."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nextblock.atomic import WriteError
from nextblock.config import DataConfig, PackConfig
from nextblock.data import TooManyBadImages, open_source
from nextblock.data import pack as packing
from nextblock.data.pack import Packed, pack
from tiff_files import tiff
from tiny_runs import call_cli, write_images

DATA = DataConfig(workers=0, max_bad_fraction=0.5)
SMALL = 0.004
"""Megabytes of shards of two or three images."""


@pytest.fixture
def folder(tmp_path):
    """Five PNGs in two classes, and three files that cannot be read."""
    write_images(tmp_path / "in" / "cat", 2)
    write_images(tmp_path / "in" / "dog", 3, broken=3)
    return tmp_path / "in"


def packed(spec: object, out: Path, data: DataConfig = DATA, **settings: Any) -> Packed:
    return pack(open_source(str(spec), data), out, PackConfig(**{"workers": 0, **settings}), data)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def saved(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def shards(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("shard-*.tar"))]


def test_packed_images_keep_their_bytes_order_labels_and_names(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ("data", "pack", "~/in", "~/out", "--workers", "0", "--data.max_bad_fraction", "0.5", "--json")
    code, told, _ = call_cli(capsys, *words)
    line, left_out, result = told.splitlines()
    assert (code, line[:22], left_out[:24]) == (0, "5 images in 1 shard, 0", "3 of 8 cannot be read: /")
    done, out = json.loads(result), tmp_path / "out"
    assert [done[name] for name in ("samples", "images", "bad", "shards")] == [5, 8, 3, 1]
    source, shard = open_source(str(folder), DATA), open_source(done["spec"], DATA)
    kept = [index for index in range(8) if not source.name(index).startswith("dog/broken")]
    assert [shard.content(i) for i in range(5)] == [source.content(index) for index in kept]
    assert shard.labels.tolist() == source.labels[kept].tolist()
    assert shard.class_names == ("cat", "dog")
    assert shard.name(1) == "shard-000000.tar/000000001.png"
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["images"], manifest["bad"], manifest["classes"]) == (8, 3, ["cat", "dog"])
    assert (out / "names.tsv").read_text().splitlines()[2] == "000000002\tdog/0000.png"
    assert (out / "shard-000000.tar.nextblock-index").exists()
    bad = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [line["name"] for line in bad] == [f"dog/broken_0{n}.png" for n in range(3)]


def test_images_are_shrunk_to_the_shorter_side_and_small_ones_keep_their_bytes(capsys, tmp_path):
    saved(tmp_path / "in" / "a.png", noise(60, 90))
    saved(tmp_path / "in" / "b.png", noise(20, 90))
    shrunk = open_source(packed(tmp_path / "in", tmp_path / "out", resize_px=30).spec, DATA)
    assert shrunk.read(0).shape == (3, 30, 45)
    assert (shrunk.content(0) or b"")[:2] == b"\xff\xd8"
    assert shrunk.content(1) == (tmp_path / "in" / "b.png").read_bytes()
    words = ("data", "pack", tmp_path / "in", tmp_path / "webp", "--format", "webp", "--quality", "70")
    assert call_cli(capsys, *words, "--workers", "0")[0] == 0
    webp = open_source(str(tmp_path / "webp" / "shard-000000.tar"), DATA)
    assert [(webp.content(index) or b"")[:4] for index in range(2)] == [b"RIFF"] * 2


def test_a_scene_is_cut_into_tiles_that_show_all_of_it(tmp_path):
    scene = noise(50, 70)
    saved(tmp_path / "in" / "field" / "a.png", scene)
    saved(tmp_path / "in" / "field" / "b.png", noise(32, 20))
    done = packed(tmp_path / "in", tmp_path / "out", tile_px=32, format="png")
    tiles = open_source(done.spec, DATA)
    assert (done.samples, done.images) == (2 * 3 + 1, 2)
    names = [tiles.name(i).rpartition("/")[2] for i in range(7)]
    places = ("000000_000000", "000000_000032", "000000_000038", "000018_000000")
    assert names[:4] == [f"000000000_{place}.png" for place in places]
    rebuilt = np.zeros_like(scene)
    for index, name in enumerate(names[:6]):
        top, left = (int(number) for number in name.removesuffix(".png").split("_")[1:])
        rebuilt[top : top + 32, left : left + 32] = tiles.read(index).permute(1, 2, 0).numpy()
    assert np.array_equal(rebuilt, scene)
    assert tiles.labels.tolist() == [0] * 7


def test_shards_stay_within_their_size_and_are_the_same_bytes_whatever_the_number_of_workers(tmp_path):
    spec = "digits:split=test"
    done = packed(spec, tmp_path / "0", shard_mb=0.1)
    packed(spec, tmp_path / "2", shard_mb=0.1, workers=2)
    assert shards(tmp_path / "0") == shards(tmp_path / "2")
    # A tar ends with two empty blocks and is filled up to a record of 10,240 bytes.
    sizes = [len(shard) for shard in shards(tmp_path / "0")]
    assert max(sizes) <= 100_000 + 10_240
    assert min(sizes[:-1]) > 90_000
    source, digits = open_source(spec, DATA), open_source(done.spec, DATA)
    assert digits.labels.tolist() == source.labels.tolist()
    assert all(torch.equal(digits.read(i), source.read(i)) for i in range(0, len(source), 50))


@pytest.mark.parametrize("tile_px", [None, 8])
@pytest.mark.parametrize("fault", [ArithmeticError(), OSError(28, "No space left on device")])
def test_interrupted_packing_ends_with_the_same_bytes(folder, tmp_path, tile_px, fault, monkeypatch, caplog):
    packed(folder, tmp_path / "whole", shard_mb=SMALL, tile_px=tile_px)
    is_full = isinstance(fault, OSError)
    place, name = (packing.tarfile.TarFile, "addfile") if is_full else (packing._Encoder, "__call__")
    call, told = getattr(place, name), []
    for most in range(1, 20):
        left = iter(range(most))

        def call_or_fail(*arguments, left=left):
            if next(left, None) is None:
                raise fault
            return call(*arguments)

        monkeypatch.setattr(place, name, call_or_fail)
        try:
            packed(folder, tmp_path / "cut", shard_mb=SMALL, tile_px=tile_px)
        except (ArithmeticError, WriteError) as error:
            told.append(str(error))
            if shards(tmp_path / "cut"):
                open_source(str(tmp_path / "cut"), DATA)
    assert len(told) > 2
    assert "cut lacks images: `data pack` was interrupted; the same command continues it" in caplog.text
    caplog.clear()
    open_source(str(tmp_path / "cut"), DATA)
    assert "interrupted" not in caplog.text
    if is_full:
        assert all("No space left" in one and "run the same command again" in one for one in told)
    assert shards(tmp_path / "cut") == shards(tmp_path / "whole")
    for file in ("names.tsv", "quarantine.jsonl", "manifest.json"):
        assert (tmp_path / "cut" / file).read_text() == (tmp_path / "whole" / file).read_text()
    assert not list((tmp_path / "cut").glob(".writing*"))


def test_packing_again_reads_the_result_and_other_settings_or_contents_are_refused(folder, tmp_path):
    done = packed(folder, tmp_path / "out")
    written = (tmp_path / "out" / "shard-000000.tar").stat().st_mtime_ns
    assert packed(folder, tmp_path / "out") == done
    assert (tmp_path / "out" / "shard-000000.tar").stat().st_mtime_ns == written
    for settings, changes, message in (
        ({"quality": 80}, {}, "quality 90, not 80"),
        ({}, {"max_pixels": 999}, "max_pixels .* not 999"),
        ({}, {"background": "black"}, "background 'white', not 'black'"),
    ):
        with pytest.raises(ValueError, match=rf"shards of other settings \({message}\); give another"):
            packed(folder, tmp_path / "out", replace(DATA, **changes), **settings)
    with pytest.raises(ValueError, match="contains something else; give a new folder"):
        packed("digits", folder)
    assert sorted(path.name for path in folder.iterdir()) == ["cat", "dog"]  # nor is it marked as output


def test_other_labels_are_another_result_and_those_that_a_shard_would_change_are_refused(folder, tmp_path):
    paths = sorted(str(path) for path in folder.rglob("*.png"))
    (tmp_path / "l.txt").write_text("\n".join(paths))
    packed(f"files:{tmp_path / 'l.txt'}", tmp_path / "out")
    (tmp_path / "l.txt").write_text("".join(f"{path}\tx\n" for path in paths))
    with pytest.raises(ValueError, match=r"shards of other settings \(labels None, not '\w{16}'\)"):
        packed(f"files:{tmp_path / 'l.txt'}", tmp_path / "out")
    (folder / "cat").rename(folder / "dog ")
    with pytest.raises(ValueError, match=r"the class 'dog ' would be lost: .* rename it"):
        packed(folder, tmp_path / "again")
    with pytest.raises(ValueError, match="has braces, which would be read as numbers"):
        packed("digits", tmp_path / "x{1..2}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "l.txt", "out"]


@pytest.mark.parametrize(
    "damage",
    [
        {"shards": [1]},
        {"shards": [{"name": "shard-000000.tar"}]},
        {"settings": 3},
        {"samples": ...},
        {"finished": ...},
    ],
)
def test_a_damaged_manifest_is_named_and_nothing_is_overwritten(folder, tmp_path, damage):
    packed(folder, tmp_path / "out")
    written, path = shards(tmp_path / "out"), tmp_path / "out" / "manifest.json"
    values = json.loads(path.read_text()) | damage
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged \(.*\); remove .*out"):
        packed(folder, tmp_path / "out")
    assert shards(tmp_path / "out") == written


def test_a_shard_that_is_lost_or_cut_is_written_again(folder, tmp_path, caplog):
    done = packed(folder, tmp_path / "out", shard_mb=SMALL)
    manifest = (tmp_path / "out" / "manifest.json").read_text()
    written = shards(tmp_path / "out")
    second = tmp_path / "out" / "shard-000001.tar"
    for lose in (second.unlink, lambda: second.write_bytes(second.read_bytes()[:-512])):
        lose()
        assert packed(folder, tmp_path / "out", shard_mb=SMALL) == done
        assert shards(tmp_path / "out") == written
    assert (tmp_path / "out" / "manifest.json").read_text() == manifest
    assert "shard-000001.tar is missing or has changed; packing continues from it" in caplog.text


def test_images_that_became_readable_are_packed_and_a_cut_source_is_told(folder, tmp_path):
    strict = replace(DATA, max_bad_fraction=0.01)
    with pytest.raises(TooManyBadImages, match="2 of 8 files cannot be read"):
        packed(folder, tmp_path / "out", strict)
    quarantine = tmp_path / "out" / "quarantine.jsonl"
    noted = quarantine.read_text()
    quarantine.write_text("{}\n")
    with pytest.raises(ValueError, match=r"quarantine\.jsonl, line 1, is damaged"):
        packed(folder, tmp_path / "out", strict)
    quarantine.write_text(noted)
    for path in folder.glob("dog/broken*"):
        path.write_bytes((folder / "dog" / "0000.png").read_bytes())
    done = packed(folder, tmp_path / "out", strict)
    assert (done.samples, done.bad) == (8, 0)
    assert not quarantine.read_text()
    (tmp_path / "cut.tar").write_bytes(Path(done.spec).read_bytes()[:3000])
    done = packed(tmp_path / "cut.tar", tmp_path / "again")
    assert (done.bad, done.damage[0][:22]) == (0, "cut.tar: the file ends")


def test_classes_of_which_no_image_can_be_read_are_named(folder, tmp_path, caplog):
    for path in (folder / "dog").glob("0*"):
        path.unlink()
    (folder / "owl").mkdir()
    packed(folder, tmp_path / "out", replace(DATA, max_bad_fraction=1.0))
    assert "out: no image of 2 classes: dog, owl" in caplog.text


def test_a_scene_beyond_max_pixels_or_cut_off_is_unreadable_and_nothing_of_it_is_packed(tmp_path):
    whole = tiff(noise(70, 90), photometric=2, rows=8, deflate=True)
    saved(tmp_path / "in" / "c.png", noise(100, 100))
    (tmp_path / "in" / "a.tif").write_bytes(whole[:-2000])
    (tmp_path / "in" / "b.tif").write_bytes(whole)
    data = replace(DATA, max_pixels=6300, max_bad_fraction=1.0)
    done = packed(tmp_path / "in", tmp_path / "out", data, tile_px=24)
    assert (done.bad, done.samples) == (2, 3 * 4)
    assert "100 x 100 = 10,000 pixels, more than" in (tmp_path / "out" / "quarantine.jsonl").read_text()
