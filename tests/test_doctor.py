"""The doctor finds every fault that was planted and none where there is none; its advice can be typed."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nextblock.config import DataConfig, ModelConfig, pair
from nextblock.data import ConcatSource, Source, open_source
from nextblock.data.advice import Checkup
from nextblock.data.doctor import IMAGE, Examination, crops_per_core_s, examine, shared_images
from nextblock.presets import get_preset, resolve
from tiny_runs import call_cli, refused, write_images
from toy import ToySource

# A machine with few cores is warned of more workers than cores, which is what some tests want.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

DATA = DataConfig(max_pixels=100_000)
AUTO = replace(DATA, normalize="auto")
MODEL = ModelConfig(image_size=32, patch_size=4, block_size=2, embed_dim=24, depth=1, num_heads=3)
FLAGS = ("--workers", 0, "--image_size", 16, "--patch_size", 4, "--block_size", 2, "--data.normalize", "auto")


def picture(seed: int, size: tuple[int, int] = (40, 48), mode: str = "RGB") -> Image.Image:
    """Noise of ImageNet's mean and deviation; `size` is (height, width)."""
    rng = np.random.default_rng(seed)
    colour = 255 * np.clip(rng.normal((0.485, 0.456, 0.406), 0.22, (*size, 3)), 0, 1)
    return Image.fromarray(colour.astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, format_: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def opened(root: Path, files: dict[str, bytes]) -> Source:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return open_source(str(root), DATA)


def healthy(count: int, first: int = 0) -> dict[str, bytes]:
    seeds = range(first, first + count)
    return {f"{('cats', 'dogs')[seed % 2]}/{seed:03d}.png": encoded(picture(seed)) for seed in seeds}


def checkup(source: Source, data: DataConfig = DATA, **options: Any) -> Checkup:
    return Checkup(train=examine(source, data), data=data, model=MODEL, **options)


def found_of(source: Source, sizes: Any) -> Examination:
    """An examination of images with these sizes."""
    found = Examination(source, 3)
    found.images = np.zeros(len(sizes), IMAGE)
    found.images["index"], found.images["size"] = np.arange(len(sizes)), sizes
    return found


def findings(told: Checkup) -> dict[str, str]:
    return {finding.what: finding.severity for finding in told.findings}


BROKEN = {
    "cats/truncated.jpg": encoded(picture(100), "JPEG")[:60],
    "cats/empty.jpg": b"",
    "cats/words.jpg": b"<html>404 not found</html>",
    "void/large.png": encoded(Image.new("L", (400, 400))),
}
SIXTEEN = Image.fromarray((np.arange(40 * 48).reshape(40, 48) * 30).astype(np.uint16))
EXIF = Image.Exif()
EXIF[0x0112] = 6
KINDS = {
    "cats/sixteen.png": encoded(SIXTEEN),
    "cats/sixteen.tif": encoded(SIXTEEN, "TIFF"),
    "cats/alpha.png": encoded(picture(101, mode="RGBA")),
    "cats/rotated.jpg": encoded(picture(103), "JPEG", exif=EXIF),
}


@pytest.fixture(scope="module")
def sick(tmp_path_factory) -> Source:
    """Every fault: unreadable, doubled, blank and tiny images; a class of one image, and two of none."""
    twin = encoded(picture(0))
    files = healthy(24) | BROKEN | KINDS
    files |= {"cats/twin.png": twin, "rare/one.png": twin, "cats/again.png": encoded(picture(2))}
    files |= {"cats/blank.png": encoded(Image.new("RGB", (48, 40), (9, 8, 7)))}
    files |= {"cats/tiny.png": encoded(picture(108, (3, 5))), "hollow/lonely.txt": b"no picture"}
    return opened(tmp_path_factory.mktemp("sick"), files)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_files_are_named_with_their_reasons_and_workers_change_nothing(sick, workers):
    found = examine(sick, DATA, workers=workers)
    bad = {sample.name: sample.reason for sample in found.bad}
    assert set(bad) == set(BROKEN)
    assert bad["cats/empty.jpg"] == "the file is empty (0 bytes)"
    assert "160,000 pixels, more than data.max_pixels" in bad["void/large.png"]
    kinds = {"PNG": 31, "JPEG": 1, "TIFF": 1, "grey": 2, "alpha": 1, "16 bits": 2, "rotated by EXIF": 1}
    assert found.kinds == kinds
    assert [48, 40] in found.images["size"].tolist()  # the rotated one is upright
    assert found.mean_std.tolist() == examine(sick, DATA).mean_std.tolist()


def test_images_without_files_have_kinds_channels_and_duplicates_too():
    five = replace(DATA, channels=5, mean=(0.5,) * 5, std=(0.5,) * 5)
    assert examine(ToySource(1), five).bad[0].reason == "has 3 channels, data.channels is 5"
    twice = ConcatSource([ToySource(5, bad=(4,)), ToySource(5, bad=(4,)), ToySource(5, seed=1)])
    found = [group["index"].tolist() for group in examine(twice, DATA).duplicates]
    assert found == [[i, i + 5] for i in range(4)]


def test_mean_and_deviation_count_every_readable_image_alike():
    source = ToySource(11, bad=(3,))
    images = torch.stack([image for i, image in enumerate(source.images) if i != 3]).double() / 255
    mean, std = examine(source, DATA).mean_std
    assert mean == pytest.approx(images.mean((0, 2, 3)).numpy())
    assert std == pytest.approx(images.std((0, 2, 3), correction=0).numpy())


def test_a_sample_is_drawn_and_examined_in_order_and_progress_is_reported():
    told = []
    source = ToySource(50, bad=range(40))
    found = examine(source, DATA, samples=9, progress=lambda *numbers: told.append(numbers))
    drawn = sorted([*found.images["index"].tolist(), *(bad.sample for bad in found.bad)])
    assert (len(set(drawn)), found.examined, told[-1]) == (9, 9, (9, len(found.bad)))


def test_all_planted_faults_are_found_and_named(sick, tmp_path):
    seen = {"cats/seen.png": encoded(picture(3)), "cats/004.png": encoded(picture(4))}
    val = examine(opened(tmp_path, healthy(4, first=500) | seen), DATA)
    limits = {"size_problem": "no", "per_core_s": 10.0, "images_per_s": 200.0, "cores": 4}
    told = checkup(sick, val=val, **limits)
    expected = {
        "too many unreadable files": (f"4 of {len(sick)} in ", "data.max_bad_fraction is 0.01"),
        "image size": ("no",),
        "leakage": ("2 of the 6 validation images", "(cats/004.png, cats/seen.png = dogs/003.png)"),
        "duplicates": ("3 of 33", "cats/000.png = cats/twin.png = rare/one.png, cats/002.png"),
        "small images": ("1 of 33 will be enlarged to 32x32 px (cats/tiny.png)",),
        "blank images": ("1 with one colour only (cats/blank.png)",),
        "empty classes": ("2 without a readable image (void, hollow)",),
        "unbalanced classes": ("20 images in cats, 1 in rare",),
        "slow decoding": ("need 20 workers, more than 4 cores",),
    }
    assert [finding.what for finding in told.findings] == list(expected)
    for finding in told.findings:
        assert all(part in finding.text for part in expected[finding.what]), finding
    assert [finding.severity for finding in told.findings] == ["problem"] * 3 + ["warning"] * 6
    report = json.loads(json.dumps(told.report()))
    assert report["verdict"] == "not fit for training: too many unreadable files, image size, leakage"
    assert report["train"]["duplicates"][0] == ["cats/000.png", "cats/twin.png", "rare/one.png"]
    assert report["train"]["blank"] == ["cats/blank.png"]
    assert report["leakage"] == [["cats/004.png", "cats/004.png"], ["cats/seen.png", "dogs/003.png"]]
    assert report["train"]["class_counts"]["void"] == 0


def test_only_a_folder_without_findings_is_healthy(tmp_path):
    source = opened(tmp_path / "a", healthy(12))
    told = checkup(source)
    assert (told.findings, told.verdict, told.report()["healthy"]) == ([], "healthy", True)
    sample = Checkup(train=examine(source, DATA, samples=5), data=DATA, model=MODEL)
    assert sample.verdict == "healthy, judging by 5 of 12 images"
    one = checkup(opened(tmp_path / "a", {"cats/twin.png": encoded(picture(0))}))
    assert one.verdict == "fit for training, but read the warnings first (1)"
    assert (one.report()["healthy"], one.report()["fit"]) == (False, True)
    many = {f"cats/x{i}.png": encoded(picture(0)) for i in range(3)}
    assert findings(checkup(opened(tmp_path / "a", many)))["duplicates"] == "problem"


@pytest.mark.parametrize(
    ("count", "fraction", "what"),
    [
        (1, 0.001, {"unreadable files": "warning"}),  # one is always allowed
        (3, 0.05, {"too many unreadable files": "problem"}),
        (40, 1.0, {"too many unreadable files": "problem"}),
    ],
)
def test_unreadable_files_are_a_problem_only_beyond_the_limit_of_a_run(count, fraction, what):
    told = checkup(ToySource(40, bad=range(count)), replace(AUTO, max_bad_fraction=fraction))
    told = replace(told, model=replace(MODEL, image_size=16))
    assert findings(told) == what
    assert bool(told.advice) == (count < 40)


def test_other_sizes_brightness_or_channels_than_the_settings_say_are_found(tmp_path):
    dark = {f"{i}.png": encoded(Image.eval(picture(i), lambda value: value // 4)) for i in range(3)}
    source = opened(tmp_path, dark)
    assert findings(checkup(source)) == {"normalisation": "warning"}
    assert "--data.normalize auto" in checkup(source).advice
    assert checkup(source, AUTO).findings == []
    assert findings(checkup(source, replace(DATA, mean=(0.5,), std=(0.2,)))) == {"normalisation": "problem"}
    large = replace(checkup(source, AUTO), model=replace(MODEL, image_size=48))
    assert large.findings[0].text.startswith("3 of 3 will be enlarged to 48x48 px")


def test_the_quick_look_finds_equal_lists_and_reads_nothing_from_a_server():
    train, val = ToySource(300), ToySource(300)
    assert str(shared_images(train, val)).startswith("200 of the 200 validation images compared are also")
    assert shared_images(train, ToySource(300, seed=1)) is None
    train.spec, val.reads = "https://host/x.tar", 0
    assert "the same list of images" in str(shared_images(train, val))
    assert val.reads == 0


def test_the_quick_look_finds_moved_and_renamed_files_and_skips_unreadable_ones(tmp_path):
    train = opened(tmp_path / "train", healthy(12) | {"cats/bad.png": b""})
    files = {"b/bad.png": b"", "b/003.png": encoded(picture(3)), "other/x.png": encoded(picture(5))}
    val = opened(tmp_path / "val", files | healthy(4, first=50))
    shared = shared_images(train, val)
    assert shared is not None
    assert dict(shared.pairs) == {"b/003.png": "dogs/003.png", "other/x.png": "dogs/005.png"}
    assert shared.num_compared == 6


def test_workers_are_advised_for_files_and_the_fast_decoder_for_large_photos():
    source = ToySource(3)
    source.in_memory = False
    found = found_of(source, [(600, 600)] * 3)
    found.kinds["JPEG"] = 3
    told = Checkup(train=found, data=DATA, model=MODEL, per_core_s=100.0, cores=8)
    assert {"--data.workers 7", "--data.decoder fast"} <= set(told.advice)
    assert "--data.workers 3" in replace(told, images_per_s=300.0).advice


def test_the_rate_is_that_of_training_crops():
    source, before = ToySource(5), torch.get_num_threads()
    assert (crops_per_core_s(source, DATA, 16) or 0) > 0
    assert (source.reads, torch.get_num_threads()) == (65, before)  # the first is not timed
    assert crops_per_core_s(ToySource(5, bad=range(5)), DATA, 16) is None


@pytest.mark.parametrize("images", [10, 20_000, 200_000, 2_000_000, 20_000_000])
def test_advised_settings_are_a_run_and_no_larger_than_the_images(images):
    source = type("Many", (ToySource,), {"__len__": lambda _: images})(3)
    for side in (1, 8, 31, 32, 40, 48, 63, 64, 100, 150, 200, 223, 224, 255, 256, 500, 4000):
        found = found_of(source, [(side, side + 9)] * 3)
        told = Checkup(train=found, data=AUTO, model=MODEL, per_core_s=100.0, cores=8)
        words = iter(" ".join(told.advice).split())
        given = {name.removeprefix("--"): value for name, value in zip(words, words, strict=True)}
        base = get_preset(given.pop("preset")).config
        config = resolve(base, {name: int(value) for name, value in given.items()})
        size = pair(config.model.image_size)[0]
        most = 128 if images < 50_000 else 224
        assert max(32, min(0.6 * side, most)) <= size <= max(32, side)
        assert config.model.num_blocks == 16


@pytest.fixture
def cli(capsys):
    return partial(call_cli, capsys)


@pytest.fixture
def images(tmp_path) -> Path:
    write_images(tmp_path / "images [b]:smile:", 12)
    return tmp_path / "images [b]:smile:"


def last_json(out: str) -> dict:
    return json.loads(out.splitlines()[-1])


def test_a_healthy_folder_is_reported_on_one_screen(cli, images):
    code, out, _ = cli("doctor", images, *FLAGS)
    lines = out.splitlines()
    assert (code, lines[-1], len(lines) <= 24) == (0, "healthy", True)
    assert lines[0] == f"training: {images}"  # neither markup nor emoji
    code, out, _ = cli("doctor", images, "--workers", 0, "--image_size", 224, "--json")
    assert (code, last_json(out)["verdict"]) == (1, "not fit for training: image size")


def test_a_run_starts_with_the_advised_flags(cli, images, tmp_path):
    code, out, _ = cli("doctor", images, "--workers", 0, "--json")
    assert code == 0
    flags = " ".join(last_json(out)["advice"]).split()
    more = ("--data.train", images, "--out", tmp_path / "run", "--train.duration", "1st", "--data.workers", 0)
    quiet = ("--monitor.tensorboard", "false", "--monitor.pictures_every", "null", "--train.device", "cpu")
    assert cli("pretrain", *flags, *more, *quiet)[0] == 0


def test_too_many_unreadable_files_end_with_code_1_and_all_are_written(cli, tmp_path):
    write_images(tmp_path / "broken", 12, broken=12)
    out_file = tmp_path / "new" / "report.json"
    code, out, _ = cli("doctor", tmp_path / "broken", *FLAGS, "--out", out_file, "--json")
    lines = out.splitlines()
    assert (code, lines[-2]) == (1, "not fit for training: too many unreadable files")
    assert sum(line.startswith("    broken_") for line in lines) == 10
    assert "    ... and 2 more; --out FILE.json lists all" in lines
    told = last_json(out)
    assert told == json.loads(out_file.read_text())
    assert [bad["name"] for bad in told["train"]["bad"]] == [f"broken_{i:02d}.png" for i in range(12)]


def test_several_sources_are_one_compared_with_validation_and_a_cut_archive_is_a_problem(
    cli, images, tmp_path
):
    write_images(tmp_path / "same", 3)
    path = tmp_path / "cut.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(images, "images")
    path.write_bytes(path.read_bytes()[:-12_000])
    val = ("--val", tmp_path / "same", "--images_per_s", 1e6)
    code, out, _ = cli("doctor", path, tmp_path / "same", *FLAGS, *val, "--json")
    told = last_json(out)
    assert (code, told["verdict"]) == (1, "not fit for training: damaged archives, leakage, duplicates")
    assert len(told["train"]["duplicates"]) == len(told["leakage"]) == 3
    assert told["train"]["damaged_shards"][0]["shard"] == "cut.tar"
    assert told["workers_needed"] > told["cores"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere",), "there is no such directory"),
        (("digits", "--samples", 0), "samples is '0'; it must be a whole number from 1 or none"),
        (("digits", "--images_per_s", ".nan"), "images_per_s is '.nan'; it must be a number"),
        (("digits", "--out", "/dev/null/x.json"), "cannot be written; name"),
    ],
)
def test_wrong_usage_ends_with_code_2_before_anything_is_read(cli, words, message):
    assert message in refused(cli("doctor", *words))
