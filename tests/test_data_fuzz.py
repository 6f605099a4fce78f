"""Damaged, mislabelled and lying files of every format give pixels or a reason, in bounded memory and time.

The cases run in a process of their own, whose address space is limited to little more than it needs to start:
a crash, a hang or a great allocation there fails here.
"""

from __future__ import annotations

import resource
import struct
import subprocess
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nextblock.data.decode import BadImageError, Decoder, decode_image
from test_data_decode import encode, heic, photo, png_16, sixteen_bits
from tiff_files import bands, tiff

MAX_PIXELS = 300_000
ROOM_BYTES = 1_500_000_000
LIMIT_S = 300


def picture(mode: str = "RGB") -> Image.Image:
    return photo(45, 70).convert(mode)


def formats() -> dict[str, bytes]:
    frames = [picture(), picture().rotate(90)]
    return {
        "JPEG": encode(picture(), "JPEG"),
        "JPEG progressive": encode(picture("CMYK"), "JPEG", progressive=True),
        "PNG": encode(picture("RGBA"), "PNG"),
        "PNG palette": encode(picture("P"), "PNG", transparency=3),
        "PNG 16": png_16(sixteen_bits(20, 30, 3)),
        "WebP": encode(picture(), "WEBP"),
        "WebP animated": encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True),
        "TIFF": encode(picture(), "TIFF", compression="tiff_lzw"),
        "TIFF pages": encode(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
        "TIFF 16": tiff(bands(3, 16), photometric=2, deflate=True, predictor=2, tile=(16, 16)),
        "TIFF bands": tiff(bands(4, 16), planar=True, rows=8),
        "BigTIFF": tiff(bands(4), big=True, deflate=True),
        "GIF": encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "BMP": encode(picture(), "BMP"),
        "PPM": encode(picture(), "PPM"),
        "JPEG2000": encode(picture(), "JPEG2000"),
        "AVIF": encode(picture(), "AVIF"),
        "HEIC": heic(picture()),
    }


def damaged(whole: dict[str, bytes], cases: int) -> Iterator[tuple[str, bytes]]:
    """(format and damage, content), seeded; so many cases of each."""
    rng = np.random.default_rng(1)
    names = list(whole)
    for name, content in whole.items():
        for _ in range(cases):
            yield f"{name}: truncated", content[: rng.integers(len(content))]
            flipped = bytearray(content)
            # Headers are where damage does most.
            reach = len(content) if rng.random() < 0.5 else min(len(content), 200)
            for place in rng.integers(reach, size=rng.integers(1, 9)):
                flipped[place] ^= 1 << int(rng.integers(8))
            yield f"{name}: flipped", bytes(flipped)
            other = whole[names[rng.integers(len(names))]]
            start = int(rng.integers(4, 64))
            yield f"{name}: mislabelled", content[:start] + other[start:]


def bombs(whole: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """Small files that say they are huge."""
    size = struct.pack(">II", 30_000, 30_000)
    png = whole["PNG"]
    head = png[12:16] + size + png[24:29]
    yield "PNG", png[:12] + head + struct.pack(">I", zlib.crc32(head)) + png[33:]
    jpeg = whole["JPEG"]
    at = jpeg.index(b"\xff\xc0") + 5
    yield "JPEG", jpeg[:at] + struct.pack(">HH", 60_000, 60_000) + jpeg[at + 4 :]
    yield "PPM", b"P6 60000 60000 255\n" + bytes(99)
    jp2 = whole["JPEG2000"]
    at = jp2.index(b"ihdr") + 4
    yield "JPEG2000", jp2[:at] + size + jp2[at + 8 :]
    for name in ("TIFF", "TIFF bands", "TIFF 16"):
        content = bytearray(whole[name])
        order = "<" if content[:1] == b"I" else ">"
        (start,) = struct.unpack_from(order + "I", content, 4)
        for entry in range(2):  # width and height are the first two tags
            place = start + 2 + 12 * entry
            struct.pack_into(order + "HII", content, place + 2, 4, 1, 60_000)
        yield name, bytes(content)


def check_cases(cases: int) -> None:
    """What the process of its own does: decode everything under the limit."""
    whole = formats()
    for name, content in whole.items():
        decode_image(content, channels=4 if "bands" in name or name == "BigTIFF" else 3)
    decode_image(whole["PNG 16"])
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM_BYTES, resource.RLIM_INFINITY))
    routes: list[tuple[int, Decoder]] = [(3, "auto"), (1, "pillow"), (4, "auto"), (3, "fast")]
    warnings.simplefilter("error")
    good, bad = Counter[str](), Counter[str]()
    for name, content in damaged(whole, cases):
        for channels, decoder in routes:
            options: dict[str, Any] = {"decoder": decoder, "max_pixels": MAX_PIXELS, "channels": channels}
            try:
                pixels = decode_image(content, reduce=lambda *_: 2, **options)
                assert pixels.shape[0] == channels
                assert pixels.shape[1] * pixels.shape[2] <= MAX_PIXELS
                good[name] += 1
            except BadImageError as error:
                assert str(error)
                bad[name] += 1
    assert all(bad[f"{name}: {damage}"] for name in whole for damage in ("truncated", "mislabelled")), bad
    assert good.total() > 4 * cases  # so the damage was not all at the door
    for name, content in bombs(whole):
        for channels in (3, 4):
            with pytest.raises(BadImageError, match=r"data\.max_pixels"):
                print(name, decode_image(content, channels=channels).shape)  # noqa: T201 - for a failure


@pytest.mark.parametrize("cases", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_damaged_files_of_every_format_give_pixels_or_a_reason_and_bombs_are_refused(cases) -> None:
    command = [sys.executable, __file__, str(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


if __name__ == "__main__":
    check_cases(int(sys.argv[1]))
