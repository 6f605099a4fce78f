"""The doctor finds every fault that was planted, and none where there is none."""

from __future__ import annotations

import io
import struct
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nextblock.config import DataConfig, ModelConfig
from nextblock.data import ConcatSource, Source, open_source
from nextblock.data.diagnosis import Checkup, Finding, diagnose, find_leakage, geometry_finding, report
from nextblock.data.doctor import duplicates, examine, images_per_core_s
from toy import ToySource

# A machine with few cores is warned of more workers than cores, which is what some tests want.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

DATA = DataConfig(max_pixels=100_000)
MODEL = ModelConfig(image_size=32, patch_size=4, block_size=2, embed_dim=24, depth=1, num_heads=3)


def picture(seed: int, size: tuple[int, int] = (40, 48), mode: str = "RGB") -> Image.Image:
    """A noisy picture of ImageNet's mean and deviation; `size` is (height, width)."""
    rng = np.random.default_rng(seed)
    colour = 255 * np.clip(rng.normal((0.485, 0.456, 0.406), 0.22, (*size, 3)), 0, 1)
    return Image.fromarray(colour.astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, format_: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def bomb_png() -> bytes:
    """A well-formed PNG of 40,000 x 40,000 pixels in few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


def tiff_of_bands(bands: np.ndarray) -> bytes:
    """An uncompressed TIFF file of (height, width, bands) values of 16 bits."""
    height, width, count = bands.shape
    body = bands.astype("<u2").tobytes()
    bits_at = 8 + len(body)
    short, long = 3, 4
    tags = [
        (256, long, 1, width),
        (257, long, 1, height),
        (258, short, count, bits_at),
        (259, short, 1, 1),
        (262, short, 1, 1),
        (273, long, 1, 8),
        (277, short, 1, count),
        (278, long, 1, height),
        (279, long, 1, len(body)),
        (338, short, count - 1, bits_at + 2 * count),
    ]
    table = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    values = struct.pack(f"<{count}H", *[16] * count) + bytes(2 * (count - 1))
    return struct.pack("<2sHI", b"II", 42, bits_at + len(values)) + body + values + table


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(103), "JPEG", exif=exif)


BROKEN = {
    "cats/truncated.png": encoded(picture(100))[:200],
    "cats/truncated.jpg": encoded(picture(100), "JPEG")[:60],
    "cats/empty.jpg": b"",
    "cats/words.jpg": b"<html>404 not found</html>",
    "dogs/bomb.png": bomb_png(),
}

SIXTEEN = Image.fromarray((np.arange(40 * 48).reshape(40, 48) * 30).astype(np.uint16))

TRAITS = {
    "cats/sixteen.png": (encoded(SIXTEEN), {"16 bits", "grey"}),
    "cats/sixteen.tif": (encoded(SIXTEEN, "TIFF"), {"16 bits", "grey"}),
    "cats/alpha.png": (encoded(picture(101, mode="RGBA")), {"alpha"}),
    "cats/grey.png": (encoded(picture(102, mode="L")), {"grey"}),
    "cats/cmyk.jpg": (encoded(picture(102, mode="CMYK"), "JPEG"), {"CMYK"}),
    "cats/rotated.jpg": (rotated(), {"rotated by EXIF"}),
    "cats/palette.gif": (encoded(picture(104, mode="P"), "GIF"), {"palette"}),
    "cats/animated.gif": (
        encoded(picture(105, mode="P"), "GIF", save_all=True, append_images=[picture(106, mode="P")]),
        {"palette", "animated"},
    ),
    "cats/wrong_name.png": (encoded(picture(107), "JPEG"), {"named as another format"}),
    "cats/blank.png": (encoded(Image.new("RGB", (48, 40), (9, 8, 7))), {"one colour"}),
    "cats/tiny.png": (encoded(picture(108, (3, 5))), set()),
}


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def healthy(count: int, first_seed: int = 0, folders: tuple[str, ...] = ("cats", "dogs")) -> dict[str, bytes]:
    return {
        f"{folders[seed % len(folders)]}/{seed:03d}.png": encoded(picture(seed))
        for seed in range(first_seed, first_seed + count)
    }


def opened(root: Path, data: DataConfig = DATA) -> Source:
    return open_source(str(root), data)


def checkup(source: Source, data: DataConfig = DATA, **options: Any) -> Checkup:
    return Checkup(train=examine(source, data), data=data, model=MODEL, **options)


def findings(*args: Any, **options: Any) -> dict[str, Finding]:
    return {finding.what: finding for finding in diagnose(checkup(*args, **options))}


@pytest.fixture(scope="module")
def sick(tmp_path_factory) -> Path:
    """A folder with every fault, a class of one image, and a class of none."""
    root = write(tmp_path_factory.mktemp("sick"), healthy(20, folders=("cats",)) | BROKEN)
    write(root, {name: content for name, (content, _) in TRAITS.items()})
    twin = encoded(picture(0))
    write(root, {"cats/twin.png": twin, "rare/one.png": twin, "cats/again.png": encoded(picture(1))})
    write(root, {"dogs/lonely.txt": b"no picture"})
    (root / "void").mkdir()
    return root


@pytest.fixture(scope="module")
def sick_val(tmp_path_factory) -> Path:
    """Four images, two of which are also in the sick folder, under other names."""
    files = healthy(4, first_seed=500) | {
        "cats/seen.png": encoded(picture(3)),
        "x/y.png": encoded(picture(4)),
    }
    return write(tmp_path_factory.mktemp("val"), files)


# ------------------------------------------------------------------------------------------------ the look


def test_a_healthy_folder_gives_no_finding(tmp_path):
    source = opened(write(tmp_path, healthy(12)))
    told = checkup(source, per_core_s=100.0, images_per_s=150.0, cores=4)
    assert diagnose(told) == []
    values = report(told)
    assert values["healthy"]
    assert values["decided_by"] is None
    assert values["workers_needed"] == 2
    assert (values["grid"], values["blocks"]) == ([8, 8], 16)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_broken_file_is_found_and_named_with_its_reason(sick, workers):
    found = examine(opened(sick), DATA, workers=workers)
    bad = {sample.name: sample.reason for sample in found.bad()}
    assert set(bad) == set(BROKEN)
    assert bad["cats/empty.jpg"] == "the file is empty (0 bytes)"
    assert "not an image of a known format" in bad["cats/words.jpg"]
    assert "1,600,000,000 pixels, more than data.max_pixels" in bad["dogs/bomb.png"]
    assert all(opened(sick).name(sample.sample) == sample.name for sample in found.bad())
    assert found.num_readable == found.examined - len(BROKEN) == len(opened(sick)) - len(BROKEN)


@pytest.mark.parametrize("name", TRAITS)
def test_what_is_special_about_a_file_is_told(tmp_path, name):
    content, traits = TRAITS[name]
    found = examine(opened(write(tmp_path, {name: content})), DATA)
    assert set(found.traits) == traits
    assert set(found.traits.values()) <= {1}


def test_formats_modes_and_traits_are_counted(sick):
    found = examine(opened(sick), DATA)
    assert found.formats == Counter(PNG=28, JPEG=3, GIF=2, TIFF=1)
    assert found.traits == Counter(trait for _, traits in TRAITS.values() for trait in traits)
    assert found.formats.total() == found.modes.total() == found.num_readable


def test_workers_change_nothing(sick):
    one, other = (examine(opened(sick), DATA, workers=workers) for workers in (0, 3))
    assert np.array_equal(one.digests, other.digests)
    assert np.array_equal(one.sizes, other.sizes)
    assert one.statistics == other.statistics
    assert (one.formats, one.modes, one.traits) == (other.formats, other.modes, other.traits)
    assert list(one.bad()) == list(other.bad())


def test_sizes_are_height_and_width_after_rotation(tmp_path):
    found = examine(opened(write(tmp_path, {"a.png": encoded(picture(0)), "b.jpg": rotated()})), DATA)
    assert found.sizes.tolist() == [[40, 48], [48, 40]]


def test_mean_and_deviation_are_those_of_all_images_each_counting_alike(tmp_path):
    source = ToySource(11, bad=(3,))
    images = torch.stack([image for i, image in enumerate(source.images) if i != 3]).double() / 255
    measured = examine(source, DATA).statistics
    assert measured is not None
    assert measured.mean == pytest.approx(images.mean((0, 2, 3)).tolist())
    assert measured.std == pytest.approx(images.std((0, 2, 3), correction=0).tolist())
    write(
        tmp_path,
        {"a.png": encoded(Image.new("RGB", (2, 2))), "b.png": encoded(Image.new("RGB", (90, 9), "red"))},
    )
    measured = examine(opened(tmp_path), DATA).statistics
    assert measured is not None
    assert measured.mean == (0.5, 0, 0)


def test_a_sample_is_drawn_by_the_seed_and_examined_in_order():
    source = ToySource(50)
    drawn = [examine(source, DATA, samples=9, seed=seed).indices.tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] == sorted(set(drawn[0]))
    assert len(drawn[0]) == 9
    assert drawn[2] != drawn[0]
    assert examine(source, DATA, samples=99).examined == 50


def test_progress_is_told_with_the_number_of_unreadable_images():
    told = []
    examine(ToySource(70, bad=(1, 40, 69)), DATA, progress=lambda *numbers: told.append(numbers))
    assert told == [(32, 1), (64, 2), (70, 3)]


def test_the_bands_of_a_file_that_pillow_does_not_know_are_told(tmp_path):
    bands = np.arange(5 * 6 * 7, dtype=np.uint16).reshape(6, 7, 5) * 300
    many = replace(DATA, channels=5, mean=(0.5,) * 5, std=(0.5,) * 5)
    found = examine(opened(write(tmp_path, {"a.tif": tiff_of_bands(bands)}), many), many)
    assert list(found.bad()) == []
    assert (found.formats, found.modes) == (Counter(TIFF=1), Counter({"5 bands of 16 bits": 1}))
    assert found.traits == Counter({"16 bits": 1})


def test_images_of_other_channels_than_asked_for_are_unreadable():
    found = examine(ToySource(3), replace(DATA, channels=5, mean=(0.5,) * 5, std=(0.5,) * 5))
    assert [bad.reason for bad in found.bad()] == ["it has 3 channels, data.channels is 5"] * 3
    assert found.statistics is None


# ------------------------------------------------------------------------------------------------ duplicates


def slow_duplicates(digests: np.ndarray, readable: np.ndarray) -> list[list[int]]:
    groups: dict[bytes, list[int]] = {}
    for place in np.flatnonzero(readable).tolist():
        groups.setdefault(digests[place].tobytes(), []).append(place)
    return [group for group in groups.values() if len(group) > 1]


@pytest.mark.parametrize("seed", range(5))
def test_duplicates_are_those_of_the_slow_definition(seed):
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 256, (20, 16), dtype=np.uint8)
    kinds[:10, 8:] = kinds[10:, 8:]  # alike in one half only
    digests = kinds[rng.integers(0, 20, 40)]
    readable = rng.random(40) < 0.8
    found = duplicates(digests, readable)
    assert [found.group(i).tolist() for i in range(len(found))] == slow_duplicates(digests, readable)
    assert found.surplus == sum(len(group) - 1 for group in slow_duplicates(digests, readable))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_few_images_or_none_have_no_duplicates(number):
    digests = np.arange(16 * number, dtype=np.uint8).reshape(number, 16)
    found = duplicates(digests, np.ones(number, dtype=bool))
    assert (len(found), found.surplus) == (0, 0)


def test_unreadable_files_are_no_duplicates_of_each_other(tmp_path):
    source = opened(write(tmp_path, healthy(4) | {"cats/a.png": b"", "cats/b.png": b""}))
    found = examine(source, DATA)
    assert len(duplicates(found.digests, found.readable)) == 0


def test_images_that_are_no_files_are_compared_by_their_pixels():
    twins = ConcatSource([ToySource(5), ToySource(5), ToySource(5, seed=1)])
    found = examine(twins, DATA)
    groups = duplicates(found.digests, found.readable)
    assert [groups.group(i).tolist() for i in range(len(groups))] == [[i, i + 5] for i in range(5)]


# -------------------------------------------------------------------------------------------------- findings


def test_all_planted_faults_are_found(sick, sick_val):
    source = opened(sick)
    told = checkup(
        source,
        val=examine(opened(sick_val), DATA),
        geometry=geometry_finding(MODEL, image_size=36),
        per_core_s=10.0,
        images_per_s=200.0,
        cores=4,
    )
    found = {finding.what: finding for finding in diagnose(told)}
    assert {what: finding.severity for what, finding in found.items()} == {
        "too many broken files": "problem",
        "image size": "problem",
        "leakage": "problem",
        "duplicates": "warning",
        "two classes": "warning",
        "empty classes": "warning",
        "unbalanced classes": "warning",
        "small images": "warning",
        "blank images": "warning",
        "misnamed files": "warning",
        "starving": "warning",
    }
    assert f"5 of {len(source)} files" in found["too many broken files"].text
    assert "use model.image_size 32 or 40" in found["image size"].text
    assert "2 validation images" in found["leakage"].text
    assert "cats/seen.png = cats/003.png, x/y.png = cats/004.png" in found["leakage"].text
    assert "3 images" in found["duplicates"].text
    assert "in 2 groups (cats/000.png = cats/twin.png = rare/one.png; " in found["duplicates"].text
    assert found["two classes"].text.startswith("1 groups")
    assert found["empty classes"].text == "2 classes have no readable image: dogs, void"
    assert found["unbalanced classes"].text.endswith("rare 1")
    assert "cats/tiny.png 5x3" in found["small images"].text
    assert "need 20 workers" in found["starving"].text
    values = report(told)
    assert (values["healthy"], values["decided_by"]) == (False, "too many broken files")
    assert len(values["train"]["bad"]) == 5
    assert values["train"]["classes"]["dogs"] == 0
    assert values["train"]["duplicates"]["surplus"] == 3
    assert values["leakage"]["images"] == 2


def test_broken_files_are_a_problem_only_beyond_the_limit():
    source = ToySource(40, bad=(0,))
    allowed, strict = replace(DATA, max_bad_fraction=0.025), replace(DATA, max_bad_fraction=0.02)
    assert findings(source, allowed)["broken files"].severity == "warning"
    assert findings(source, strict)["too many broken files"].severity == "problem"


def test_where_nothing_can_be_read_that_is_the_finding():
    source = ToySource(4, bad=range(4))
    told = checkup(source, replace(DATA, max_bad_fraction=1.0))
    assert report(told)["decided_by"] == "nothing readable"
    assert report(told)["train"]["sizes"] is None
    assert [finding.what for finding in diagnose(told)] == ["nothing readable"]


def test_many_duplicates_are_a_problem_and_few_a_warning(tmp_path):
    few = write(tmp_path / "few", healthy(12) | {"cats/x.png": encoded(picture(0))})
    many = write(tmp_path / "many", healthy(12) | {f"cats/x{i}.png": encoded(picture(0)) for i in range(3)})
    assert findings(opened(few))["duplicates"].severity == "warning"
    assert findings(opened(many))["duplicates"].severity == "problem"


def test_the_same_image_many_times_in_validation_leaks_as_often(tmp_path):
    train, val = ToySource(6), ConcatSource([ToySource(3), ToySource(2), ToySource(5, seed=1)])
    leakage = find_leakage(examine(train, DATA), examine(val, DATA))
    assert leakage.images == 5
    assert leakage.examples == tuple((f"toy-0: toy-0[{i}]", f"toy-0[{i}]") for i in range(3))
    assert find_leakage(examine(ToySource(4, seed=2), DATA), examine(val, DATA)).images == 0


def test_a_source_without_labels_has_no_classes_to_find_fault_with(tmp_path):
    flat = {f"{i}.png": encoded(picture(i)) for i in range(3)}
    told = checkup(opened(write(tmp_path, flat)))
    assert diagnose(told) == []
    assert report(told)["train"]["classes"] is None


def test_sizes_that_do_not_divide_are_refused_with_those_that_would():
    assert geometry_finding(MODEL, image_size=40) is None
    finding = geometry_finding(MODEL, image_size=(32, 36))
    assert finding is not None
    assert "use model.image_size [32, 32] or [32, 40]" in finding.text


def test_other_brightness_than_the_settings_say_is_told(tmp_path):
    dark = {f"{i}.png": encoded(Image.eval(picture(i), lambda value: value // 4)) for i in range(3)}
    source = opened(write(tmp_path, dark))
    assert "consider --data.normalize auto" in findings(source)["normalisation"].text
    assert "normalisation" not in findings(source, replace(DATA, normalize="auto"))


def test_a_mean_of_other_channels_is_a_problem(tmp_path):
    grey = {f"{i}.png": encoded(picture(i, mode="L")) for i in range(3)}
    finding = findings(opened(write(tmp_path, grey)), replace(DATA, mean=(0.5,), std=(0.2,)))["normalisation"]
    assert finding.severity == "problem"
    assert "there are 3 channels, but data.mean has 1 numbers" in finding.text


# ------------------------------------------------------------------------------------------------------ rate


def test_the_rate_is_that_of_training_crops_and_leaves_the_threads_as_they_were():
    before = torch.get_num_threads()
    source = ToySource(5)
    rate = images_per_core_s(source, DATA, 16)
    assert rate is not None
    assert rate > 0
    assert source.reads == 9 * 5  # nine steps, of which the first is not timed
    assert torch.get_num_threads() == before


def test_there_is_no_rate_of_images_that_cannot_be_read():
    assert images_per_core_s(ToySource(5, bad=range(5)), DATA, 16) is None


def test_the_workers_needed_are_the_rate_over_a_cores():
    told = checkup(ToySource(3), per_core_s=300.0, images_per_s=1000.0, cores=8)
    assert told.workers_needed == 4
    assert checkup(ToySource(3), images_per_s=1000.0).workers_needed is None
