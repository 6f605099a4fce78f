"""Grey, alpha and many bands: from files of every layout to the encoder, the loss and the pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from nextblock.data import decode_image
from nextblock.evaluate.evaluation import BASELINES
from nextblock.evaluate.probe.run import probe
from nextblock.presets import resolve
from nextblock.pretraining import pretrain
from test_data_decode import encode, photo, pixels, png_16, sixteen_bits
from tiff_files import bands, tiff
from tiny_runs import TINY, Quiet

LUMA = torch.tensor([19595, 38470, 7471]).view(3, 1, 1)


def as_bytes(values: np.ndarray) -> torch.Tensor:
    scaled = values if values.dtype == np.uint8 else np.rint(values / 257).astype(np.uint8)
    return torch.from_numpy(np.ascontiguousarray(scaled.transpose(2, 0, 1)))


@pytest.mark.parametrize("decoder", ["auto", "pillow"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_grey_of_a_colour_picture_is_its_luma(kind, decoder) -> None:
    content = encode(photo(), kind)
    colour = decode_image(content, decoder=decoder)
    expected = (colour.long() * LUMA).sum(0, keepdim=True) + 0x8000 >> 16
    assert torch.equal(decode_image(content, decoder=decoder, channels=1).long(), expected)


def test_alpha_is_a_further_channel_if_asked_for_and_not_composited() -> None:
    image = photo()
    image.putalpha(photo(seed=1).convert("L"))
    for kind, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})):
        found = decode_image(encode(image, kind, **options), channels=4)
        assert torch.equal(found, as_bytes(np.array(image)))
    for channels in (2, 4):
        values = sixteen_bits(9, 11, channels)
        assert torch.equal(decode_image(png_16(values), channels=channels), as_bytes(values))


LAYOUTS = {
    "one strip": {},
    "planes of tiles": {"planar": True, "tile": (16, 16)},
    "deflated tiles with predictor": {"deflate": True, "tile": (16, 16), "predictor": 2},
    "planes with predictor": {"deflate": True, "planar": True, "predictor": 2, "rows": 5},
    "BigTIFF": {"big": True, "rows": 4},
    "RGB and others": {"photometric": 2},
}


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bands_of_every_layout_come_as_they_are_stored_and_are_turned(layout, bits) -> None:
    for order, orientation in (("<", 1), ("<", 6), (">", 1)):
        if layout + order == "BigTIFF>":
            continue
        for channels in (2, 3, 4, 6):
            values = bands(channels, bits)
            content = tiff(values, order=order, orientation=orientation, **LAYOUTS[layout])
            upright = np.rot90(values, -1) if orientation == 6 else values
            assert torch.equal(decode_image(content, channels=channels), as_bytes(upright))
    image = Image.fromarray(bands(4))
    for packing in ("tiff_lzw", "packbits", "zstd"):
        content = encode(image, "TIFF", compression=packing)
        assert torch.equal(decode_image(content, channels=4), as_bytes(bands(4)))


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


def test_white_is_zero_and_inks_of_16_bits_are_as_those_of_8() -> None:
    grey, inks = bands(1, 16), bands(4, 16)
    assert torch.equal(decode_image(tiff(grey, photometric=0), channels=1), 255 - as_bytes(grey))
    eight = Image.fromarray(np.rint(inks / 257).astype(np.uint8), "CMYK")
    assert torch.equal(decode_image(tiff(inks, photometric=5)), pixels(eight))


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
    heads: dict = {"epochs": 2, "batch_size": 8, "attentive_heads": 4, "device": "cpu"}
    found = probe(model=str(tmp_path / "run"), train=str(images), out=str(tmp_path / "probe"), **heads)
    assert {row["encoder"] for row in found.rows} == {"model", *BASELINES}
