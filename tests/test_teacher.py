"""The teacher of `model.target features`: what it sees, what it is no part of, and what is refused."""

import json
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch.nn.functional import interpolate
from torch.testing import assert_close

import nextblock
from nextblock.config import IMAGENET_MEAN, IMAGENET_STD
from nextblock.interop import attach_teacher, load_model
from tiny_runs import TINY, Quiet, write_images, write_teacher
from toy import tiny_images, tiny_model

MEAN, STD = (0.2, 0.3, 0.4), (0.5, 0.6, 0.7)


def student(settings, **changes) -> Any:
    own = {name.removeprefix("model."): value for name, value in settings.items()}
    return tiny_model(1, **{**own, **changes})


@pytest.mark.parametrize("size", [8, (8, 12), (16, 24)])
@pytest.mark.parametrize("grey", [False, True])
def test_targets_are_unit_features_of_the_same_image_as_the_teacher_takes_it(tmp_path, size, grey):
    path = tmp_path / "teacher.safetensors"
    settings = write_teacher(path, image_size=size, patch_size=2)
    model, images = student(settings, in_chans=1 if grey else 3), tiny_images()[:, : 1 if grey else 3]
    mean, std = (MEAN[:1], STD[:1]) if grey else (MEAN, STD)
    attach_teacher(model, mean, std)
    pixels = images * torch.tensor(std).view(-1, 1, 1) + torch.tensor(mean).view(-1, 1, 1)
    pixels = pixels.expand(2, 3, 16, 24) - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    pixels = pixels / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    teacher = load_model(path)
    rows, columns = teacher.config.grid
    resized = interpolate(pixels, size=(2 * rows, 2 * columns), mode="bicubic", antialias=True)
    features = teacher.encode(resized).tokens.unflatten(1, (rows, columns)).permute(0, 3, 1, 2)
    features = interpolate(features, size=(4, 6), mode="bilinear")
    expected = features / features.norm(dim=1, keepdim=True)
    found = model.targets_of(images, torch.arange(6))
    for block in range(6):
        row, column = divmod(block, 3)
        of_block = expected[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(2).mT
        assert_close(found[:, block], of_block, atol=1e-5, rtol=1e-4)


def test_the_teacher_is_no_part_of_the_model_does_not_learn_and_is_needed_only_to_predict(tmp_path):
    settings = write_teacher(tmp_path / "teacher.safetensors")
    model = student(settings)
    before = list(model.state_dict()), list(model.parameters()), list(model.modules())
    model.encode(tiny_images())
    with pytest.raises(ValueError, match=r"features of .*, which is not loaded; .*attach_teacher"):
        model(tiny_images())
    attach_teacher(model, MEAN, STD)
    assert before == (list(model.state_dict()), list(model.parameters()), list(model.modules()))
    teacher = model.targets.teacher.teacher
    model.train()
    model(tiny_images()).loss.backward()
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_teacher_of_timm_sees_images_by_its_own_mean_and_deviation(tmp_path):
    own = {"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    save_for_hf(timm.create_model("test_vit", num_classes=0), tmp_path / "timm", model_config=own)
    settings = {"target": "features", "teacher": f"timm:local-dir:{tmp_path / 'timm'}", "teacher_dim": 64}
    model: Any = tiny_model(**settings)
    attach_teacher(model, MEAN, STD)
    teacher = model.targets.teacher
    assert teacher.own_mean.flatten().tolist() == [0.5] * 3
    assert teacher.own_std.flatten().tolist() == [0.25] * 3


def test_parts_of_the_loss_are_logged_apart_if_visible_blocks_are_predicted(tmp_path):
    settings = write_teacher(tmp_path / "teacher.safetensors")
    result = pretrain(tmp_path, **settings, **{"model.predict_visible": True})
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    (line,) = (one for one in lines if one["kind"] == "train")
    assert (line["loss_next"] + line["loss_visible"]) / 2 == pytest.approx(line["loss"], rel=1e-5)
    assert result.losses["loss_next"] == line["loss_next"]


def pretrain(tmp_path, **changes):
    write_images(tmp_path / "images", 8)
    values = {"data.train": str(tmp_path / "images"), "train.duration": "1st", **changes}
    return nextblock.pretrain(TINY, out=tmp_path / "run", reporter=Quiet(), **values)


def test_a_run_records_its_teacher_and_resumes_with_the_same_weights_alone(tmp_path):
    path = tmp_path / "teacher.safetensors"
    settings = {**write_teacher(path), "model.teacher_dim": None}
    pretrain(tmp_path, **settings)
    config = load_model(tmp_path / "run").config
    assert (config.teacher, config.teacher_dim, len(config.teacher_digest or "")) == (str(path), 12, 16)
    pretrain(tmp_path, **settings)
    moved = path.rename(tmp_path / "moved.safetensors")
    with pytest.raises(ValueError, match=r"has moved, give its new place: --model.teacher PLACE"):
        pretrain(tmp_path, **settings)
    longer = {"model.teacher": str(moved), "train.duration": "1st"}
    assert pretrain(tmp_path, **{**settings, **longer}).step == 1
    write_teacher(path, seed=5)
    with pytest.raises(ValueError, match=r"have changed since training started"):
        pretrain(tmp_path, **settings)
    model: Any = load_model(tmp_path / "run")
    with pytest.raises(ValueError, match=r"have changed since training started .* put the old ones back"):
        attach_teacher(model, MEAN, STD)


@pytest.mark.parametrize(
    ("teacher", "changes", "message"),
    [
        ({}, {"model.teacher": "nowhere.safetensors"}, "nowhere.safetensors does not exist"),
        ({}, {"model.teacher": "timm:vit_tiny_path16_224"}, "vit_tiny_patch16_224"),
        (
            {},
            {"model.teacher_dim": 13},
            "are 12 wide, and model.teacher_dim is 13; leave model.teacher_dim out",
        ),
        ({"in_chans": 1}, {}, "images of 1 channel, and model.in_chans is 3; choose a teacher with"),
        ({}, {"model.teacher": None}, "model.target features needs model.teacher"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path, teacher, changes, message
):
    settings = {**write_teacher(tmp_path / "teacher.safetensors", **teacher), **changes}
    with pytest.raises((ValueError, RuntimeError), match=message):
        pretrain(tmp_path, **settings)
    assert not (tmp_path / "run").exists()
