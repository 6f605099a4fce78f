"""Any picture file becomes RGB bytes that can be trusted, or a reason in words."""

from __future__ import annotations

import io
import json
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
from tiny_runs import run_toy

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


# ------------------------------------------------------------------------------------------------- JPEG


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


@pytest.mark.parametrize("decoder", ["auto", "pillow", "fast"])
@pytest.mark.parametrize("options", [{"xmp": XMP}, {"exif": LONG_TAG}, {"exif": exif(6), "xmp": XMP[:9]}])
def test_any_integer_in_exif_and_xmp_turn_a_jpeg_whatever_the_decoder(decoder, options) -> None:
    content = encode(photo(), "JPEG", **options)
    upright = Image.open(io.BytesIO(encode(photo(), "JPEG"))).transpose(Image.Transpose.ROTATE_270)
    assert torch.equal(decode_image(content, decoder=decoder), pixels(upright))


@pytest.mark.parametrize("decoder", ["auto", "pillow"])
def test_a_jpeg_of_thousands_of_scans_is_refused(decoder) -> None:
    content = encode(photo(), "JPEG", progressive=True)
    last = content[content.rindex(b"\xff\xda") : -2]
    with pytest.raises(BadImageError, match="more than 100 scans"):
        decode_image(content[:-2] + 3000 * last + b"\xff\xd9", decoder=decoder)


def test_bytes_that_look_like_scans_after_the_end_or_in_metadata_are_none() -> None:
    content = encode(photo(), "JPEG", progressive=True)
    metadata = b"\xff\xef\x27\x10" + b"\xff\xd9\xff\xda" * 2499 + b"\0\0"
    odd = content[:2] + metadata + content[2:] + b"\xff\xda" * 5000
    for decoder in ("auto", "pillow"):
        assert torch.equal(decode_image(odd, decoder=decoder), decode_image(content))


@pytest.mark.parametrize("kind", ["MPO", "GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_pictures_the_first_is_taken(kind) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    frames = [photo(seed=seed).quantize(16).convert("RGB") for seed in range(3)]
    content = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    first = decode_image(encode(frames[0], "JPEG")) if kind == "MPO" else pixels(frames[0])
    assert torch.equal(decode_image(content), first)


# ---------------------------------------------------------------------------------------- other formats


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


def heic(image: Image.Image, **options) -> bytes:
    import pillow_heif

    file = io.BytesIO()
    pillow_heif.from_pillow(image).save(file, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("options", "upright"),
    [({}, photo()), ({"exif": exif(6).tobytes()}, photo().transpose(Image.Transpose.ROTATE_270))],
)
def test_heic_is_turned_once_and_pillow_stays_as_it_was(options, upright) -> None:
    decoded = decode_image(heic(photo(), quality=-1, chroma=444, **options))
    assert (decoded.float() - pixels(upright).float()).abs().mean() < 1
    assert "HEIF" not in Image.OPEN


# ------------------------------------------------------------------------------------------------ alpha

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


def transparent(kind: str) -> bytes:
    image = Image.new("RGBA", (16, 16), (10, 20, 30, 0))
    if kind == "HEIC":
        return heic(image)
    if kind == "TIFF 16":
        return tiff(np.zeros((16, 16, 4), np.uint16), photometric=2, extra=(2,))
    if kind == "PNG 16":
        return png_16(np.zeros((16, 16, 4), np.uint16))
    if kind == "PNG 16 by a colour":
        return png_16(np.full((16, 16, 1), 515, np.uint16), transparent=(515,))
    if kind == "PNG by a colour":
        return encode(image.convert("RGB"), "PNG", transparency=(10, 20, 30))
    if kind == "PNG palette":
        palette = Image.new("P", (16, 16))
        palette.putpalette([10, 20, 30])
        return encode(palette, "PNG", transparency=0)
    return encode(image, kind)


@pytest.mark.parametrize("background", BEHIND)
@pytest.mark.parametrize(
    "kind",
    (
        *("PNG", "PNG by a colour", "PNG palette", "PNG 16", "PNG 16 by a colour", "TIFF", "TIFF 16"),
        *("GIF", "WEBP", "AVIF", "JPEG2000", "HEIC"),
    ),
)
def test_what_is_wholly_transparent_is_the_background_in_every_format(kind, background) -> None:
    for decoder in ("auto", "pillow"):
        for channels in (1, 3):
            found = decode_image(transparent(kind), decoder=decoder, channels=channels, background=background)
            assert (found.int() - BEHIND[background]).abs().max() <= 4  # AVIF and HEIC lose some


# ---------------------------------------------------------------------------------------------- 16 bits


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


# -------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"<html>404 not found</html>", r"not an image of a known format \(it starts with '<html>40'\)"),
        (encode(photo(), "JPEG")[:-200], "truncated"),
        (encode(photo())[:-300], "truncated"),
        (b"\x89PNG\r\n\x1a\n", "truncated or corrupt"),
        (encode(photo().convert("L").convert("F"), "TIFF"), "32-bit pixels .* have no fixed range"),
    ],
)
def test_what_is_no_readable_image_gets_a_reason_from_every_decoder(content, reason) -> None:
    for decoder in ("auto", "pillow"):
        with pytest.raises(BadImageError, match=reason):
            decode_image(content, decoder=decoder)


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


# ----------------------------------------------------------------------------------------- bounded resources

MUCH = zlib.compress(bytes(3_000_000))
TEXTS = {
    "zTXt": chunk(b"zTXt", b"note\0\0" + MUCH),
    "iTXt": chunk(b"iTXt", b"note\0\1\0\0\0" + MUCH),
    "tEXt": chunk(b"tEXt", b"note\0" + b"y" * 3_000_000),
    "iCCP": chunk(b"iCCP", b"icc\0\0" + MUCH),
    "damaged": chunk(b"zTXt", b"Raw profile type exif\0\0no zlib"),
}


@pytest.mark.parametrize("place", [33, -12])
@pytest.mark.parametrize("case", TEXTS)
def test_a_png_with_much_text_is_read(case, place) -> None:
    content = encode(photo())
    assert torch.equal(decode_image(content[:place] + TEXTS[case] + content[place:]), pixels(photo()))


RAW_EXIF = b"\nexif\n 26\n" + exif(6).tobytes().hex().encode()


@pytest.mark.parametrize(
    "text",
    [
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)),
        chunk(b"tEXt", b"Raw profile type exif\0" + RAW_EXIF),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(RAW_EXIF)),
    ],
)
def test_a_text_that_turns_a_png_is_kept(text) -> None:
    content = encode(photo())
    assert decode_image(content[:33] + TEXTS["zTXt"] + text + content[33:]).shape == (3, WIDTH, HEIGHT)


@pytest.mark.parametrize("bits", [8, 16])
def test_tiles_that_claim_to_be_huge_are_refused(bits) -> None:
    with pytest.raises(BadImageError, match="too many pixels"):
        decode_image(tiff(bands(3, bits), photometric=2, tile=(16, 16), claimed_tile=(65536, 65536)))


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


@pytest.mark.parametrize(
    ("kind", "room_mb", "expected"),
    [
        ("JPEG", 2, "not enough memory to decode 4000 x 3000 pixels"),
        ("PNG", 2, "not enough memory to decode 4000 x 3000 pixels"),
        # At most 20 bytes a pixel, besides the file and the result.
        ("PNG 16", 80, "torch.Size([3, 2000, 2000])"),
        ("TIFF 16", 80, "torch.Size([3, 2000, 2000])"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded_and_too_little_is_no_fault_of_the_file(kind, room_mb, expected, tmp_path) -> None:
    values = np.zeros((2000, 2000, 4), np.uint16)
    content = {
        "PNG 16": lambda: png_16(values),
        "TIFF 16": lambda: tiff(values, photometric=2, extra=(2,), rows=100, deflate=True),
    }.get(kind, lambda: encode(photo(3000, 4000), kind))()
    (tmp_path / "x").write_bytes(content)
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "x"), str(room_mb)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert expected in done.stdout


def test_a_damaged_exif_block_does_not_spoil_the_picture() -> None:
    content = encode(photo(), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7fgarbage")
    assert torch.equal(decode_image(content), pixels(photo()))


# ------------------------------------------------------------------------------------------- decoder "fast"


@pytest.fixture(scope="module")
def true_photo() -> Image.Image:
    return Image.fromarray(load_sample_images().images[0]).crop((0, 0, 640, 424))


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_a_reduced_decoding_is_the_upright_picture_averaged(true_photo, factor, orientation) -> None:
    content = encode(true_photo, "JPEG", quality=90, exif=exif(orientation))
    full, asked = decode_image(content), []
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


def test_a_run_records_the_decoder_and_resumes_with_no_other(true_photo, tmp_path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(4):
        true_photo.resize((320, 212)).rotate(20 * number).save(tmp_path / "in" / f"{number}.jpg")
    changes = {"data.decoder": "fast", "train.duration": "1st"}

    def start() -> None:
        sources = {"train": open_source(str(tmp_path / "in"), DataConfig(decoder="fast"))}
        run_toy(tmp_path / "run", changes, sources=sources)

    start()
    recorded = tmp_path / "run" / "source.json"
    assert json.loads(recorded.read_text())["decoder"] == jpeg_decoder("fast") == "pillow-draft"
    start()
    recorded.write_text(recorded.read_text().replace("pillow-draft", "torchcodec"))
    with pytest.raises(ValueError, match=r"torchcodec, .* pillow-draft"):
        start()
