"""What `nextblock.pretrain` makes of sources and settings before and around the loop."""

from __future__ import annotations

import logging
import math
import re
import signal
from dataclasses import replace

import pytest
import torch

import nextblock
from nextblock.cli.arguments import resolve
from nextblock.interop import load_model
from nextblock.models.vit import sincos_positions
from tiny_runs import TINY, Quiet, metrics, run_toy, settings, write_images


def write_classes(folder, names):
    for name in names:
        write_images(folder / name, 8)


def pretrain(tmp_path, reporter=None, **overrides):
    data = {"train": str(tmp_path / "train"), "val": str(tmp_path / "val")}
    return nextblock.pretrain(
        TINY, out=tmp_path / "run", reporter=reporter or Quiet(), data=data, **overrides
    )


def test_folders_that_are_no_common_classes_train_without_knn(tmp_path):
    write_classes(tmp_path / "train", ["2021", "2022"])
    write_classes(tmp_path / "val", ["2023", "2024"])
    result = pretrain(tmp_path, **{"monitor.knn_every": "1ep"})
    assert result.step == result.total_steps
    assert not any("knn/top1" in line for line in metrics(tmp_path / "run", "monitor"))


def test_folders_of_the_same_classes_are_measured_by_knn(tmp_path):
    write_classes(tmp_path / "train", ["cat", "dog"])
    write_classes(tmp_path / "val", ["cat", "dog"])
    pretrain(tmp_path, **{"monitor.knn_every": "1ep"})
    assert any("knn/top1" in line for line in metrics(tmp_path / "run", "monitor"))


def test_a_micro_batch_larger_than_the_batch_is_the_whole_batch(tmp_path):
    whole = run_toy(tmp_path / "whole")
    larger = run_toy(tmp_path / "larger", {"train.micro_batch_size": 64})
    assert (whole.step, metrics(tmp_path / "whole")[-1]["loss"]) == (
        larger.step,
        metrics(tmp_path / "larger")[-1]["loss"],
    )


def test_channels_that_do_not_agree_are_refused_before_a_directory_is_made(tmp_path):
    grey = {"model.in_chans": 1, "data.channels": 3}
    with pytest.raises(ValueError, match=r"data.channels is 3, model.in_chans is 1; give one of them"):
        run_toy(tmp_path / "run", grey)
    assert not (tmp_path / "run").exists()


def test_a_warm_up_as_long_as_the_run_is_pointed_out(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run_toy(tmp_path / "run", {"optim.warmup": "7st"})
    assert (
        "optim.warmup 7st is 7 steps, train.duration 7st only 7: the rate never reaches its peak"
        in caplog.text
    )


def test_a_run_stopped_before_its_first_step_claims_no_checkpoint(tmp_path):
    write_classes(tmp_path / "train", ["cat"])
    write_classes(tmp_path / "val", ["cat"])

    class Stopping(Quiet):
        def begin(self, step: int, total_steps: int) -> None:
            signal.raise_signal(signal.SIGINT)

    reporter = Stopping()
    result = pretrain(tmp_path, reporter)
    assert (result.step, result.stopped_by) == (0, "SIGINT")
    assert reporter.notes[-1] == "stopped by SIGINT before the first step: nothing to save yet"


def test_the_default_preset_gets_the_hint_about_another_batch_as_well():
    from nextblock.cli.pretrain import _hints
    from nextblock.presets import get_preset

    config = settings({"train.batch_size": 16, "optim.lr": get_preset("xtra-b16").config.optim.lr})
    assert config.preset is None
    assert any("batch 16 instead of 256" in hint for hint in _hints(config))


def test_a_validation_set_without_a_readable_image_has_no_loss(tmp_path):
    write_images(tmp_path / "train", 8)
    (tmp_path / "val").mkdir()
    for i in range(3):
        (tmp_path / "val" / f"{i}.png").write_bytes(b"")
    pretrain(tmp_path, **{"monitor.pictures_every": None})
    assert {line["val_loss"] for line in metrics(tmp_path / "run", "val")} == {None}


# -------------------------------------------------------------------------------- going on from other weights


def go_on_from(src, tmp_path, model, caplog):
    """Train two steps from `src`; the weights before the first, and what was said of them."""
    config = resolve(TINY, {"data.train": "digits", "data.val_resize_px": 64, "train.duration": "2st"})
    config = replace(config, model=replace(model, init=str(src)))
    with caplog.at_level(logging.INFO):
        result = nextblock.pretrain(config, out=tmp_path / "run", reporter=Quiet())
    assert result.step == 2
    assert all(math.isfinite(line["loss"]) for line in metrics(tmp_path / "run", "train"))
    return load_model(tmp_path / "run"), [message.strip() for message in caplog.messages]


def test_pretraining_goes_on_from_an_official_xtra_file(golden_dir, tmp_path, caplog):
    official = load_model(golden_dir / "xtra_k2.ckpt", num_heads=3)
    trained, told = go_on_from(golden_dir / "xtra_k2.ckpt", tmp_path, official.config, caplog)
    assert "does not tell its attention heads; taken to be 3 as here" in told[0]
    assert told[1].endswith(f"{len(official.state_dict())} tensors loaded")
    assert not any(message.startswith(("fresh", "unused")) for message in told)
    for name, tensor in trained.state_dict().items():
        assert not torch.equal(tensor, official.state_dict()[name]) or tensor.std() == 0, name
        torch.testing.assert_close(tensor, official.state_dict()[name], atol=0.01, rtol=0)


def test_an_aim_encoder_in_this_packages_format_goes_on_under_xtras_predictor(golden_dir, tmp_path, caplog):
    nextblock.convert(golden_dir / "aim_nano_backbone.pth", tmp_path / "aim", num_heads=3)
    aim = load_model(tmp_path / "aim")
    model = replace(
        aim.config,
        image_size=56,
        block_size=2,
        predictor="transformer",
        projection_dim=32,
        predictor_dim=16,
        predictor_depth=1,
        predictor_heads=2,
        block_mlp_dim=32,
    )
    trained, told = go_on_from(tmp_path / "aim", tmp_path, model, caplog)
    fresh = next(message for message in told if message.startswith("fresh"))
    assert {group.split(".")[0] for group in re.findall(r"\S+(?= \()", fresh)} == {"predictor"}
    assert not any("to go on from the same function" in message for message in told)
    for name, tensor in aim.encoder.state_dict().items():
        if name != "pos_embed":
            torch.testing.assert_close(trained.encoder.state_dict()[name], tensor, atol=0.01, rtol=0)
    assert torch.equal(trained.get_parameter("encoder.pos_embed"), sincos_positions((4, 4), 48))
