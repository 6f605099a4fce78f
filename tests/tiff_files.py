"""TIFF files written by hand, of every layout that Pillow does not write."""

from __future__ import annotations

import struct
import zlib

import numpy as np


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
    claimed_tile: tuple[int, int] | None = None,
) -> bytes:
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
    if tile:
        high, wide = claimed_tile or tile
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
