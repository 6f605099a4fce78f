"""Mean and deviation by which a run normalises, measured on its own images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from nextblock.cli.pretrain import run
from nextblock.config import DataConfig
from nextblock.data import eval_batches, open_source
from nextblock.data.loader import measure_pixels
from nextblock.evaluate.features import evaluation_data
from nextblock.pretraining import pretrain
from tiny_runs import TINY, Quiet


@pytest.fixture
def folder(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(12):
        pixels = rng.normal((60, 120, 200), (10, 40, 20), (20 + number, 24, 3)).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / f"{number:02d}.png")
    return tmp_path / "images"


def measured(folder: Path, seed: int = 0, most: int = 1000, **settings):
    data = DataConfig(val_resize_px=16, **settings)
    return measure_pixels(open_source(str(folder), data), data, 12, seed, most=most)


def test_they_are_the_mean_and_deviation_of_all_pixels_of_the_readable_centre_crops(folder) -> None:
    data = DataConfig(val_resize_px=16)
    batches = eval_batches(open_source(str(folder), data), data, 12, 5)
    pixels = torch.cat([batch.images for batch in batches]).double() / 255
    (folder / "99.png").write_bytes(b"nothing")
    found = measured(folder)
    assert found.images == 12
    assert found.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-6)
    assert found.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-6)


def test_a_sample_is_drawn_by_the_seed_and_hangs_on_no_workers(folder) -> None:
    assert measured(folder, seed=1, most=4) == measured(folder, seed=1, most=4, workers=2)
    assert measured(folder, seed=1, most=4) != measured(folder, seed=2, most=4)
    assert measured(folder, most=4).images == 4


def test_none_readable_and_a_channel_that_never_changes_are_refused(folder) -> None:
    for number, path in enumerate(sorted(folder.iterdir())):
        pixels = np.full((16, 16, 3), 77, dtype=np.uint8)
        pixels[..., 0] = number
        pixels[::2, :, 2] = 5
        Image.fromarray(pixels).save(path)
    with pytest.raises(ValueError, match=r"channel 1 of 3 has the same value everywhere in 12 images"):
        measured(folder)
    for path in folder.iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"none of 12 images .* 00.png: not an image"):
        measured(folder)


def train_on(folder: Path, out: Path, **changes) -> tuple[dict, list[str]]:
    """The data settings that the run recorded, and its notes."""
    reporter = Quiet()
    settings = {"data.train": str(folder), "data.normalize": "auto", "train.duration": "2st", **changes}
    pretrain(TINY, out=out, reporter=reporter, **settings)
    return yaml.safe_load((out / "config.yaml").read_text())["data"], reporter.notes


def test_a_run_keeps_what_was_measured_and_goes_on_with_it(folder, tmp_path, monkeypatch) -> None:
    data, notes = train_on(folder, tmp_path / "run")
    assert data["mean"] == pytest.approx([60 / 255, 120 / 255, 200 / 255], abs=0.02)
    assert any("mean" in note and "measured on 12 images" in note for note in notes)

    def must_not(*_, **__):
        raise AssertionError("measured anew")

    monkeypatch.setattr("nextblock.pretraining.measure_pixels", must_not)
    assert train_on(folder, tmp_path / "run")[0] == data
    evaluated = evaluation_data(str(tmp_path / "run"), TINY.model)
    assert [list(evaluated.mean), list(evaluated.std)] == [data["mean"], data["std"]]
    assert run(["--config", str(tmp_path / "run" / "config.yaml"), "--out", str(tmp_path / "run")]) == 0
    with pytest.raises(AssertionError, match="anew"):
        train_on(folder, tmp_path / "other")


def test_auto_beside_given_numbers_is_refused(folder, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"but data.mean is given; leave data.mean out, or set data.norm"):
        train_on(folder, tmp_path / "run", **{"data.mean": (0.5, 0.5, 0.5)})
    words = ["--data.train", str(folder), "--data.normalize", "auto", "--out", str(tmp_path / "run")]
    with pytest.raises(ValueError, match=r"but data.std is given"):
        run([*words, "--data.std=[0.5,0.5,0.5]"])
