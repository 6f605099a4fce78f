"""Packing: the same images come out of the shards; large scenes in tiles; interrupted and continued."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nextblock.atomic import WriteError
from nextblock.config import DataConfig, PackConfig
from nextblock.data import Source, TooManyBadImages, open_source
from nextblock.data import pack as packing
from nextblock.data.pack import pack
from tiff_files import tiff
from tiny_runs import write_images

CONFIG = PackConfig(workers=0)


@pytest.fixture
def data(tmp_path):
    return DataConfig(cache_dir=str(tmp_path / "cache"), workers=0, max_bad_fraction=0.5)


@pytest.fixture
def folder(tmp_path):
    """Five PNGs in two classes, and three files that cannot be read."""
    write_images(tmp_path / "in" / "cat", 2)
    write_images(tmp_path / "in" / "dog", 3, broken=3)
    return tmp_path / "in"


def noise(height: int, width: int, *, seed: int = 0, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def content(source: Source, index: int) -> bytes:
    found = source.content(index)
    assert found is not None
    return found


def shards(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("shard-*.tar"))]


# ---------------------------------------------------------------------------------------------- bytes


def test_packed_images_keep_their_bytes_order_labels_and_names(folder, tmp_path, data):
    source, out = open_source(str(folder), data), tmp_path / "out"
    done = pack(source, out, CONFIG, data)
    packed = open_source(done.spec, data)
    kept = [index for index in range(8) if not source.name(index).startswith("dog/broken")]
    assert [packed.content(i) for i in range(5)] == [source.content(index) for index in kept]
    assert packed.labels.tolist() == source.labels[kept].tolist()
    assert packed.class_names == ("cat", "dog")
    assert packed.name(1) == "shard-000000.tar/000000001.png"
    assert (done.samples, done.images, done.bad, done.shards) == (5, 8, 3, 1)
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["images"], manifest["bad"], manifest["classes"]) == (8, 3, ["cat", "dog"])
    assert (out / "names.tsv").read_text().splitlines()[2] == "000000002\tdog/0000.png"
    assert (out / "shard-000000.tar.nextblock-index").exists()
    bad = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [line["name"] for line in bad] == [f"dog/broken_0{n}.png" for n in range(3)]


# --------------------------------------------------------------------------------------------- pixels


def test_images_are_shrunk_to_the_shorter_side_and_small_ones_keep_their_bytes(tmp_path, data):
    (tmp_path / "in").mkdir()
    Image.fromarray(noise(60, 90)).save(tmp_path / "in" / "a.png")
    Image.fromarray(noise(20, 90)).save(tmp_path / "in" / "b.png")
    source = open_source(str(tmp_path / "in"), data)
    packed = open_source(pack(source, tmp_path / "out", replace(CONFIG, resize_px=30), data).spec, data)
    assert packed.read(0).shape == (3, 30, 45)
    assert content(packed, 0)[:2] == b"\xff\xd8"
    assert packed.content(1) == source.content(1)
    config = replace(CONFIG, format="webp", quality=70)
    packed = open_source(pack(source, tmp_path / "webp", config, data).spec, data)
    assert content(packed, 0)[:4] == content(packed, 1)[:4] == b"RIFF"


# ---------------------------------------------------------------------------------------------- tiles


def test_a_scene_is_cut_into_tiles_that_show_all_of_it(tmp_path, data):
    (tmp_path / "in" / "field").mkdir(parents=True)
    scene = noise(50, 70)
    Image.fromarray(scene).save(tmp_path / "in" / "field" / "a.png")
    Image.fromarray(noise(32, 20)).save(tmp_path / "in" / "field" / "b.png")
    source = open_source(str(tmp_path / "in"), data)
    done = pack(source, tmp_path / "out", replace(CONFIG, tile_px=32, format="png"), data)
    packed = open_source(done.spec, data)
    assert (done.samples, done.images) == (2 * 3 + 1, 2)
    names = [packed.name(i).rpartition("/")[2] for i in range(7)]
    assert names[:4] == [
        f"000000000_{place}.png"
        for place in ("000000_000000", "000000_000032", "000000_000038", "000018_000000")
    ]
    rebuilt = np.zeros_like(scene)
    for index, name in enumerate(names[:6]):
        top, left = (int(number) for number in name.removesuffix(".png").split("_")[1:])
        rebuilt[top : top + 32, left : left + 32] = packed.read(index).permute(1, 2, 0).numpy()
    assert np.array_equal(rebuilt, scene)
    assert packed.labels.tolist() == [0] * 7


# ------------------------------------------------------------------------------------- interrupted packing


class StopError(Exception):
    """The test's own."""


def test_shards_stay_within_their_size_and_are_the_same_bytes_whatever_the_number_of_workers(tmp_path, data):
    source, config = open_source("digits:split=test", data), replace(CONFIG, shard_mb=0.1)
    done = pack(source, tmp_path / "0", config, data)
    pack(source, tmp_path / "2", replace(config, workers=2), data)
    assert shards(tmp_path / "0") == shards(tmp_path / "2")
    # A tar ends with two empty blocks and is filled up to a record of 10,240 bytes.
    sizes = [len(shard) for shard in shards(tmp_path / "0")]
    assert max(sizes) <= 100_000 + 10_240
    assert min(sizes[:-1]) > 90_000
    packed = open_source(done.spec, data)
    assert packed.labels.tolist() == source.labels.tolist()
    assert all(torch.equal(packed.read(i), source.read(i)) for i in range(0, len(source), 50))


@pytest.mark.parametrize("tile_px", [None, 8])
def test_packing_that_is_interrupted_continues_and_ends_with_the_same_bytes(
    folder, tmp_path, data, tile_px, monkeypatch
):
    source = open_source(str(folder), data)
    config = replace(CONFIG, shard_mb=0.004, tile_px=tile_px)
    pack(source, tmp_path / "whole", config, data)
    encode = packing._Encoder.__call__
    for most in range(1, 8):
        left = iter(range(most))

        def encode_and_stop(*arguments, left=left):
            if next(left, None) is None:
                raise StopError
            return encode(*arguments)

        monkeypatch.setattr(packing._Encoder, "__call__", encode_and_stop)
        with contextlib.suppress(StopError):
            pack(source, tmp_path / "cut", config, data)
    assert shards(tmp_path / "cut") == shards(tmp_path / "whole")
    for name in ("names.tsv", "quarantine.jsonl", "manifest.json"):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert not list((tmp_path / "cut").glob(".writing*"))


def test_packing_again_reads_the_result_and_other_settings_are_refused(folder, tmp_path, data):
    source = open_source(str(folder), data)
    done = pack(source, tmp_path / "out", CONFIG, data)
    written = (tmp_path / "out" / "shard-000000.tar").stat().st_mtime_ns
    assert pack(source, tmp_path / "out", CONFIG, data) == done
    assert (tmp_path / "out" / "shard-000000.tar").stat().st_mtime_ns == written
    for config, changes, message in (
        (replace(CONFIG, quality=80), {}, "quality 90, not 80"),
        (CONFIG, {"max_pixels": 999}, "max_pixels .* not 999"),
        (CONFIG, {"background": "black"}, "background 'white', not 'black'"),
    ):
        with pytest.raises(ValueError, match=rf"shards of other settings \({message}\); give another"):
            pack(source, tmp_path / "out", config, replace(data, **changes))


def test_a_shard_that_is_lost_or_cut_is_written_again(folder, tmp_path, data, caplog):
    source = open_source(str(folder), data)
    config = replace(CONFIG, shard_mb=0.004)
    done = pack(source, tmp_path / "out", config, data)
    manifest = (tmp_path / "out" / "manifest.json").read_text()
    written = shards(tmp_path / "out")
    assert len(written) >= 2
    second = tmp_path / "out" / "shard-000001.tar"
    for lose in (second.unlink, lambda: second.write_bytes(second.read_bytes()[:-512])):
        lose()
        assert pack(source, tmp_path / "out", config, data) == done
        assert shards(tmp_path / "out") == written
    assert (tmp_path / "out" / "manifest.json").read_text() == manifest
    assert "shard-000001.tar is missing or has changed; packing continues from it" in caplog.text


def test_images_that_became_readable_are_packed_and_a_cut_source_is_told(folder, tmp_path, data):
    strict = replace(data, max_bad_fraction=0.01)
    with pytest.raises(TooManyBadImages, match="2 of 8 files cannot be read"):
        pack(open_source(str(folder), strict), tmp_path / "out", CONFIG, strict)
    for path in folder.glob("dog/broken*"):
        path.write_bytes((folder / "dog" / "0000.png").read_bytes())
    done = pack(open_source(str(folder), strict), tmp_path / "out", CONFIG, strict)
    assert (done.samples, done.bad) == (8, 0)
    assert not (tmp_path / "out" / "quarantine.jsonl").read_text()
    cut = tmp_path / "cut.tar"
    cut.write_bytes(Path(done.spec).read_bytes()[:3000])
    done = pack(open_source(str(cut), data), tmp_path / "again", CONFIG, data)
    assert (done.bad, done.damage[0][:22]) == (0, "cut.tar: the file ends")


def test_classes_of_which_no_image_can_be_read_are_named(folder, tmp_path, data, caplog):
    for path in (folder / "dog").glob("0*"):
        path.unlink()
    (folder / "owl").mkdir()
    pack(open_source(str(folder), data), tmp_path / "out", CONFIG, replace(data, max_bad_fraction=1.0))
    assert "out: no image of 2 classes: dog, owl" in caplog.text


def test_a_folder_of_something_else_is_refused(folder, data):
    with pytest.raises(ValueError, match="contains something else; give a new folder"):
        pack(open_source("digits", data), folder, CONFIG, data)
    assert sorted(path.name for path in folder.iterdir()) == ["cat", "dog"]  # nor is it marked as output


def test_a_scene_beyond_max_pixels_or_cut_off_is_unreadable_and_nothing_of_it_is_packed(tmp_path, data):
    (tmp_path / "in").mkdir()
    whole = tiff(noise(70, 90), photometric=2, rows=8, deflate=True)
    (tmp_path / "in" / "a.tif").write_bytes(whole[:-2000])
    (tmp_path / "in" / "b.tif").write_bytes(whole)
    Image.fromarray(noise(100, 100)).save(tmp_path / "in" / "c.png")
    data = replace(data, max_pixels=6300, max_bad_fraction=1.0)
    done = pack(open_source(str(tmp_path / "in"), data), tmp_path / "out", replace(CONFIG, tile_px=24), data)
    assert (done.bad, done.samples) == (2, 3 * 4)
    assert "100 x 100 = 10,000 pixels, more than" in (tmp_path / "out" / "quarantine.jsonl").read_text()


def test_a_full_disk_keeps_whole_shards(folder, tmp_path, data, monkeypatch):
    source, config = open_source(str(folder), data), replace(CONFIG, shard_mb=0.004)
    add = packing.tarfile.TarFile.addfile

    def add_until_full(tar, head, file):
        if head.name.startswith("000000003"):
            raise OSError(28, "No space left on device")
        add(tar, head, file)

    monkeypatch.setattr(packing.tarfile.TarFile, "addfile", add_until_full)
    with pytest.raises(WriteError, match=r"No space left on device.*run the same command again"):
        pack(source, tmp_path / "out", config, data)
    kept = shards(tmp_path / "out")
    assert kept
    monkeypatch.undo()
    pack(source, tmp_path / "out", config, data)
    assert shards(tmp_path / "out")[: len(kept)] == kept
