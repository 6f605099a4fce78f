"""Grey, alpha and many bands: from files of every layout to the encoder, the loss and the pictures."""

from __future__ import annotations

import struct
import sys

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
from tiff_files import bands, tiff
from tiny_runs import TINY, TINY_FLAGS, Quiet, call_cli, refused

LUMA = torch.tensor([19595, 38470, 7471]).view(3, 1, 1)


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
        (png_16(sixteen_bits(4, 4, 2)), 2),
        (tiff(bands(5)), 5),
    ],
)
def test_another_number_of_channels_is_a_bad_image_with_both_numbers(content, found) -> None:
    with pytest.raises(BadImageError, match=rf"has {found} channels?, data.channels is 4"):
        decode_image(content, channels=4)


@pytest.mark.parametrize("channels", [1, 3])
def test_bands_are_neither_colour_nor_grey(channels) -> None:
    with pytest.raises(BadImageError, match=rf"has 5 channels, data.channels is {channels}"):
        decode_image(tiff(bands(5)), channels=channels)


# ---------------------------------------------------------------------------------------------- bands of TIFF

LAYOUTS = {
    "one strip": {},
    "planes of tiles": {"planar": True, "tile": (16, 16)},
    "deflated tiles with predictor": {"deflate": True, "tile": (16, 16), "predictor": 2},
    "planes with predictor": {"deflate": True, "planar": True, "predictor": 2, "rows": 5},
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


def test_16_bit_colour_tiff_is_scaled_to_the_nearest_level() -> None:
    for layout in ({}, {"tile": (16, 16), "deflate": True, "predictor": 2}):
        assert torch.equal(decode_image(tiff(bands(3, 16), photometric=2, **layout)), as_bytes(bands(3, 16)))


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
        (tiff(bands(5), sample_format=2), "8-bit samples of type int8 have no fixed range"),
        (tiff(bands(5).astype(np.uint32)), "32-bit samples of type uint32 have no fixed range"),
        (tiff(bands(5), photometric=5), "photometric 5"),
        (tiff(bands(5), predictor=2), r"compression \(1, 2\)"),
        (tiff(bands(5))[:3000], "truncated|corrupt|missing"),
        (tiff(bands(5), order=">", big=True), "big-endian BigTIFF"),
    ],
)
def test_a_layout_that_is_not_read_is_a_bad_image_that_says_so(content, reason) -> None:
    with pytest.raises(BadImageError, match=reason):
        decode_image(content, channels=5)


def test_white_is_zero_and_inks_of_16_bits_are_as_those_of_8() -> None:
    grey, inks = bands(1, 16), bands(4, 16)
    assert torch.equal(decode_image(tiff(grey, photometric=0), channels=1), 255 - as_bytes(grey))
    eight = Image.fromarray(np.rint(inks / 257).astype(np.uint8), "CMYK")
    assert torch.equal(decode_image(tiff(inks, photometric=5)), pixels(eight))


def test_xmp_turns_bands_without_an_orientation_tag() -> None:
    xmp = b'<rdf:Description tiff:Orientation="6"/>'
    content = encode(Image.fromarray(bands(4)), "TIFF", tiffinfo={700: xmp})
    assert decode_image(content, channels=4).shape == (4, 37, 21)


@pytest.mark.parametrize("values", [bands(5), bands(3, 16)])
def test_without_tifffile_the_reason_names_the_extra(values, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(BadImageError, match=r"pip install tifffile imagecodecs"):
        decode_image(tiff(values, photometric=1 if values.shape[-1] == 5 else 2), channels=values.shape[-1])


def test_strips_that_list_the_same_bytes_again_and_again_are_refused() -> None:
    content = tiff(bands(5, 8, 400, 300), rows=1) + bytes(100_000)
    counts, more = (struct.pack("<400I", *[count] * 400) for count in (1500, 100_000))
    assert counts in content
    with pytest.raises(BadImageError, match="missing or too long"):
        decode_image(content.replace(counts, more), channels=5)


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
    assert next((run / "pictures").glob("*.png"))
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
