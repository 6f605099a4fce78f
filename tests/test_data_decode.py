"""Any picture file becomes RGB bytes that can be trusted, or a reason in words."""

from __future__ import annotations

import io
import struct
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps
from torch import Tensor

from nextblock.data import BadImageError, decode_image
from nextblock.data import decode as decode_module

HEIGHT, WIDTH = 37, 53
ORIENTATION = 0x112


def photo(height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> Image.Image:
    """A smooth coloured picture, which JPEG keeps well."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[ORIENTATION] = orientation
    return block


def png(width: int, height: int, bits: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG written by hand, for the depths that Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def png_16(values: np.ndarray) -> bytes:
    """A PNG of 16-bit values (h w c), c = 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA."""
    height, width, channels = values.shape
    lines = values.astype(">u2").reshape(height, -1)
    rows = b"".join(b"\0" + line.tobytes() for line in lines)
    return png(width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], rows)


def sixteen_bits(*shape: int) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 65536, shape, dtype=np.uint16)
    values.flat[:4] = (0, 65535, 257, 128)
    return values


# ------------------------------------------------------------------------------------------------- JPEG


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 95, "subsampling": 0}])
def test_jpeg_gives_the_same_pixels_through_both_decoders(mode, options) -> None:
    content = encode(photo().convert(mode), "JPEG", **options)
    assert torch.equal(decode_image(content), decode_image(content, decoder="pillow"))
    assert torch.equal(decode_image(content), pixels(Image.open(io.BytesIO(content))))


@pytest.mark.parametrize("decoder", ["auto", "pillow"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_jpeg_is_turned_as_its_exif_says(decoder, orientation) -> None:
    content = encode(photo(), "JPEG", exif=exif(orientation))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert torch.equal(decode_image(content, decoder=decoder), pixels(upright))


def test_jpeg_that_holds_several_pictures_gives_the_first() -> None:
    content = encode(photo(), "MPO", save_all=True, append_images=[photo(seed=1)])
    assert torch.equal(decode_image(content), decode_image(encode(photo(), "JPEG")))


def test_without_torchcodec_pillow_decodes(monkeypatch) -> None:
    content = encode(photo(), "JPEG")
    expected = decode_image(content)
    monkeypatch.setattr(decode_module, "_torchcodec", lambda name: None)
    assert torch.equal(decode_image(content), expected)


# ---------------------------------------------------------------------------------------- other formats


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF", "WEBP"])
def test_lossless_formats_give_back_their_pixels(kind) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert torch.equal(decode_image(encode(photo(), kind, **options)), pixels(photo()))


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_grey_bilevel_and_palette_become_rgb(mode) -> None:
    image = photo().convert(mode)
    assert torch.equal(decode_image(encode(image)), pixels(image))


def test_cmyk_tiff_becomes_rgb() -> None:
    image = photo().convert("CMYK")
    assert torch.equal(decode_image(encode(image, "TIFF")), pixels(image))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_orientation_applies_to_every_format(kind) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encode(photo(), kind, exif=exif(6), **options)
    assert torch.equal(decode_image(content), pixels(photo().transpose(Image.Transpose.ROTATE_270)))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(kind) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    frames = [photo(seed=seed).quantize(16).convert("RGB") for seed in range(3)]
    content = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert torch.equal(decode_image(content), pixels(frames[0]))


def test_avif_gives_pillows_pixels() -> None:
    content = encode(photo(), "AVIF")
    assert torch.equal(decode_image(content), pixels(Image.open(io.BytesIO(content))))


def heic(image: Image.Image, **options) -> bytes:
    import pillow_heif

    file = io.BytesIO()
    pillow_heif.from_pillow(image).save(file, **options)
    return file.getvalue()


def test_heic_is_read_and_pillow_stays_as_it_was() -> None:
    decoded = decode_image(heic(photo(), quality=-1, chroma=444))
    assert (decoded.float() - pixels(photo()).float()).abs().mean() < 1
    assert "HEIF" not in Image.OPEN
    assert ".heic" not in Image.registered_extensions()


def test_heic_of_a_phone_held_upright_is_turned_once() -> None:
    turned = heic(photo(), quality=-1, chroma=444, exif=exif(6).tobytes())
    decoded = decode_image(turned)
    upright = photo().transpose(Image.Transpose.ROTATE_270)
    assert decoded.shape == (3, WIDTH, HEIGHT)
    assert (decoded.float() - pixels(upright).float()).abs().mean() < 1


def test_alpha_of_avif_and_heic_is_composited_over_white() -> None:
    image = Image.new("RGBA", (16, 16), (10, 20, 30, 0))
    for content in (encode(image, "AVIF"), heic(image)):
        assert (decode_image(content) > 250).all()


def test_without_pillow_heif_the_reason_names_the_package(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(BadImageError, match=r"HEIC needs pillow-heif: pip install 'nextblock\[heic\]'"):
        decode_image(heic_start())


def heic_start() -> bytes:
    return b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)


@pytest.mark.parametrize("options", [{}, {"compression": "tiff_lzw"}, {"compression": "tiff_deflate"}])
def test_tiff_of_strips_and_packed_is_read(options) -> None:
    assert torch.equal(decode_image(encode(photo(), "TIFF", strip_size=500, **options)), pixels(photo()))


def test_content_decides_and_no_name_is_asked() -> None:
    assert decode_image(encode(photo(), "PNG")).shape == (3, HEIGHT, WIDTH)
    assert decode_image(encode(photo(), "JPEG")).shape == (3, HEIGHT, WIDTH)


# ------------------------------------------------------------------------------------------------ alpha


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_over_white(mode) -> None:
    alpha = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
    image = photo().convert("L" if mode == "LA" else "RGB")
    colour = pixels(image).double()
    image.putalpha(Image.fromarray(alpha))
    weight = torch.from_numpy(alpha).double() / 255
    expected = colour * weight + 255 * (1 - weight)
    assert (decode_image(encode(image)).double() - expected).abs().max() <= 0.51


def test_what_is_wholly_transparent_is_white() -> None:
    assert (decode_image(encode(Image.new("RGBA", (4, 4), (10, 20, 30, 0)))) == 255).all()


def test_a_transparent_palette_colour_is_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 100, 0])
    image.putdata([0, 1])
    decoded = decode_image(encode(image, "PNG", transparency=0))
    assert decoded[:, 0, 0].tolist() == [255, 255, 255]
    assert decoded[:, 0, 1].tolist() == [0, 100, 0]


def test_a_transparent_gif_is_white_behind() -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.putpixel((3, 3), (0, 0, 255, 255))
    decoded = decode_image(encode(image, "GIF"))
    assert decoded[:, 0, 0].tolist() == [255, 255, 255]
    assert decoded[:, 3, 3].tolist() == [0, 0, 255]


def test_a_transparent_colour_of_rgb_is_white() -> None:
    image = Image.new("RGB", (2, 1), (9, 9, 9))
    image.putpixel((0, 0), (1, 2, 3))
    decoded = decode_image(encode(image, "PNG", transparency=(1, 2, 3)))
    assert decoded[:, 0].tolist() == [[255, 9], [255, 9], [255, 9]]


# ---------------------------------------------------------------------------------------------- 16 bits


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    values = sixteen_bits(9, 11, 1)
    expected = torch.from_numpy(np.rint(values / 257).astype(np.uint8)).permute(2, 0, 1).expand(3, -1, -1)
    assert torch.equal(decode_image(png_16(values)), expected)


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bit_grey_tiff_of_either_byte_order_is_scaled(order) -> None:
    values = sixteen_bits(9, 11)
    image = Image.frombytes(
        "I;16B" if order == ">u2" else "I;16", (11, 9), np.ascontiguousarray(values.astype(order)).tobytes()
    )
    expected = torch.from_numpy(np.rint(values / 257).astype(np.uint8))
    assert torch.equal(decode_image(encode(image, "TIFF"))[0], expected)


def test_16_bit_pgm_is_scaled() -> None:
    values = sixteen_bits(9, 11)
    content = b"P5 11 9 65535\n" + values.astype(">u2").tobytes()
    assert torch.equal(decode_image(content)[1], torch.from_numpy(np.rint(values / 257).astype(np.uint8)))


def test_16_bit_colour_is_scaled() -> None:
    values = sixteen_bits(9, 11, 3)
    expected = torch.from_numpy(np.rint(values / 257).astype(np.uint8)).permute(2, 0, 1)
    assert torch.equal(decode_image(png_16(values)), expected)


def test_pillow_alone_scales_16_bit_colour_to_within_a_level() -> None:
    values = sixteen_bits(9, 11, 3)
    expected = torch.from_numpy(values / 257).permute(2, 0, 1)
    assert (decode_image(png_16(values), decoder="pillow") - expected).abs().max() <= 1


@pytest.mark.parametrize("channels", [2, 4])
def test_16_bit_alpha_is_composited_over_white(channels) -> None:
    values = sixteen_bits(9, 11, channels)
    alpha = values[..., -1:] / 65535
    colour = np.broadcast_to(values[..., :-1], (9, 11, 3))
    expected = np.rint((colour * alpha + 65535 * (1 - alpha)) / 257).transpose(2, 0, 1)
    assert np.array_equal(decode_image(png_16(values)).numpy(), expected)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bit_pixels_are_refused(mode) -> None:
    with pytest.raises(BadImageError, match=r"32-bit pixels .* have no fixed range"):
        decode_image(encode(photo().convert("L").convert(mode), "TIFF"))


# -------------------------------------------------------------------------------------------- bad input

REASONS = {
    "empty": (b"", "empty"),
    "text": (b"<html>404 not found</html>", "not an image of a known format"),
    "truncated jpeg": (encode(photo(), "JPEG")[:-200], "truncated"),
    "jpeg header only": (encode(photo(), "JPEG")[:100], "truncated|damaged"),
    "truncated png": (encode(photo())[:-300], "truncated"),
    "truncated tiff": (encode(photo(), "TIFF")[: HEIGHT * WIDTH], "truncated|corrupt|damaged"),
    "truncated webp": (encode(photo(), "WEBP")[:-50], "truncated|corrupt|damaged"),
    "png signature only": (b"\x89PNG\r\n\x1a\n", "damaged header"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known format"),
}


@pytest.mark.parametrize("decoder", ["auto", "pillow"])
@pytest.mark.parametrize("case", REASONS)
def test_what_is_no_readable_image_gets_a_reason(case, decoder) -> None:
    content, reason = REASONS[case]
    with pytest.raises(BadImageError, match=reason):
        decode_image(content, decoder=decoder)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "GIF", "WEBP", "BMP"])
def test_damage_anywhere_gives_pixels_or_a_reason_and_no_other_error(kind) -> None:
    content = encode(photo(), kind)
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), 8):
            damaged[place] = rng.integers(256)
        try:
            decoded = decode_image(bytes(damaged), max_pixels=100_000)
        except BadImageError as error:
            assert str(error)
        else:
            assert decoded.shape[0] == 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_a_picture_beyond_max_pixels_is_refused(kind) -> None:
    content = encode(photo(), kind)
    assert decode_image(content, max_pixels=HEIGHT * WIDTH).shape == (3, HEIGHT, WIDTH)
    with pytest.raises(BadImageError, match=r"53 x 37 = 1,961 pixels, more than data.max_pixels \(1,960\)"):
        decode_image(content, max_pixels=HEIGHT * WIDTH - 1)


def test_a_bomb_is_refused_by_its_header_alone() -> None:
    bomb = png(60_000, 60_000, 8, 2, b"")
    with pytest.raises(BadImageError, match=r"60000 x 60000 = 3,600,000,000 pixels"):
        decode_image(bomb)


def test_max_pixels_may_exceed_pillows_own_limit(monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # so that a small picture is too large for Pillow
    assert torch.equal(decode_image(encode(photo())), pixels(photo()))


def test_no_warning_and_no_change_of_pillows_settings(monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)  # between once and twice: Pillow warns
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode_image(encode(photo()))
        decode_image(encode(photo(), "JPEG"))
        image = photo().quantize(4)
        decode_image(encode(image, "PNG", transparency=bytes([0, 50, 100, 255])))
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    assert Image.MAX_IMAGE_PIXELS == 1500


def test_a_damaged_exif_block_does_not_spoil_the_picture() -> None:
    content = encode(photo(), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7fgarbage")
    assert torch.equal(decode_image(content), pixels(photo()))
