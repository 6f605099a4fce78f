"""Training crops of large JPEGs come from a reduced picture: the same boxes, nearly the same pixels."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from nextblock.config import DataConfig
from nextblock.data import TrainLoader, decode_image, jpeg_decoder, keyed_rng, open_source, train_crop
from nextblock.data import fast as fast_module
from nextblock.data.augment import draw_crop, resize
from nextblock.data.decode import BadImageError
from nextblock.data.fast import fast_decode, reduction
from nextblock.data.orientation import stored_box, stored_size, turn
from tiny_runs import TINY_FLAGS, call_cli, refused, run_toy

ORIENTATION = 0x112
FAST = DataConfig(decoder="fast")


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """A true photograph of 640 x 424 px."""
    return Image.fromarray(load_sample_images().images[0]).crop((0, 0, 640, 424))


def jpeg(image: Image.Image, orientation: int = 1, **options) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90, exif=exif, **options)
    return file.getvalue()


def both(content: bytes, size, number: int, **settings) -> tuple[Tensor, Tensor]:
    """The crop by the exact path, and the fast one."""
    data = DataConfig(decoder="fast", **settings)
    exact = train_crop(
        decode_image(content, channels=data.channels), size, data, keyed_rng(0, "crop", number)
    )
    fast = fast_decode(content, size, data, keyed_rng(0, "crop", number))
    assert fast is not None
    return exact, fast.crop()


def difference(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).abs().mean())


# ------------------------------------------------------------------------------------------ which reduction


@pytest.mark.parametrize(
    ("box", "factor"),
    [((199, 400), 1), ((200, 399), 1), ((200, 400), 2), ((399, 900), 2), ((400, 800), 4), ((9999, 9999), 8)],
)
def test_a_picture_is_reduced_as_far_as_the_crop_stays_no_smaller_than_its_target(box, factor) -> None:
    assert reduction((0, 0, *box), (100, 200)) == factor


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_reduced_decoding_is_the_picture_averaged(photo, factor) -> None:
    content = jpeg(photo)
    small = fast_module._decode(content, (424, 640), factor, is_grey=False)
    assert small is not None
    full = decode_image(content).float()
    averaged = torch.nn.functional.avg_pool2d(full, factor)
    assert difference(small, averaged) < 1.5


# --------------------------------------------------------------------------------------------- exact or near


def test_without_a_reduction_the_pixels_are_those_of_the_exact_path(photo) -> None:
    for number in range(8):
        exact, fast = both(jpeg(photo), 224, number)
        assert torch.equal(exact, fast)


@pytest.mark.parametrize("size", [48, (32, 64)])
def test_a_reduced_crop_is_close_to_the_exact_one(photo, size) -> None:
    found = [difference(*both(jpeg(photo), size, number, crop_scale=(0.3, 1))) for number in range(12)]
    assert 0 < np.mean(found) < 8  # measured: 5.0 for half a pixel of 48, mostly
    assert max(found) < 14


def test_but_for_the_rounding_of_the_box_a_reduced_crop_is_the_exact_one(photo, monkeypatch) -> None:
    content, full = jpeg(photo), decode_image(jpeg(photo))
    boxes = []
    reduced = fast_module._reduced
    monkeypatch.setattr(
        fast_module, "_reduced", lambda box, size, f: boxes.append((reduced(box, size, f), f)) or boxes[-1][0]
    )
    data = DataConfig(flip=0)
    for number in range(12):
        fast = fast_decode(content, 48, data, keyed_rng(0, "crop", number))
        assert fast is not None
        (top, left, rows, columns), factor = boxes[-1]
        top, left, bottom, right = (f * factor for f in (top, left, top + rows, left + columns))
        assert difference(resize(full[:, top:bottom, left:right], (48, 48)), fast.crop()) < 4


def test_the_box_is_the_exact_paths_and_rounded_by_half_a_reduced_pixel(photo, monkeypatch) -> None:
    content = jpeg(photo)
    seen = []
    reduced = fast_module._reduced
    monkeypatch.setattr(
        fast_module,
        "_reduced",
        lambda box, size, factor: seen.append((box, factor, reduced(box, size, factor))) or seen[-1][2],
    )
    for number in range(20):
        fast_decode(content, 48, FAST, keyed_rng(0, "crop", number))
        box, factor, small = seen[-1]
        assert box == draw_crop(424, 640, FAST, keyed_rng(0, "crop", number)).box
        edges = np.array([box[0], box[1], box[0] + box[2], box[1] + box[3]]) / factor
        found = np.array([small[0], small[1], small[0] + small[2], small[1] + small[3]])
        assert np.abs(edges - found).max() <= 0.5
    assert {factor for _, factor, _ in seen} >= {4, 8}


def test_the_same_key_gives_the_same_crop_and_jitter_comes_last(photo) -> None:
    content = jpeg(photo)
    plain = DataConfig(decoder="fast", color_jitter=(0.0, 0.0, 0.0, 0.0), color_jitter_prob=1.0)
    for number in range(4):
        first, again, unchanged = (
            fast_decode(content, 32, data, keyed_rng(0, "c", number)) for data in (FAST, FAST, plain)
        )
        assert first is not None
        assert again is not None
        assert unchanged is not None
        crop = first.crop()
        assert torch.equal(crop, again.crop())
        assert torch.equal(crop, unchanged.crop())


# ------------------------------------------------------------------------------------------- turned pictures


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_stored_box_holds_what_the_upright_box_holds(orientation) -> None:
    stored = torch.arange(5 * 7).reshape(1, 5, 7)
    upright = turn(stored, orientation)
    size = (upright.shape[1], upright.shape[2])
    assert stored_size(size, orientation) == (5, 7)
    top, left, rows, columns = stored_box((1, 2, 3, 2), size, orientation)
    cut = stored[:, top : top + rows, left : left + columns]
    assert torch.equal(turn(cut, orientation), upright[:, 1:4, 2:4])


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_turned_photo_gives_the_crop_of_the_upright_one(photo, orientation) -> None:
    content = jpeg(photo, orientation)
    for number in range(3):
        exact, fast = both(content, (40, 56), number)
        assert difference(exact, fast) < 14
        exact, fast = both(content, (200, 216), number, crop_scale=(0.3, 0.5))
        assert difference(exact, fast) < 0.5  # not reduced: turned after resizing instead of before


# -------------------------------------------------------------------------------------------- what falls back


def test_grey_is_grey_in_either_way(photo) -> None:
    for content in (jpeg(photo.convert("L")), jpeg(photo)):
        exact, fast = both(content, 200, 1, channels=1, crop_scale=(0.3, 0.5))
        assert exact.shape == (1, 200, 200)
        assert torch.equal(exact, fast)
    exact, fast = both(jpeg(photo.convert("L")), 40, 1)
    assert difference(exact, fast) < 14


@pytest.mark.parametrize("case", ["png", "cmyk", "truncated", "four channels"])
def test_what_is_no_plain_jpeg_is_left_to_the_exact_path(photo, case) -> None:
    file = io.BytesIO()
    photo.save(file, "PNG")
    content = {
        "png": file.getvalue(),
        "cmyk": jpeg(photo.convert("CMYK")),
        "truncated": jpeg(photo)[:-3000],
        "four channels": jpeg(photo),
    }[case]
    data = DataConfig(decoder="fast", channels=4 if case == "four channels" else 3)
    assert fast_decode(content, 32, data, keyed_rng(0, "crop")) is None


def test_a_picture_beyond_max_pixels_is_refused(photo) -> None:
    data = DataConfig(decoder="fast", max_pixels=1000)
    with pytest.raises(BadImageError, match="640 x 424"):
        fast_decode(jpeg(photo), 32, data, keyed_rng(0, "crop"))


# ------------------------------------------------------------------------------------------------ the loader


@pytest.fixture
def folder(photo, tmp_path) -> Path:
    small = photo.resize((320, 212))
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(small.rotate(20 * number)))
    small.save(tmp_path / "4.png")
    (tmp_path / "5.jpg").write_bytes(jpeg(small)[:-2000])
    small.convert("CMYK").save(tmp_path / "6.jpg")
    (tmp_path / "7.jpg").write_bytes(jpeg(small, 6))
    return tmp_path


def first_batch(folder: Path, workers: int, **settings):
    data = DataConfig(**settings)
    source = open_source(str(folder), data)
    loader = TrainLoader(source, data, image_size=32, seed=3, batch_size=8, workers=workers)
    return next(iter(loader)).micro_batches[0]


def test_the_loader_takes_the_fast_path_where_it_can_and_reports_what_is_broken(folder) -> None:
    exact, fast = first_batch(folder, 0), first_batch(folder, 0, decoder="fast")
    assert torch.equal(exact.samples, fast.samples)
    assert [bad.name for bad in fast.bad] == [bad.name for bad in exact.bad] == ["5.jpg"]
    for sample, one, other in zip(exact.samples.tolist(), exact.images, fast.images, strict=True):
        if sample in (4, 6):
            assert torch.equal(one, other)
        else:
            assert 0 < difference(one, other) < 20


def test_fast_batches_do_not_hang_on_workers(folder) -> None:
    alone, divided = (first_batch(folder, workers, decoder="fast") for workers in (0, 2))
    assert torch.equal(alone.images, divided.images)


# ---------------------------------------------------------------------------------------------- the package


def test_the_decoders_name_tells_simplejpeg() -> None:
    assert jpeg_decoder("fast") == "simplejpeg"


def test_without_the_package_fast_is_refused_at_the_start(monkeypatch, folder) -> None:
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(ValueError, match=r"fast needs simplejpeg: pip install 'nextblock\[fast\]'"):
        first_batch(folder, 0, decoder="fast")


def test_the_command_line_refuses_it_before_anything_else(monkeypatch, folder, tmp_path, capsys) -> None:
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    words = ("pretrain", *TINY_FLAGS, "--data.train", folder, "--data.decoder", "fast")
    told = refused(call_cli(capsys, *words, "--out", tmp_path / "run"))
    assert "pip install 'nextblock[fast]'" in told
    assert not (tmp_path / "run").exists()


def test_a_run_records_the_decoder_and_goes_on_with_no_other(folder, tmp_path) -> None:
    changes = {"data.decoder": "fast", "train.duration": "1st", "data.max_bad_fraction": 0.5}

    def start(**more) -> None:
        sources = {"train": open_source(str(folder), FAST)}
        run_toy(tmp_path / "run", {**changes, **more}, sources=sources)

    start()
    recorded = tmp_path / "run" / "source.json"
    assert json.loads(recorded.read_text())["decoder"] == "simplejpeg"
    start()
    with pytest.raises(ValueError, match=r"data.decoder: 'fast' there, 'auto' now"):
        start(**{"data.decoder": "auto"})
    recorded.write_text(recorded.read_text().replace("simplejpeg", "torchcodec"))
    with pytest.raises(ValueError, match=r"was decoding JPEG with torchcodec, .* would with simplejpeg"):
        start()
