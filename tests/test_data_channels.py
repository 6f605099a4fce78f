"""Grey, alpha and many bands: from files of every layout to the encoder, the loss and the pictures."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from nextblock.cli.arguments import resolve
from nextblock.cli.pretrain import pretrain
from nextblock.config import DataConfig
from nextblock.data import BadImageError, decode_image, open_source
from nextblock.evaluate.probe.config import ProbeConfig
from nextblock.evaluate.probe.run import probe
from nextblock.interop import load_model
from test_data_decode import encode, exif, photo, pixels, png_16, sixteen_bits
from tiny_runs import TINY, TINY_FLAGS, Quiet, call_cli, refused

RAW_TAG, JPEG_TAG = (struct.pack("<HHII", 259, 4, 1, compression) for compression in (1, 7))
LUMA = torch.tensor([19595, 38470, 7471]).view(3, 1, 1)


def bands(channels: int, bits: int = 8, height: int = 21, width: int = 37) -> np.ndarray:
    values = np.random.default_rng(channels).integers(0, 2**bits, (height, width, channels))
    return values.astype(f"u{bits // 8}")


def tiff(
    values: np.ndarray,
    *,
    order: str = "<",
    planar: bool = False,
    tile: tuple[int, int] | None = None,
    rows: int | None = None,
    deflate: bool = False,
    predictor: int = 1,
    photometric: int = 1,
    extra: tuple[int, ...] = (),
    orientation: int = 1,
    big: bool = False,
    sample_format: int = 1,
) -> bytes:
    """A TIFF file written by hand, of every layout that Pillow does not write."""
    height, width, channels = values.shape
    high, wide = tile or (rows or height, width)
    planes = [values[..., i : i + 1] for i in range(channels)] if planar else [values]
    segments = []
    for plane in planes:
        for top in range(0, height, high):
            for left in range(0, width, wide):
                part = plane[top : top + high, left : left + wide]
                if tile:
                    part = np.pad(part, ((0, high - part.shape[0]), (0, wide - part.shape[1]), (0, 0)))
                if predictor == 2:
                    part = np.concatenate([part[:, :1], part[:, 1:] - part[:, :-1]], axis=1)
                data = part.astype(f"{order}u{part.itemsize}").tobytes()
                segments.append(zlib.compress(data) if deflate else data)
    offsets, place = [], 16
    for segment in segments:
        offsets.append(place)
        place += len(segment)
    counts = [len(segment) for segment in segments]
    tags: dict[int, list[int]] = {
        256: [width],
        257: [height],
        258: [values.itemsize * 8] * channels,
        259: [8 if deflate else 1],
        262: [photometric],
        274: [orientation],
        277: [channels],
        284: [2 if planar else 1],
        317: [predictor],
        339: [sample_format] * channels,
        324 if tile else 273: offsets,
        325 if tile else 279: counts,
    }
    tags |= {322: [wide], 323: [high]} if tile else {278: [high]}
    tags |= {338: list(extra)} if extra else {}
    return _tiff_file(b"".join(segments), tags, order, big=big)


def _tiff_file(body: bytes, tags: dict[int, list[int]], order: str, *, big: bool) -> bytes:
    word, number = ("Q", "Q") if big else ("I", "H")
    room = 8 if big else 4
    directory, spare = struct.pack(order + number, len(tags)), b""
    after = 16 + len(body) + len(directory) + len(tags) * (12 + (8 if big else 0)) + room
    for tag, values in sorted(tags.items()):
        data = struct.pack(f"{order}{len(values)}I", *values)
        if len(data) > room:
            spare, data = spare + data, struct.pack(order + word, after + len(spare))
        directory += struct.pack(f"{order}HH{word}", tag, 4, len(values)) + data.ljust(room, b"\0")
    start = {"<": b"II", ">": b"MM"}[order]
    start += struct.pack(order + "HHHQ", 43, 8, 0, 16 + len(body)) if big else b""
    start += b"" if big else struct.pack(order + "HI", 42, 16 + len(body)) + b"\0" * 8
    return start + body + directory + b"\0" * room + spare


def as_bytes(values: np.ndarray) -> torch.Tensor:
    scaled = values if values.dtype == np.uint8 else np.rint(values / 257).astype(np.uint8)
    return torch.from_numpy(np.ascontiguousarray(scaled.transpose(2, 0, 1)))


# ------------------------------------------------------------------------------------------------------- grey


@pytest.mark.parametrize("decoder", ["auto", "pillow"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_grey_of_a_colour_picture_is_its_luma(kind, decoder) -> None:
    content = encode(photo(), kind)
    colour = decode_image(content, decoder=decoder)
    expected = (colour.long() * LUMA).sum(0, keepdim=True) + 0x8000 >> 16
    assert torch.equal(decode_image(content, decoder=decoder, channels=1).long(), expected)


@pytest.mark.parametrize("mode", ["L", "1", "LA"])
def test_grey_of_a_grey_picture_is_the_picture(mode) -> None:
    content = encode(photo().convert(mode))
    assert torch.equal(decode_image(content, channels=1), decode_image(content)[:1])


def test_grey_of_16_bits_is_scaled() -> None:
    values = sixteen_bits(9, 11, 1)
    assert torch.equal(decode_image(png_16(values), channels=1), as_bytes(values))


def test_grey_turns_with_its_orientation() -> None:
    content = encode(photo().convert("L"), "JPEG", exif=exif(6))
    assert decode_image(content, channels=1).shape == (1, 53, 37)


# --------------------------------------------------------------------------------- alpha as a further channel


def test_alpha_is_the_fourth_channel_where_four_are_asked_for() -> None:
    image = photo()
    image.putalpha(photo(seed=1).convert("L"))
    for kind, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})):
        found = decode_image(encode(image, kind, **options), channels=4)
        assert torch.equal(found, as_bytes(np.array(image)))


@pytest.mark.parametrize("channels", [2, 4])
def test_16_bit_alpha_is_a_channel_too_and_not_composited(channels) -> None:
    values = sixteen_bits(9, 11, channels)
    assert torch.equal(decode_image(png_16(values), channels=channels), as_bytes(values))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (encode(photo()), 3),
        (encode(photo().convert("L")), 1),
        (encode(photo().convert("P")), 3),
        (encode(photo(), "JPEG"), 3),
        (encode(photo().convert("LA")), 2),
        (png_16(sixteen_bits(4, 4, 2)), 2),
        (tiff(bands(5)), 5),
    ],
)
def test_another_number_of_channels_is_a_bad_image_with_both_numbers(content, found) -> None:
    with pytest.raises(BadImageError, match=rf"has {found} channels?, data.channels is 4"):
        decode_image(content, channels=4)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("number", [5, 13])
def test_bands_are_neither_colour_nor_grey(channels, number) -> None:
    with pytest.raises(BadImageError, match=rf"has {number} channels, data.channels is {channels}"):
        decode_image(tiff(bands(number)), channels=channels)


# ---------------------------------------------------------------------------------------------- bands of TIFF

LAYOUTS = {
    "one strip": {},
    "strips": {"rows": 4},
    "tiles": {"tile": (16, 32)},
    "planes": {"planar": True},
    "planes of strips": {"planar": True, "rows": 8},
    "planes of tiles": {"planar": True, "tile": (16, 16)},
    "deflate": {"deflate": True, "rows": 6},
    "deflated tiles with predictor": {"deflate": True, "tile": (16, 16), "predictor": 2},
    "planes with predictor": {"deflate": True, "planar": True, "predictor": 2, "rows": 5},
    "raw with predictor": {"predictor": 2},
    "BigTIFF": {"big": True, "rows": 4},
    "RGB and others": {"photometric": 2, "extra": (0,)},
}


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    ("layout", "order"),
    [(layout, order) for layout in LAYOUTS for order in "<>" if layout + order != "BigTIFF>"],
)
def test_bands_of_every_layout_come_as_they_are_stored(layout, bits, order) -> None:
    for channels in (2, 4, 6):
        values = bands(channels, bits)
        content = tiff(values, order=order, **LAYOUTS[layout])
        assert torch.equal(decode_image(content, channels=channels), as_bytes(values))


@pytest.mark.parametrize(
    "compression", ["tiff_lzw", "packbits", "tiff_adobe_deflate", "tiff_deflate", "zstd"]
)
def test_whatever_packs_losslessly_is_unpacked(compression) -> None:
    image = Image.fromarray(bands(4))
    content = encode(image, "TIFF", compression=compression)
    assert torch.equal(decode_image(content, channels=4), as_bytes(bands(4)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_bands_turn_as_colours_do(orientation) -> None:
    values = bands(4)
    turned = encode(Image.fromarray(values[..., :3]), "PNG", exif=exif(orientation))
    content = tiff(values, orientation=orientation)
    assert torch.equal(decode_image(content, channels=4)[:3], decode_image(turned))


def test_three_bands_that_are_no_colours_are_taken_as_three_channels() -> None:
    for bits in (8, 16):
        assert torch.equal(decode_image(tiff(bands(3, bits))), as_bytes(bands(3, bits)))


@pytest.mark.parametrize(
    "layout", [{}, {"planar": True}, {"tile": (16, 16), "deflate": True, "predictor": 2}]
)
def test_16_bit_colour_tiff_is_scaled_to_the_nearest_level(layout) -> None:
    values = bands(3, 16)
    assert torch.equal(decode_image(tiff(values, photometric=2, **layout)), as_bytes(values))


@pytest.mark.parametrize(("kind", "extra"), [(2, 2), (2, 1), (2, 0), (1, 2), (1, 1)])
def test_16_bit_tiff_with_alpha_is_composited_over_white(kind, extra) -> None:
    number = 3 if kind == 2 else 1
    values = bands(number + 1, 16)
    if extra == 1:
        values[..., :-1] = np.minimum(values[..., :-1], values[..., -1:])
    colour, alpha = values[..., :number].astype(float), values[..., number:] / 65535
    over = {0: colour, 1: colour + 65535 * (1 - alpha), 2: colour * alpha + 65535 * (1 - alpha)}[extra]
    expected = np.broadcast_to(over / 257, (*over.shape[:2], 3)).transpose(2, 0, 1)
    found = decode_image(tiff(values, photometric=kind, extra=(extra,))).numpy()
    assert np.abs(found - expected).max() <= 0.51


@pytest.mark.parametrize("number", [4, 5, 6])
def test_of_rgb_with_further_bands_three_channels_are_the_rgb(number) -> None:
    values = bands(number)
    content = tiff(values, photometric=2, extra=(0,) * (number - 3))
    assert torch.equal(decode_image(content), as_bytes(values[..., :3]))
    assert torch.equal(decode_image(content, channels=number), as_bytes(values))


def test_of_several_pages_the_first_is_taken() -> None:
    frames = [Image.fromarray(bands(4) + np.uint8(page)) for page in range(3)]
    content = encode(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    assert torch.equal(decode_image(content, channels=4), as_bytes(bands(4)))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (tiff(bands(5), sample_format=2), "8-bit signed or floating-point samples have no fixed range"),
        (tiff(bands(5).astype(np.uint32)), "32-bit samples have no fixed range"),
        (tiff(bands(5), photometric=5), "photometric 5"),
        (tiff(bands(5), predictor=3), "predictor 3"),
        (
            tiff(bands(5)).replace(struct.pack("<HHII", 259, 4, 1, 1), struct.pack("<HHII", 259, 4, 1, 7)),
            "compression 7",
        ),
        (tiff(bands(5))[:3000], "truncated|corrupt|missing"),
        (tiff(bands(5), order=">", big=True), "big-endian BigTIFF"),
    ],
)
def test_a_layout_that_is_not_read_is_a_bad_image_that_says_so(content, reason) -> None:
    with pytest.raises(BadImageError, match=reason):
        decode_image(content, channels=5)


def test_tiles_that_unpack_to_more_than_the_picture_are_refused() -> None:
    content = tiff(bands(5), tile=(32, 48)).replace(
        struct.pack("<HHII", 322, 4, 1, 48), struct.pack("<HHII", 322, 4, 1, 2**31)
    )
    with pytest.raises(BadImageError, match="unpack to too many pixels"):
        decode_image(content, channels=5)


# ---------------------------------------------------------------------------------------------------- sources


def test_digits_have_as_many_channels_as_asked_for() -> None:
    grey = open_source("digits", DataConfig(channels=1))
    assert grey.read(3).shape == (1, 8, 8)
    assert torch.equal(grey.read(3).expand(3, 8, 8), open_source("digits", DataConfig()).read(3))


def test_torchvision_pictures_have_as_many_channels_as_asked_for(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    photo().save(tmp_path / "a" / "0.png")
    spec = f"torchvision:ImageFolder,root={tmp_path}"
    assert torch.equal(
        open_source(spec, DataConfig(channels=1)).read(0), decode_image(encode(photo()), channels=1)
    )
    assert torch.equal(open_source(spec, DataConfig()).read(0), pixels(photo()))
    with pytest.raises(BadImageError, match=r"has 3 channels, data.channels is 4"):
        open_source(spec, DataConfig(channels=4)).read(0)


# -------------------------------------------------------------------------------- through the whole programme

GREY = ("--data.channels", "1", "--model.in_chans", "1", "--data.normalize", "auto")


def test_grey_digits_train_and_predict_from_the_command_line(tmp_path, capsys) -> None:
    run = tmp_path / "run"
    words = ("pretrain", *TINY_FLAGS, "--data.train", "digits", *GREY, "--out", run)
    assert call_cli(capsys, *words, "--monitor.pictures_every", "2st")[0] == 0
    assert next((run / "pictures").iterdir())
    assert call_cli(capsys, *words, "--monitor.pictures_every", "2st")[0] == 0  # goes on, being complete
    out = tmp_path / "predicted"
    assert call_cli(capsys, "predict", "--model", run, "--data", "digits", "--out", out)[0] == 0
    assert (out / "predictions.png").is_file()
    assert load_model(str(run)).config.in_chans == 1


def test_bands_train_and_are_probed(tmp_path) -> None:
    images = tmp_path / "images"
    for label in range(2):
        (images / str(label)).mkdir(parents=True)
        for number in range(10):
            values = bands(5, 16, 20, 24) // (1 + label)
            values[:, number] = 0
            (images / str(label) / f"{number}.tif").write_bytes(tiff(values, deflate=True))
    (images / "0" / "few.tif").write_bytes(tiff(bands(4)))
    changes = {"data.train": str(images), "data.channels": 5, "model.in_chans": 5, "data.normalize": "auto"}
    changes |= {"data.max_bad_fraction": 0.2}
    result = pretrain(resolve(TINY, changes), out=tmp_path / "run", reporter=Quiet())
    assert result.num_bad == 1
    assert "has 4 channels, data.channels is 5" in (tmp_path / "run" / "quarantine.jsonl").read_text()
    config = ProbeConfig(
        model=str(tmp_path / "run"),
        train=str(images),
        out=str(tmp_path / "probe"),
        epochs=2,
        batch_size=8,
        attentive_heads=4,
        device="cpu",
    )
    assert {row.encoder for row in probe(config).rows} == {"trained", "untrained", "raw pixels"}


def test_numbers_of_channels_that_differ_are_refused_with_the_remedy(tmp_path, capsys) -> None:
    words = ("pretrain", *TINY_FLAGS, "--data.train", "digits", "--out", tmp_path / "run")
    told = refused(call_cli(capsys, *words, "--data.channels", "1"))
    assert "data.channels is 1, model.in_chans is 3; give both the number" in told
    told = refused(call_cli(capsys, *words, "--data.channels", "1", "--model.in_chans", "1"))
    assert "data.mean has 3 channels, model.in_chans is 1" in told
    assert "data.normalize auto" in told


def test_colours_of_many_bands_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match=r"color_jitter changes colours, data.channels is 5"):
        DataConfig(channels=5, color_jitter=(0.1, 0.1, 0.1, 0.1))
