"""Packing: the same images come out of the shards, as bytes or as told; scenes in tiles; cut and gone on."""

from __future__ import annotations

import io
import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nextblock.config import DataConfig
from nextblock.data import BadImageError, Source, TooManyBadImages, decode_image, open_source, scenes
from nextblock.data import pack as packing
from nextblock.data.pack import PackConfig, pack
from nextblock.data.scenes import read_bands, starts
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
    return [path.read_bytes() for path in sorted(folder.glob("*.tar"))]


# ---------------------------------------------------------------------------------------------- bytes


def test_packed_images_keep_their_bytes_order_and_labels(folder, tmp_path, data):
    source = open_source(str(folder), data)
    done = pack(source, tmp_path / "out", CONFIG, data)
    packed = open_source(done.spec, data)
    kept = [index for index in range(8) if not source.name(index).startswith("dog/broken")]
    assert [packed.content(i) for i in range(5)] == [source.content(index) for index in kept]
    assert packed.labels.tolist() == source.labels[kept].tolist()
    assert packed.class_names == source.class_names == ("cat", "dog")
    assert packed.name(1) == "shard-000000.tar/000000001.png"
    assert (done.samples, done.images, done.bad, done.shards) == (5, 8, 3, 1)


def test_what_was_packed_is_written_beside_it(folder, tmp_path, data):
    pack(open_source(str(folder), data), tmp_path / "out", CONFIG, data)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "manifest.json",
        "names.tsv",
        "quarantine.jsonl",
        "shard-000000.tar",
        "shard-000000.tar.nextblock-index",
    ]
    told = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (told["samples"], told["bad"], told["classes"]) == (5, 3, ["cat", "dog"])
    assert told["source"] == str(folder)
    assert (tmp_path / "out" / "names.tsv").read_text().splitlines()[2] == "000000002\tdog/0000.png"
    bad = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [line["name"] for line in bad] == [f"dog/broken_0{n}.png" for n in range(3)]


def test_arrays_are_packed_as_png_which_loses_nothing(tmp_path, data):
    source = open_source("digits:split=test", data)
    packed = open_source(pack(source, tmp_path / "out", CONFIG, data).spec, data)
    assert len(packed) == len(source)
    assert packed.labels.tolist() == source.labels.tolist()
    assert all(torch.equal(packed.read(i), source.read(i)) for i in range(0, len(source), 50))


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_are_the_same_bytes_whatever_the_number_of_workers(folder, tmp_path, data, workers):
    source = open_source(str(folder), data)
    small = replace(CONFIG, shard_mb=0.003)
    assert pack(source, tmp_path / "0", small, data).shards > 1
    pack(source, tmp_path / "n", replace(small, workers=workers), data)
    assert shards(tmp_path / "0") == shards(tmp_path / "n")


def test_shards_stay_within_their_size(tmp_path, data):
    source = open_source("digits:split=test", data)
    done = pack(source, tmp_path / "out", replace(CONFIG, shard_mb=0.1), data)
    sizes = [len(shard) for shard in shards(tmp_path / "out")]
    # A tar ends with two empty blocks and is filled up to a record of 10,240 bytes.
    assert max(sizes) <= 100_000 + 10_240
    assert min(sizes[:-1]) > 90_000
    assert done.num_bytes == sum(sizes)
    assert len(open_source(done.spec, data)) == len(source)


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


@pytest.mark.parametrize(
    ("asked", "starts_with"), [("jpeg", b"\xff\xd8"), ("webp", b"RIFF"), ("png", b"\x89P")]
)
def test_a_format_that_is_asked_for_is_what_all_images_get(folder, tmp_path, data, asked, starts_with):
    config = replace(CONFIG, format=asked, quality=70)
    packed = open_source(pack(open_source(str(folder), data), tmp_path / "out", config, data).spec, data)
    assert all(content(packed, i).startswith(starts_with) for i in range(5))


def test_grey_images_stay_grey(tmp_path, data):
    grey = replace(data, channels=1)
    config = replace(CONFIG, format="jpeg")
    packed = open_source(
        pack(open_source("digits:split=test", grey), tmp_path / "out", config, grey).spec, grey
    )
    assert Image.open(io.BytesIO(content(packed, 0))).mode == "L"


# ---------------------------------------------------------------------------------------------- tiles


def test_tiles_cover_a_length_and_the_last_ends_with_it():
    assert starts(10, 4) == [0, 4, 6]
    assert starts(8, 4) == [0, 4]
    assert starts(3, 4) == [0]
    assert starts(5, 4) == [0, 1]


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


def tiled_tiff(pixels: np.ndarray, tile: int, order: str = "<") -> bytes:
    """An uncompressed TIFF in tiles, written from its definition."""
    height, width, channels = pixels.shape
    padded = np.zeros((-(-height // tile) * tile, -(-width // tile) * tile, channels), dtype=np.uint8)
    padded[:height, :width] = pixels
    tiles = [
        padded[top : top + tile, left : left + tile].tobytes()
        for top in range(0, height, tile)
        for left in range(0, width, tile)
    ]
    numbers = len(tiles)
    body = b"".join(tiles)
    place = 8 + len(body)
    extra = struct.pack(f"{order}{channels}H", *[8] * channels)
    extra += struct.pack(f"{order}{numbers}I", *(8 + i * len(tiles[0]) for i in range(numbers)))
    extra += struct.pack(f"{order}{numbers}I", *[len(tiles[0])] * numbers)
    short, long = 3, 4
    entries = [
        (256, long, 1, width),
        (257, long, 1, height),
        (258, short, channels, place),
        (259, short, 1, 1),
        (262, short, 1, 2),
        (277, short, 1, channels),
        (284, short, 1, 1),
        (322, long, 1, tile),
        (323, long, 1, tile),
        (324, long, numbers, place + 2 * channels),
        (325, long, numbers, place + 2 * channels + 4 * numbers),
    ]
    directory = struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in entries:
        as_short = kind == short and count == 1
        directory += struct.pack(f"{order}HHI", tag, kind, count)
        directory += struct.pack(
            f"{order}HH" if as_short else f"{order}I", *((value, 0) if as_short else (value,))
        )
    start = b"II*\0" if order == "<" else b"MM\0*"
    return start + struct.pack(f"{order}I", place + len(extra)) + body + extra + directory + bytes(4)


def joined(content: bytes, tile: int, data: DataConfig) -> torch.Tensor:
    bands = list(read_bands(content, tile, data))
    joined = torch.zeros((bands[0][1].shape[0], bands[-1][0] + bands[-1][1].shape[1], bands[0][1].shape[2]))
    for top, band in bands:
        joined[:, top : top + band.shape[1]] = band
    return joined.to(torch.uint8)


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiled_tiff_is_read_tile_by_tile(data, order, monkeypatch):
    pixels = noise(70, 90)
    monkeypatch.setattr(scenes, "MAX_SCENE_PIXELS", 32 * 32)  # the whole may not be decoded
    assert torch.equal(
        joined(tiled_tiff(pixels, 32, order), 24, data), torch.from_numpy(pixels).permute(2, 0, 1)
    )


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {"compression": None}),
        ("RGB", {"compression": "tiff_lzw", 317: 2}),
        ("RGB", {"compression": "tiff_adobe_deflate"}),
        ("RGB", {"compression": "jpeg"}),
        ("RGB", {"compression": "zstd"}),
        ("RGBA", {"compression": "tiff_lzw"}),
        ("CMYK", {"compression": "packbits"}),
        ("P", {"compression": "tiff_lzw"}),
        ("L", {"compression": "tiff_lzw"}),
        ("I;16", {"compression": "tiff_lzw"}),
        ("1", {"compression": "group4"}),
    ],
)
def test_a_tiff_in_strips_is_read_strip_by_strip_and_is_what_the_whole_is(data, mode, options, monkeypatch):
    pixels = noise(101, 67)
    pixels[:50] //= 8
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 200)
    else:
        image = Image.fromarray(pixels).convert(mode)
    tags = {278: 8} | {key: value for key, value in options.items() if isinstance(key, int)}
    file = io.BytesIO()
    image.save(file, "TIFF", compression=options["compression"], tiffinfo=tags)
    whole = decode_image(file.getvalue())
    monkeypatch.setattr(scenes, "MAX_SCENE_PIXELS", 8 * 67)
    assert torch.equal(joined(file.getvalue(), 30, data), whole)


def test_a_scene_that_must_be_decoded_whole_has_a_limit(data, monkeypatch):
    file = io.BytesIO()
    Image.fromarray(noise(40, 50)).save(file, "PNG")
    monkeypatch.setattr(scenes, "MAX_SCENE_PIXELS", 1999)
    with pytest.raises(
        BadImageError, match=r"50 x 40 = 2,000 pixels .* the most is 1,999: save it as a tiled"
    ):
        next(read_bands(file.getvalue(), 16, data))


@pytest.mark.parametrize("cut", [100, 3000, -40])
def test_a_scene_that_is_cut_off_is_a_broken_image(data, cut):
    with pytest.raises(BadImageError):
        list(read_bands(tiled_tiff(noise(70, 90), 32)[:cut], 24, data))


def test_a_scene_beyond_max_pixels_is_packed_in_tiles_and_refused_without(tmp_path, data):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "scene.tif").write_bytes(tiled_tiff(noise(70, 90), 32))
    small = replace(data, max_pixels=4096, max_bad_fraction=1.0)
    source = open_source(str(tmp_path / "in"), small)
    assert pack(source, tmp_path / "tiles", replace(CONFIG, tile_px=64), small).samples == 4
    with pytest.raises(ValueError, match="none of its 1 images can be read"):
        pack(source, tmp_path / "whole", CONFIG, small)


# ---------------------------------------------------------------------------------- stopped, gone on with


class StopError(Exception):
    """The test's own."""


@pytest.mark.parametrize("tile_px", [None, 8])
def test_packing_that_is_stopped_goes_on_and_ends_with_the_same_bytes(
    folder, tmp_path, data, tile_px, monkeypatch
):
    source = open_source(str(folder), data)
    config = replace(CONFIG, shard_mb=0.004, tile_px=tile_px)
    pack(source, tmp_path / "whole", config, data)
    add = packing._Writer.add
    calls = 0

    def add_and_stop(*arguments):
        nonlocal calls
        calls += 1
        if calls % 4 == 0:
            raise StopError
        add(*arguments)

    monkeypatch.setattr(packing._Writer, "add", add_and_stop)
    stopped = 0
    while not (tmp_path / "cut" / "manifest.json").exists():
        try:
            pack(source, tmp_path / "cut", config, data)
        except StopError:
            stopped += 1
    assert stopped >= 1
    assert shards(tmp_path / "cut") == shards(tmp_path / "whole")
    for name in ("names.tsv", "quarantine.jsonl", "manifest.json"):
        mine, theirs = ((tmp_path / out / name).read_text() for out in ("cut", "whole"))
        assert mine.replace("/cut", "/whole") == theirs
    assert not (tmp_path / "cut" / "packing.jsonl").exists()


def test_packing_again_does_nothing_and_other_settings_are_refused(folder, tmp_path, data):
    source = open_source(str(folder), data)
    done = pack(source, tmp_path / "out", CONFIG, data)
    written = (tmp_path / "out" / "shard-000000.tar").stat().st_mtime_ns
    assert pack(source, tmp_path / "out", CONFIG, data) == done
    assert (tmp_path / "out" / "shard-000000.tar").stat().st_mtime_ns == written
    with pytest.raises(
        ValueError, match=r"holds shards of other settings \(quality 90, not 80\); give another"
    ):
        pack(source, tmp_path / "out", replace(CONFIG, quality=80), data)


def test_other_settings_of_data_are_other_settings(folder, tmp_path, data):
    source = open_source(str(folder), data)
    pack(source, tmp_path / "out", CONFIG, data)
    for changes, message in (
        ({"max_pixels": 999}, "max_pixels .* not 999"),
        ({"decoder": "pillow"}, "decoder"),
    ):
        with pytest.raises(ValueError, match=rf"shards of other settings \({message}"):
            pack(source, tmp_path / "out", CONFIG, replace(data, **changes))


@pytest.mark.parametrize("fault", ["gone", "shorter"])
def test_a_shard_that_has_gone_since_is_written_again(folder, tmp_path, data, fault, caplog):
    source = open_source(str(folder), data)
    config = replace(CONFIG, shard_mb=0.004)
    done = pack(source, tmp_path / "out", config, data)
    told = (tmp_path / "out" / "manifest.json").read_text()
    written = shards(tmp_path / "out")
    assert len(written) >= 2
    second = tmp_path / "out" / "shard-000001.tar"
    second.unlink() if fault == "gone" else second.write_bytes(second.read_bytes()[:-512])
    assert pack(source, tmp_path / "out", config, data) == done
    assert shards(tmp_path / "out") == written
    assert (tmp_path / "out" / "manifest.json").read_text() == told
    assert "shard-000001.tar has gone or changed; packing goes on from it" in caplog.text


def test_a_shard_of_the_source_that_is_cut_off_is_told(folder, tmp_path, data):
    first = pack(open_source(str(folder), data), tmp_path / "whole", CONFIG, data)
    cut = tmp_path / "cut.tar"
    cut.write_bytes(Path(first.spec).read_bytes()[:3000])
    done = pack(open_source(str(cut), data), tmp_path / "out", CONFIG, data)
    assert done.bad == 0
    (damage,) = done.damage
    assert damage.startswith("cut.tar: the file ends ")
    (line,) = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["name"] == "cut.tar"


def test_a_place_that_cannot_be_written_is_refused_with_its_cause(folder, tmp_path, data, monkeypatch):
    source = open_source(str(folder), data)
    (tmp_path / "list.txt").write_text("a")
    with pytest.raises(ValueError, match=r"list\.txt is a file, and shards are written to a folder"):
        pack(source, tmp_path / "list.txt", CONFIG, data)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(packing.PackError, match="Permission denied; give a folder in which you may write"):
        pack(source, tmp_path / "out", CONFIG, data)


def test_a_folder_of_something_else_is_refused(folder, data):
    with pytest.raises(ValueError, match="is not empty; give a new folder"):
        pack(open_source("digits", data), folder, CONFIG, data)


def test_too_many_broken_images_stop_packing(folder, tmp_path, data):
    strict = replace(data, max_bad_fraction=0.1)
    with pytest.raises(TooManyBadImages, match="1 of 8 files cannot be read"):
        pack(open_source(str(folder), strict), tmp_path / "out", CONFIG, strict)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quality": 0}, "quality is 0; use 1 to 100"),
        ({"resize_px": 0}, "resize_px is 0; use at least 1"),
        ({"resize_px": 8, "tile_px": 8}, "resize_px 8 and tile_px 8 exclude each other"),
        ({"shard_mb": 0}, "shard_mb is 0; use more than 0"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


def test_more_channels_than_a_format_holds_are_refused(tmp_path, data):
    with pytest.raises(ValueError, match=r"data\.channels is 4, and only 1 or 3 can be encoded"):
        pack(
            open_source("digits", data),
            tmp_path / "out",
            replace(CONFIG, format="png"),
            replace(data, channels=4),
        )
