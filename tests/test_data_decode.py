"""Any picture file becomes RGB bytes that can be trusted, or a reason in words."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps
from sklearn.datasets import load_sample_images
from torch import Tensor

from nextblock.config import DataConfig
from nextblock.data import BadImageError, decode_image, jpeg_decoder, open_source
from nextblock.data import decode as decode_module
from nextblock.data.augment import TrainCrop
from tiff_files import bands, tiff

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


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_16(values: np.ndarray, *, orientation: int = 1, transparent: tuple[int, ...] = ()) -> bytes:
    """A PNG of 16-bit values (h w c), c = 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA."""
    height, width, channels = values.shape
    lines = values.astype(">u2").reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    if orientation > 1:
        content += chunk(b"eXIf", exif(orientation).tobytes()[6:])
    if transparent:
        content += chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    rows = b"".join(b"\0" + line.tobytes() for line in lines)
    return content + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def sixteen_bits(*shape: int) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 65536, shape, dtype=np.uint16)
    values.flat[:4] = (0, 65535, 257, 128)
    return values


def heic(image: Image.Image, **options) -> bytes:
    import pillow_heif

    file = io.BytesIO()
    pillow_heif.from_pillow(image).save(file, **options)
    return file.getvalue()


def without_content(value: object) -> str | None:
    """In a test's name, no file's bytes."""
    return "file" if isinstance(value, bytes) else None


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 95, "subsampling": 0}])
def test_jpeg_gives_the_same_pixels_through_both_decoders(mode, options) -> None:
    content = encode(photo().convert(mode), "JPEG", **options)
    assert torch.equal(decode_image(content), decode_image(content, decoder="pillow"))
    assert torch.equal(decode_image(content), pixels(Image.open(io.BytesIO(content))))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_format_is_turned_as_its_exif_says_whatever_the_decoder(kind, orientation) -> None:
    content = encode(photo(), kind, exif=exif(orientation), **({"lossless": True} if kind == "WEBP" else {}))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    for decoder in ("auto", "pillow"):
        assert torch.equal(decode_image(content, decoder=decoder), pixels(upright))


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
LONG_TAG = b"Exif\0\0MM\0*" + struct.pack(">IHHHIII", 8, 1, ORIENTATION, 4, 1, 6, 0)
RAW_EXIF = b"\nexif\n 26\n" + exif(6).tobytes().hex().encode()
MUCH = zlib.compress(bytes(3_000_000))
NOTE = chunk(b"zTXt", b"note\0\0" + MUCH)


def with_chunks(*chunks: bytes, place: int = 33) -> bytes:
    """A PNG with more chunks after its header, or at another place."""
    content = encode(photo())
    return content[:place] + b"".join(chunks) + content[place:]


@pytest.mark.parametrize(
    "content",
    [
        *(encode(photo(), "JPEG", **options) for options in ({"xmp": XMP}, {"exif": LONG_TAG})),
        encode(photo(), "JPEG", exif=exif(6), xmp=XMP[:9]),
        with_chunks(NOTE, chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)),
        with_chunks(NOTE, chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP))),
        with_chunks(NOTE, chunk(b"tEXt", b"Raw profile type exif\0" + RAW_EXIF)),
        with_chunks(NOTE, chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(RAW_EXIF))),
    ],
    ids=without_content,
)
def test_any_integer_in_exif_xmp_and_texts_turns_a_picture_whatever_the_decoder(content) -> None:
    plain = encode(photo(), "JPEG") if content[:2] == b"\xff\xd8" else encode(photo())
    upright = pixels(Image.open(io.BytesIO(plain)).transpose(Image.Transpose.ROTATE_270))
    for decoder in ("auto", "pillow", "fast"):
        assert torch.equal(decode_image(content, decoder=decoder), upright)


@pytest.mark.parametrize("place", [33, -12])
@pytest.mark.parametrize(
    "more",
    [
        NOTE,
        chunk(b"iTXt", b"note\0\1\0\0\0" + MUCH),
        chunk(b"tEXt", b"note\0" + b"y" * 3_000_000),
        chunk(b"iCCP", b"icc\0\0" + MUCH),
        chunk(b"zTXt", b"Raw profile type exif\0\0no zlib"),
        chunk(b"eXIf", b"II*\0\xff\xff\xff\x7fgarbage"),
        chunk(b"eXIf", b"garbage"),
    ],
    ids=without_content,
)
def test_much_text_and_damaged_exif_do_not_spoil_a_png(more, place) -> None:
    assert torch.equal(decode_image(with_chunks(more, place=place)), pixels(photo()))


@pytest.mark.parametrize("kind", ["MPO", "GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_pictures_the_first_is_taken(kind) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    frames = [photo(seed=seed).quantize(16).convert("RGB") for seed in range(3)]
    content = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    first = decode_image(encode(frames[0], "JPEG")) if kind == "MPO" else pixels(frames[0])
    assert torch.equal(decode_image(content), first)


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        *((kind, "RGB", {}) for kind in ("PNG", "BMP", "PPM", "TIFF")),
        *(("PNG", mode, {}) for mode in ("L", "1", "P")),
        ("WEBP", "RGB", {"lossless": True}),
        ("TIFF", "RGB", {"compression": "tiff_lzw", "strip_size": 500}),
        ("TIFF", "CMYK", {}),
    ],
)
def test_lossless_formats_and_modes_give_back_their_pixels(kind, mode, options) -> None:
    image = photo().convert(mode)
    assert torch.equal(decode_image(encode(image, kind, **options)), pixels(image))


@pytest.mark.parametrize(
    ("options", "upright"),
    [({}, photo()), ({"exif": exif(6).tobytes()}, photo().transpose(Image.Transpose.ROTATE_270))],
)
def test_heic_is_turned_once_and_pillow_stays_as_it_was(options, upright) -> None:
    decoded = decode_image(heic(photo(), quality=-1, chroma=444, **options))
    assert (decoded.float() - pixels(upright).float()).abs().mean() < 1
    assert "HEIF" not in Image.OPEN


BEHIND = {"white": 255, "grey": 128, "black": 0}


@pytest.mark.parametrize("background", BEHIND)
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_over_the_background(mode, background) -> None:
    alpha = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
    image = photo().convert("L" if mode == "LA" else "RGB")
    colour = pixels(image).double()
    image.putalpha(Image.fromarray(alpha))
    weight = torch.from_numpy(alpha).double() / 255
    expected = colour * weight + BEHIND[background] * (1 - weight)
    found = decode_image(encode(image), background=background)
    assert (found.double() - expected).abs().max() <= 0.51


CLEAR = Image.new("RGBA", (16, 16), (10, 20, 30, 0))
TRANSPARENT = {
    "PNG by a colour": encode(CLEAR.convert("RGB"), "PNG", transparency=(10, 20, 30)),
    "PNG palette": encode(CLEAR.convert("RGB").quantize(1), "PNG", transparency=0),
    "PNG 16": png_16(np.zeros((16, 16, 4), np.uint16)),
    "PNG 16 by a colour": png_16(np.full((16, 16, 1), 515, np.uint16), transparent=(515,)),
    "TIFF 16": tiff(np.zeros((16, 16, 4), np.uint16), photometric=2, extra=(2,)),
    **{kind: encode(CLEAR, kind) for kind in ("PNG", "TIFF", "GIF", "WEBP", "AVIF", "JPEG2000")},
    "HEIC": heic(CLEAR),
}


@pytest.mark.parametrize("background", BEHIND)
@pytest.mark.parametrize("kind", TRANSPARENT)
def test_what_is_wholly_transparent_is_the_background_in_every_format(kind, background) -> None:
    for decoder in ("auto", "pillow"):
        for channels in (1, 3):
            found = decode_image(TRANSPARENT[kind], decoder=decoder, channels=channels, background=background)
            assert (found.int() - BEHIND[background]).abs().max() <= 4  # AVIF and HEIC lose some


@pytest.mark.parametrize("kind", ["<u2", ">u2", "PGM"])
def test_16_bit_grey_of_tiff_and_pgm_is_scaled(kind) -> None:
    values = sixteen_bits(9, 11)
    content = b"P5 11 9 65535\n" + values.astype(">u2").tobytes()
    if kind != "PGM":
        mode = "I;16" if kind == "<u2" else "I;16B"
        content = encode(Image.frombytes(mode, (11, 9), values.astype(kind).tobytes()), "TIFF")
    expected = torch.from_numpy(np.rint(values / 257).astype(np.uint8))
    for channels in (1, 3):
        assert torch.equal(decode_image(content, channels=channels)[-1], expected)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_are_composited_then_rounded_in_parts_of_any_size(channels, orientation, monkeypatch) -> None:
    values = sixteen_bits(9, 11, channels)
    alpha = values[..., -1:] / 65535 if channels in (2, 4) else np.ones(())
    colour = values[..., : channels - (channels in (2, 4))]
    expected = np.rint((colour * alpha + 65535 * (1 - alpha)) / 257)
    expected = np.rot90(expected, -1) if orientation == 6 else expected
    expected = np.broadcast_to(expected, (*expected.shape[:2], 3))
    content = png_16(values, orientation=orientation)
    for part in (1 << 18, 7, 30):
        monkeypatch.setattr(decode_module, "_PART_PX", part)
        assert np.array_equal(decode_image(content).permute(1, 2, 0).numpy(), expected)


PROGRESSIVE = encode(photo(), "JPEG", progressive=True)
LAST_SCAN = PROGRESSIVE[PROGRESSIVE.rindex(b"\xff\xda") : -2]
HUGE_TILES = {"photometric": 2, "tile": (16, 16), "claimed_tile": (65536, 65536)}
NO_RANGE = "have no fixed range"


def of_the_same_strip() -> bytes:
    """A TIFF whose strips list the same bytes again and again."""
    content = tiff(bands(5, 8, 400, 300), rows=1) + bytes(100_000)
    counts, more = (struct.pack("<400I", *[count] * 400) for count in (1500, 100_000))
    assert counts in content
    return content.replace(counts, more)


@pytest.mark.parametrize(
    ("content", "channels", "reason"),
    [
        (b"", 3, "empty"),
        (b"<html>404 not found</html>", 3, r"not an image of a known format \(it starts with '<html>40'\)"),
        (encode(photo(), "JPEG")[:-200], 3, "truncated"),
        (encode(photo())[:-300], 3, "truncated"),
        (b"\x89PNG\r\n\x1a\n", 3, "truncated or corrupt"),
        (encode(photo().convert("L").convert("F"), "TIFF"), 3, f"32-bit pixels .* {NO_RANGE}"),
        (PROGRESSIVE[:-2] + 3000 * LAST_SCAN + b"\xff\xd9", 3, "more than 100 scans"),
        *((tiff(bands(3, bits), **HUGE_TILES), 3, "too many pixels") for bits in (8, 16)),
        (of_the_same_strip(), 5, "missing or too long"),
        (tiff(bands(5), sample_format=2), 5, f"8-bit samples of type int8 {NO_RANGE}"),
        (tiff(bands(5).astype(np.uint32)), 5, f"32-bit samples of type uint32 {NO_RANGE}"),
        (tiff(bands(5), photometric=5), 5, "photometric 5"),
        (tiff(bands(5), predictor=2), 5, r"compression \(1, 2\)"),
        (tiff(bands(5))[:3000], 5, "truncated|corrupt|missing"),
        (tiff(bands(5), order=">", big=True), 5, "big-endian BigTIFF"),
        (encode(photo()), 4, "has 3 channels, data.channels is 4"),
        (encode(photo().convert("L")), 4, "has 1 channel, data.channels is 4"),
        (png_16(sixteen_bits(4, 4, 2)), 4, "has 2 channels, data.channels is 4"),
        *((tiff(bands(5)), wanted, f"has 5 channels, data.channels is {wanted}") for wanted in (1, 3, 4)),
    ],
    ids=without_content,
)
def test_what_is_no_readable_image_gets_a_reason_from_every_decoder(content, channels, reason) -> None:
    for decoder in ("auto", "pillow"):
        with pytest.raises(BadImageError, match=reason):
            decode_image(content, decoder=decoder, channels=channels)


def test_bytes_that_look_like_scans_after_the_end_or_in_metadata_are_none() -> None:
    metadata = b"\xff\xef\x27\x10" + b"\xff\xd9\xff\xda" * 2499 + b"\0\0"
    odd = PROGRESSIVE[:2] + metadata + PROGRESSIVE[2:] + b"\xff\xda" * 5000
    for decoder in ("auto", "pillow"):
        assert torch.equal(decode_image(odd, decoder=decoder), decode_image(PROGRESSIVE))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_a_picture_beyond_max_pixels_is_refused(kind) -> None:
    content = encode(photo(), kind)
    assert decode_image(content, max_pixels=HEIGHT * WIDTH).shape == (3, HEIGHT, WIDTH)
    with pytest.raises(BadImageError, match=r"53 x 37 = 1,961 pixels, more than data.max_pixels \(1,960\)"):
        decode_image(content, max_pixels=HEIGHT * WIDTH - 1)


@pytest.mark.parametrize("limit", [100, 1500])  # Pillow refuses beyond twice its limit, and warns beyond once
def test_pillows_own_limit_neither_matters_nor_changes(monkeypatch, limit) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for kind in ("PNG", "JPEG", "GIF"):
        assert decode_image(encode(photo(), kind)).shape == (3, HEIGHT, WIDTH)
    if limit == 100:
        with pytest.raises(BadImageError, match=r"^more pixels than Pillow reads: Image size"):
            decode_image(encode(photo(), "WEBP"))  # its header cannot be read without the check
    assert limit == Image.MAX_IMAGE_PIXELS
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


MEMORY = """
import resource, sys
from pathlib import Path
from nextblock.data.decode import decode_image
content = Path(sys.argv[1]).read_bytes()
decode_image(content)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
room = int(float(sys.argv[2]) * 1e6)
resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
try:
    print(decode_image(content).shape)
except MemoryError as error:
    print(error)
"""


TOO_LITTLE = "not enough memory to decode 4000 x 3000 pixels"
LARGE = np.zeros((2000, 2000, 4), np.uint16)


@pytest.mark.parametrize(
    ("make", "room_mb", "expected"),
    [
        (lambda: encode(photo(3000, 4000), "JPEG"), 2, TOO_LITTLE),
        (lambda: encode(photo(3000, 4000), "PNG"), 2, TOO_LITTLE),
        # At most 20 bytes a pixel, besides the file and the result.
        (lambda: png_16(LARGE), 80, "[3, 2000, 2000]"),
        (lambda: tiff(LARGE, photometric=2, extra=(2,), rows=100, deflate=True), 80, "[3, 2000, 2000]"),
    ],
    ids=["JPEG", "PNG", "PNG 16", "TIFF 16"],
)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded_and_too_little_is_no_fault_of_the_file(make, room_mb, expected, tmp_path) -> None:
    (tmp_path / "x").write_bytes(make())
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "x"), str(room_mb)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert expected in done.stdout


@pytest.fixture(scope="module")
def true_photo() -> Image.Image:
    return Image.fromarray(load_sample_images().images[0]).crop((0, 0, 640, 424))


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_a_reduced_decoding_is_the_upright_picture_averaged(true_photo, factor, orientation) -> None:
    content = encode(true_photo, "JPEG", quality=90, exif=exif(orientation))
    full, asked = decode_image(content), []
    assert jpeg_decoder("fast") == "pillow-draft"
    small = decode_image(content, decoder="fast", reduce=lambda *size: asked.append(size) or factor)
    assert [size[:2] for size in asked] == [full.shape[1:]]
    mean = torch.nn.functional.avg_pool2d(full.float(), factor)
    assert (small - mean).abs().mean() < (1.5 if factor > 1 else 1e-9)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_crop_lies_where_the_exact_one_does_however_the_photo_is_turned(
    tmp_path, true_photo, orientation
) -> None:
    """The sides are 1 more than a multiple of the factor, so the padding of the reduced image is wide."""
    large = true_photo.resize((1297, 905), Image.Resampling.LANCZOS)
    large.save(tmp_path / "0.jpg", quality=95, exif=exif(orientation))
    crops = {}
    for decoder in ("auto", "fast"):
        data = DataConfig(decoder=decoder, crop_scale=(0.6, 1.0))
        crop, source = TrainCrop(data=data, image_size=48, seed=1), open_source(str(tmp_path), data)
        crops[decoder] = torch.stack([crop.read(source, (visit, 0)) for visit in range(4)]).float()
    assert (crops["auto"] - crops["fast"]).abs().mean() < 3


@pytest.mark.parametrize(
    ("kind", "mode", "decoder"),
    [("PNG", "RGB", "fast"), ("JPEG", "CMYK", "fast"), ("JPEG", "RGB", "auto"), ("JPEG", "RGB", "pillow")],
)
def test_only_jpeg_in_colour_or_grey_is_reduced_and_only_if_fast(kind, mode, decoder) -> None:
    content, asked = encode(photo().convert("CMYK" if mode == "CMYK" else "RGB"), kind), []
    found = decode_image(content, decoder=decoder, reduce=lambda *size: asked.append(size) or 2)
    assert torch.equal(found, decode_image(content))
    assert not asked
