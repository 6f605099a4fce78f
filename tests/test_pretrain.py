"""What `nextblock.pretrain` makes of sources and settings before and around the loop."""

import logging
import shlex
import shutil
import signal
from dataclasses import replace

import pytest
import torch

import nextblock
from nextblock import pretraining
from nextblock.interop import load_model
from nextblock.presets import get_preset, resolve
from tiny_runs import (
    TINY,
    TINY_FLAGS,
    Quiet,
    assert_same_end,
    call_cli,
    metrics,
    refused,
    run_toy,
    write_images,
)

pytestmark = pytest.mark.usefixtures("coarse_pictures")


def write_classes(folder, words):
    for name in words.split():
        write_images(folder / name, 8)


def pretrain(tmp_path, reporter=None, changes=None, *, sources=("train", "val")):
    config, data = resolve(TINY, changes or {}), {name: str(tmp_path / name) for name in sources}
    return nextblock.pretrain(config, out=tmp_path / "my run", reporter=reporter or Quiet(), data=data)


@pytest.mark.parametrize(
    ("train", "val", "reason"),
    [
        ("cat dog", "cat dog", None),
        ("cat dog", "dog emu", None),
        ("2021 2022", "2023 2024", "have no class in common (2021, 2022, 2023 and 1 more)"),
        ("cat", "cat", "there is only one class"),
        (".", ".", "have no labels; the first folders of a directory are classes"),
    ],
)
def test_knn_is_measured_on_common_classes_or_the_reason_is_told_once(tmp_path, train, val, reason):
    write_classes(tmp_path / "train", train)
    write_classes(tmp_path / "val", val)
    reporter = Quiet()
    pretrain(tmp_path, reporter, {"monitor.knn_every": "1ep"})
    assert any("knn/top1" in line for line in metrics(tmp_path / "my run", "monitor")) == (reason is None)
    assert any("--test" in note for note in reporter.notes) == (train == val != ".")
    told = [note for note in reporter.notes if "kNN is not measured" in note]
    assert len(told) == (reason is not None)
    assert not told or told[0].endswith(reason)


def test_measurements_tell_how_far_they_are_and_the_untrained_encoder_is_not_beside_the_loss(tmp_path):
    for name in ("train", "val"):
        write_classes(tmp_path / name, "cat dog")
    images = {name: len(list((tmp_path / name).rglob("*.png"))) for name in ("train", "val")}
    pretrain(tmp_path, reporter := Quiet(), {"monitor.knn_every": "2st"})
    first, _, third, *_ = reporter.ticks
    assert metrics(tmp_path / "my run", "monitor")[0]["step"] == 0
    assert "knn/top1" not in first.latest
    assert "knn/top1" in third.latest
    together = sum(images.values())
    assert ("features", together, together) in reporter.measured
    assert ("the validation loss", images["val"], images["val"]) in reporter.measured


def test_a_complete_run_ends_with_its_losses_and_commands_that_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nextblock.train.trainer.Trainer.reference_losses", lambda *_: {"zero": 9.0})
    folder, reporter = tmp_path / "my images", Quiet()
    for name in ("train", "val"):
        write_classes(folder / name, "cat dog")
    result, out = pretrain(folder, reporter), folder / "my run"
    ended = reporter.notes.index(f"complete: 7 steps, in {out}")
    losses, where, *commands = reporter.notes[ended + 1 :]
    assert losses == f"loss {result.losses['loss']:.4f} (zero 9.00) · val {result.losses['val_loss']:.4f}"
    assert where == f"weights: {out}/checkpoints/step_00000007/model.safetensors; next:"
    assert [shlex.split(command)[1] for command in commands] == ["knn", "predict", "convert"]
    assert f"--test {shlex.quote(str(folder / 'val'))}" in commands[0]
    assert f"--data {shlex.quote(str(folder / 'val'))}" in commands[1]
    for command in commands:
        code, _, err = call_cli(capsys, *shlex.split(command)[1:])
        assert code == 0, err


@pytest.mark.parametrize(
    ("preset", "images", "is_told"), [("xtra-ti16", 49_999, True), ("xtra-tiny", 3, False)]
)
def test_a_preset_for_more_images_is_told(preset, images, is_told):
    config = resolve(get_preset(preset).config, {"preset": preset})
    told = (
        "xtra-ti16 suits 50,000 images or more, as a rule of thumb, not 49,999. docs/guides/when_it_pays.md"
    )
    assert any(hint.startswith(told) for hint in pretraining._hints(config, images)) == is_told


def test_a_run_that_learned_nothing_does_not_end_as_complete(tmp_path, monkeypatch):
    monkeypatch.setattr("nextblock.train.trainer.Trainer.reference_losses", lambda *_: {"zero": 0.0})
    write_images(tmp_path / "train", 8)
    reporter, run = Quiet(), tmp_path / "my run"
    pretrain(tmp_path, reporter, {"monitor.knn_every": "1ep"}, sources=("train",))
    ended = reporter.notes.index(f"ended without learning: 7 steps, in {run}")
    assert "is not below 0.0000, that of predicting zero" in reporter.notes[ended + 1]
    assert all(line.keys() == {"kind", "step", "rankme"} for line in metrics(run, "monitor")), "no kNN"


def test_a_run_resumes_from_its_own_settings_with_those_given_and_with_images_that_have_moved(
    tmp_path, capsys
):
    write_images(tmp_path / "train", 8)
    run = tmp_path / "exp[lr=3]"
    words = ("pretrain", *TINY_FLAGS, "--out", run, "--data.train", tmp_path / "train")
    assert call_cli(capsys, *words)[0] == 0
    shutil.rmtree(run / "checkpoints")
    code, _, err = call_cli(capsys, "pretrain", f"--out={run}", "--data.max_bad_fraction", "0.5")
    assert (code, metrics(run)[-1]["step"]) == (0, 3)
    assert f"3 steps, in {run}" in err
    (tmp_path / "train").rename(tmp_path / "moved")
    words = ("pretrain", "--data.train", tmp_path / "moved", "--out", run)
    assert call_cli(capsys, *words)[0] == 0
    error = refused(call_cli(capsys, *words, "--train.duration", "4st"))
    assert "another run (train.duration: 3st there, 4st now); choose" in error, "all others are the run's own"
    assert "--model.init" in error


def test_a_micro_batch_larger_than_the_batch_is_the_whole_batch_and_a_long_warm_up_is_pointed_out(
    tmp_path, caplog
):
    changes = {"optim.warmup": "3st", "train.duration": "3st"}
    run_toy(tmp_path / "whole", changes)
    run_toy(tmp_path / "larger", {**changes, "train.micro_batch_size": 64})
    assert_same_end(tmp_path / "whole", tmp_path / "larger", 3)
    assert "optim.warmup 3st is 3 steps, train.duration 3st only 3: the rate never reaches" in caplog.text


def test_a_run_stopped_before_its_first_step_claims_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(Quiet, "begin", lambda *_: signal.raise_signal(signal.SIGINT))
    write_images(tmp_path / "train", 8)
    reporter = Quiet()
    result = pretrain(tmp_path, reporter, sources=("train",))
    assert (result.step, result.stopped_by) == (0, "SIGINT")
    assert reporter.notes[-1] == "stopped by SIGINT before the first step: nothing to save yet"


def test_a_validation_set_without_a_readable_image_has_no_loss(tmp_path):
    write_images(tmp_path / "train", 8)
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "1.png").touch()
    pretrain(tmp_path)
    assert {line["val_loss"] for line in metrics(tmp_path / "my run", "val")} == {None}


def test_pretraining_goes_on_from_an_official_xtra_file(golden_dir, tmp_path, caplog):
    file = golden_dir / "xtra_k2.ckpt"
    official = load_model(file, num_heads=3)
    changes = {"data.train": "digits", "data.val_resize_px": 64, "train.duration": "2st"}
    config = replace(resolve(TINY, changes), model=replace(official.config, init=str(file)))
    with caplog.at_level(logging.INFO):
        nextblock.pretrain(config, out=tmp_path / "run", reporter=Quiet())
    told = [message.strip() for message in caplog.messages]
    assert "does not record its attention heads; assuming 3" in told[0]
    assert told[1].endswith(f"{len(official.state_dict())} tensors loaded")
    assert not any(message.startswith(("fresh", "unused")) for message in told)
    trained = load_model(tmp_path / "run").state_dict()
    for name, tensor in official.state_dict().items():
        assert not torch.equal(trained[name], tensor) or tensor.std() == 0, name
        torch.testing.assert_close(trained[name], tensor, atol=0.01, rtol=0)
