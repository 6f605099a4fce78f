"""The doctor finds every fault that was planted and none where there is none; its advice can be typed."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
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
from nextblock.data.doctor import IMAGE, Examination, check, crops_per_core_s, examine, shared_images
from nextblock.presets import get_preset, resolve
from test_data_decode import encode, exif
from tiny_runs import call_cli, refused, write_images
from toy import ToySource

# A machine with few cores is warned of more workers than cores, which is what some tests want.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

DATA = DataConfig(max_pixels=100_000)
AUTO = replace(DATA, normalize="auto")
MODEL = ModelConfig(image_size=32, patch_size=4, block_size=2, embed_dim=24, depth=1, num_heads=3)
FLAGS = ("--workers", 0, "--image_size", 16, "--patch_size", 4, "--block_size", 2, "--data.normalize", "auto")


def picture(seed: int) -> Image.Image:
    """Noise of ImageNet's mean and deviation."""
    noise = np.random.default_rng(seed).normal((0.485, 0.456, 0.406), 0.22, (40, 48, 3))
    return Image.fromarray((255 * np.clip(noise, 0, 1)).astype(np.uint8))


def opened(root: Path, files: dict[str, bytes]) -> Source:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return open_source(str(root), DATA)


def healthy(count: int, first: int = 0) -> dict[str, bytes]:
    seeds = range(first, first + count)
    return {f"{('cats', 'dogs')[seed % 2]}/{seed:03d}.png": encode(picture(seed)) for seed in seeds}


def checked(source: Source, data: DataConfig = DATA, size: int = 32, **options: Any) -> dict[str, Any]:
    return check(examine(source, data, **options), None, data, replace(MODEL, image_size=size))


def advice(source: Source, side: int, decoder: Any = "auto", **rates: Any) -> dict[str, str]:
    """What is advised for three JPEGs of this shorter side."""
    images = np.zeros(3, IMAGE)
    images["size"] = side, side + 9
    report = examine(ToySource(3), DATA).report
    report |= {"kinds": Counter(JPEG=3), "sides_px": {"shorter": (side, side, side)}}
    data = replace(AUTO, decoder=decoder)
    rates = {"per_core_s": 100.0, "cores": 8} | rates
    return check(Examination(source, images, report), None, data, MODEL, **rates)["advice"]


def severities(report: dict[str, Any]) -> dict[str, str]:
    return {finding["what"]: finding["severity"] for finding in report["findings"]}


BROKEN = {
    "cats/truncated.jpg": encode(picture(100), "JPEG")[:60],
    "cats/empty.jpg": b"",
    "void/large.png": encode(Image.new("L", (400, 400))),
}
SIXTEEN = Image.fromarray((np.arange(40 * 48).reshape(40, 48) * 30).astype(np.uint16))
ODD = {
    "cats/sixteen.png": encode(SIXTEEN),
    "cats/sixteen.tif": encode(SIXTEEN, "TIFF"),
    "cats/alpha.png": encode(picture(101).convert("RGBA")),
    "cats/rotated.jpg": encode(picture(103), "JPEG", exif=exif(6)),
    "cats/twin.png": encode(picture(0)),
    "rare/one.png": encode(picture(0)),
    "cats/blank.png": encode(Image.new("RGB", (48, 40), (9, 8, 7))),
}


@pytest.mark.parametrize("workers", [0, 2])
def test_all_planted_faults_are_found_and_named_whatever_the_number_of_workers(tmp_path, workers):
    sick = opened(tmp_path / "sick", healthy(24) | BROKEN | ODD)
    seen = {"cats/seen.png": encode(picture(3)), "cats/004.png": encode(picture(4))}
    val = examine(opened(tmp_path / "val", healthy(4, first=500) | seen), DATA)
    train = examine(sick, DATA, workers=workers)
    kinds = {"PNG": 29, "JPEG": 1, "TIFF": 1, "grey": 2, "alpha": 1, "16 bits": 2, "rotated by EXIF": 1}
    assert train.report["kinds"] == kinds
    assert [48, 40] in train.images["size"].tolist()  # the rotated one is upright
    rates: dict[str, Any] = {"per_core_s": 10.0, "images_per_s": 200.0, "cores": 4}
    report = check(train, val, DATA, replace(MODEL, image_size=48), size_problem="no", **rates)
    report = json.loads(json.dumps(report))
    expected = {
        "too many unreadable files": (f"3 of {len(sick)} in ", "data.max_bad_fraction is 0.01"),
        "image size": ("no",),
        "leakage": ("2 of the 6 validation images", "(cats/004.png, cats/seen.png = dogs/003.png)"),
        "duplicates": ("2 of 31", "cats/000.png = cats/twin.png = rare/one.png"),
        "small images": ("31 of 31 will be enlarged to 48x48 px",),
        "blank images": ("1 with one colour only (cats/blank.png)",),
        "empty classes": ("1 without a readable image (void)",),
        "slow decoding": ("need 20 workers, more than 4 cores",),
    }
    for finding, (what, parts) in zip(report["findings"], expected.items(), strict=True):
        assert finding["what"] == what
        assert all(part in finding["text"] for part in parts), finding
    assert list(severities(report).values()) == ["problem"] * 3 + ["warning"] * 5
    assert report["verdict"] == "not fit for training: too many unreadable files, image size, leakage"
    reasons = {bad["name"]: bad["reason"] for bad in report["train"]["bad"]}
    assert set(reasons) == set(BROKEN)
    assert "160,000 pixels, more than data.max_pixels" in reasons["void/large.png"]
    assert report["train"]["class_counts"] == {"cats": 18, "dogs": 12, "rare": 1, "void": 0}
    assert report["leakage"] == [["cats/004.png", "cats/004.png"], ["cats/seen.png", "dogs/003.png"]]


def test_images_without_files_have_channels_duplicates_and_statistics_too():
    five = replace(DATA, channels=5, mean=(0.5,) * 5, std=(0.5,) * 5)
    assert examine(ToySource(1), five).report["bad"][0]["reason"] == "has 3 channels, data.channels is 5"
    source = ToySource(11, bad=(3,))
    twice = ConcatSource([source, source, ToySource(5, seed=1)])
    found = examine(twice, DATA).report["duplicates"]
    assert found == [[twice.name(i), twice.name(i + 11)] for i in range(11) if i != 3]
    images = torch.stack([image for i, image in enumerate(source.images) if i != 3]).double() / 255
    mean, std = examine(source, DATA).report["mean_std"]
    assert mean == pytest.approx(images.mean((0, 2, 3)).numpy())
    assert std == pytest.approx(images.std((0, 2, 3), correction=0).numpy())


def test_only_a_folder_without_findings_is_healthy(tmp_path):
    source, done = opened(tmp_path, healthy(12)), []
    report = checked(source)
    assert (report["findings"], report["verdict"], report["healthy"]) == ([], "healthy", True)
    sample = checked(source, samples=5, progress=done.append)
    assert (sample["verdict"], done) == ("healthy, judging by 5 of 12 images", [1, 2, 3, 4, 5])
    one = checked(opened(tmp_path, {"cats/twin.png": encode(picture(0))}))
    assert one["verdict"] == "fit for training, but read the warnings first (1)"
    assert (one["healthy"], one["fit"]) == (False, True)
    many = {f"cats/x{i}.png": encode(picture(0)) for i in range(3)}
    assert severities(checked(opened(tmp_path, many)))["duplicates"] == "problem"
    dark = {f"{i}.png": encode(Image.eval(picture(i), lambda value: value // 4)) for i in range(3)}
    report = checked(source := opened(tmp_path / "dark", dark))
    assert severities(report) == {"normalisation": "warning"}
    assert "--data.normalize auto" in report["advice"]
    assert checked(source, AUTO)["findings"] == []


@pytest.mark.parametrize(
    ("count", "fraction", "what"),
    [
        (1, 0.001, {"unreadable files": "warning"}),  # one is always allowed
        (3, 0.05, {"too many unreadable files": "problem"}),
        (40, 1.0, {"too many unreadable files": "problem"}),
    ],
)
def test_unreadable_files_are_a_problem_only_beyond_the_limit_of_a_run(count, fraction, what):
    report = checked(ToySource(40, bad=range(count)), replace(AUTO, max_bad_fraction=fraction), size=16)
    assert severities(report) == what
    assert bool(report["advice"]) == (count < 40)


def test_the_quick_look_finds_equal_lists_and_reads_nothing_from_a_server():
    train, val = ToySource(300), ToySource(300)
    assert str(shared_images(train, val)).startswith("200 of the 200 validation images compared are also")
    assert shared_images(train, ToySource(300, seed=1)) is None
    train.spec, val.reads = "https://host/x.tar", 0
    assert "the same list of images" in str(shared_images(train, val))
    assert val.reads == 0


def test_the_quick_look_finds_moved_and_renamed_files_and_skips_unreadable_ones(tmp_path):
    train = opened(tmp_path / "train", healthy(12) | {"cats/bad.png": b""})
    files = {"b/bad.png": b"", "b/003.png": encode(picture(3)), "other/x.png": encode(picture(5))}
    shared = shared_images(train, opened(tmp_path / "val", files | healthy(4, first=50)))
    assert shared == ([("b/003.png", "dogs/003.png"), ("other/x.png", "dogs/005.png")], 6)


def test_workers_are_advised_for_files_and_the_fast_decoder_for_large_photos():
    source = ToySource(3)
    source.in_memory = False
    assert {"--data.workers 7", "--data.decoder fast"} <= set(advice(source, 600))
    assert "--data.workers 3" in advice(source, 600, images_per_s=300.0)


def test_the_rate_is_that_of_training_crops():
    source, before = ToySource(5), torch.get_num_threads()
    assert (crops_per_core_s(source, DATA, 16) or 0) > 0
    assert (source.reads, torch.get_num_threads()) == (65, before)  # the first is not timed
    assert crops_per_core_s(ToySource(5, bad=range(5)), DATA, 16) is None


@pytest.mark.parametrize("images", [10, 20_000, 200_000, 2_000_000, 20_000_000])
def test_advised_settings_are_a_run_and_no_larger_than_the_images(images):
    source = type("Many", (ToySource,), {"__len__": lambda _: images})(3)
    for side in (1, 31, 32, 40, 63, 64, 100, 150, 200, 223, 224, 255, 256, 500, 4000):
        words = iter(" ".join(advice(source, side, decoder="pillow")).split())
        given = {name.removeprefix("--"): value for name, value in zip(words, words, strict=True)}
        base = get_preset(given.pop("preset")).config
        config = resolve(base, {name: int(value) for name, value in given.items()})
        size = pair(config.model.image_size)[0]
        assert max(32, min(0.6 * side, 128 if images < 50_000 else 224)) <= size <= max(32, side)
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


def test_grey_images_and_few_of_them_are_advised_on(cli, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encode(Image.new("L", (64, 64), i)))
    advised = last_json(cli("doctor", tmp_path, "--workers", 0, "--json")[1])["advice"]
    assert advised["--data.channels 1"] == "all images are grey"
    assert advised["--preset xtra-small-64"].startswith("3 images, fewer than 1,000; see")
    advised = last_json(cli("doctor", "digits", "--workers", 0, "--json")[1])["advice"]
    assert "--data.channels 1" not in advised


def test_preset_and_channels_set_the_normalisation_as_in_pretraining(cli, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encode(Image.new("RGB", (64, 64), (i, 9, 9))))
    assert "warning: normalisation" in cli("doctor", tmp_path, "--workers", 0)[1]
    assert "normalisation" not in cli("doctor", tmp_path, "--workers", 0, "--model", "xtra-small-64")[1]
    assert cli("doctor", tmp_path, "--workers", 0, "--data.channels", 1)[0] == 0


def test_unreadable_files_are_listed_on_the_screen_up_to_10_and_all_in_the_file(cli, tmp_path):
    write_images(tmp_path / "broken", 12, broken=12)
    out_file = tmp_path / "new" / "report.json"
    code, out, _ = cli("doctor", tmp_path / "broken", *FLAGS, "--out", out_file, "--json")
    lines = out.splitlines()
    assert (code, lines[-2]) == (1, "not fit for training: too many unreadable files")
    assert sum(line.startswith("    broken_") for line in lines) == 10
    assert "    ... and 2 more; --out FILE.json lists all" in lines
    assert last_json(out) == (told := json.loads(out_file.read_text()))
    assert cli("doctor", tmp_path / "broken", *FLAGS, "--out", out_file)[0] == 1  # an earlier report
    assert [bad["name"] for bad in told["train"]["bad"]] == [f"broken_{i:02d}.png" for i in range(12)]


def test_several_sources_are_one_compared_with_validation_and_a_cut_archive_is_a_problem(
    cli, images, tmp_path
):
    write_images(tmp_path / "same", 3)
    path = tmp_path / "cut.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(images, "images")
    path.write_bytes(path.read_bytes()[:-12_000])
    code, out, _ = cli("doctor", path, tmp_path / "same", *FLAGS, "--val", tmp_path / "same", "--json")
    told = last_json(out)
    assert (code, told["verdict"]) == (1, "not fit for training: damaged archives, leakage, duplicates")
    assert len(told["train"]["duplicates"]) == len(told["leakage"]) == 3
    assert told["train"]["damaged_shards"][0]["shard"] == "cut.tar"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere",), "there is no such directory"),
        (("digits", "--samples", 0), "samples is '0'; it must be a whole number from 1 or none"),
        (("digits", "--out", "/dev/null/x.json"), "cannot make or write the directory /dev/null"),
        (("digits", "--out", "/"), "--out / cannot be written; name another file"),
        (("digits", "--out", "/dev/null"), "--out /dev/null exists and is no report; name another file"),
        (("digits", "--out", __file__), "test_doctor.py exists and is no report; name another file"),
    ],
)
def test_wrong_usage_ends_with_code_2_before_anything_is_read(cli, words, message):
    assert message in refused(cli("doctor", *words))
