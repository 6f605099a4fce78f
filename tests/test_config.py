"""Settings: what is refused and how, durations, the way to YAML and back, what makes two runs the same."""

from __future__ import annotations

import copy
import re
from dataclasses import fields, replace

import numpy as np
import pytest
import yaml

from nextblock.cli.arguments import sentences
from nextblock.config import CheckpointConfig, DataConfig, ModelConfig, MonitorConfig, PackConfig, RunConfig
from nextblock.presets import get_preset, resolve
from nextblock.settings import Duration, flatten, from_dict, setting_types, to_dict, typed


def test_derived_numbers_count_rows_before_columns():
    config = ModelConfig(image_size=(32, 96), patch_size=8, block_size=(2, 3), in_chans=1)
    assert (config.grid, config.num_patches) == ((4, 12), 48)
    assert (config.block_grid, config.num_blocks, config.patches_per_block) == ((2, 4), 8, 6)
    assert (config.block_px, config.block_values) == ((16, 24), 16 * 24)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.depth", 0, "a whole number from 1"),
        *(("model.depth", v, "a whole number") for v in (True, "\uff11\uff12", "012", "1:30", "9" * 5000)),
        ("model.block_mlp_dim", 0, "a whole number from 1 or none"),
        ("model.block_size", (2, 0), "one whole number from 1, or two: 64, 32,64 or 32x64"),
        *(("model.block_size", v, "one whole number") for v in (2.0, (1, 2, 3))),
        ("model.norm_eps", 0.0, "a number above 0"),
        ("model.drop_path", 1.0, "from 0 to below 1"),
        ("model.order", "diagonal", "fixed_random, random or per_image"),
        ("data.train", 3, "text, a list, each text or none"),
        ("data.weights", (0.5, 0.0), "a list of numbers above 0"),
        ("data.flip", True, "a number"),
        ("data.color_jitter", (0.4, 0.4, 0.2, 0.6), "the last (hue) at most 0.5"),
        ("data.mean", (123.7,) * 3, "divide values of bytes by 255"),
        ("data.workers", -1, "from 0"),
        ("optim.lr", float("nan"), "a number from 0"),
        ("optim.lr", "1,5", "a number"),
        ("optim.betas", (0.9, 1.0), "a list of 2 numbers from 0 to below 1"),
        ("optim.warmup", "15", "(epochs)"),
        ("train.duration", "2.5%", "800ep (epochs), 500000st (steps), 2000000sa (samples)"),
        ("train.duration", "0ep", "800ep"),
        ("train.compile", 1, "true or false"),
        ("checkpoint.every", "30", "30min (minutes)"),
        ("monitor.pictures_every", 20, "800ep"),
        ("seed", None, "a whole number from 0"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name_and_what_it_must_be(name, value, message):
    shown = repr(value) if isinstance(value, str) else typed(value)
    with pytest.raises(ValueError) as caught:
        resolve(RunConfig(), {name: value})
    assert f"{name} is {shown}; it must be " in str(caught.value)
    assert message in str(caught.value)


FEATURES = {"target": "features", "teacher": "timm:NAME"}
IDENTITY = {"predictor": "identity", "target": "embedding"}
MASKED = {"mask_ratio": 0.5, "order": "per_image", "feature_attention": "full"}
FALSE, ONE, NATIVE = (True, "false"), (2, "1"), ("block_causal", "native")


@pytest.mark.parametrize(
    ("changes", "contradicting"),
    [
        ({"encoder_attention": "full"}, {"feature_attention": ("causal", "full")}),
        ({"positions": "rope"}, {"bias": (False, "true"), "patch_norm": FALSE, "qk_scale": (0.5, "none")}),
        ({"rope_rescale": 2.0}, {"positions": ("learned", "rope")}),
        ({"qk_scale": 0.5}, {"qk_norm": ("plain", "none")}),
        (
            {"class_token": True},
            {"prefix": FALSE, "mask_ratio": (0.5, "none"), "predictor_attention": NATIVE},
        ),
        ({"predictor_block_size": 4}, {"predictor_attention": ("native", "block_causal")}),
        ({"predictor_attention": "full"}, {"prefix": FALSE, "predictor": ("mlp", "transformer")}),
        ({"target": "tokens"}, {"loss": ("l1", "mse"), "norm_pixels": (False, "true")}),
        ({"predictor": "identity"}, {"target": ("pixels", "embedding")}),
        (IDENTITY, {"num_predicted_blocks": ONE}),
        ({"target_positions": True}, {"predictor": ("linear", "transformer or mlp")}),
        ({"target_positions": True}, {"num_predicted_blocks": ONE, "predictor_attention": NATIVE}),
        ({"predict_visible": True}, {"target": ("pixels", "features")}),
        ({"predict_visible": True, **FEATURES}, {"prefix": FALSE}),
        (MASKED, {"prefix": FALSE, "target_positions": FALSE, "order": ("random", "per_image")}),
        (MASKED, {"num_predicted_blocks": ONE, "feature_attention": ("causal", "full")}),
        (MASKED | FEATURES, {"predict_visible": FALSE}),
    ],
)
def test_what_a_setting_of_the_model_needs_of_others_is_told(changes, contradicting):
    name, value = next(iter(changes.items()))
    for other, (given, needed) in contradicting.items():
        message = f"model.{name} {typed(value)} needs model.{other} {needed}, not {typed(given)}"
        with pytest.raises(ValueError, match=re.escape(message)):
            resolve(RunConfig(), {"model": changes | {other: given}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.image_size": 224}, "blocks of 4x4 patches of 16 px; use model.image_size 192 or 256,"),
        ({"model.image_size": (128, 200), "model.patch_size": 8}, "image_size 128x192 or 128x224,"),
        ({"model.image_size": 32}, "use model.image_size 128,"),
        ({"model.image_size": 100}, "100x100 px cannot be cut into 16-px patches; use model.image_size 128,"),
        ({"model.embed_dim": 100}, "embed_dim 100 is not divisible by model.num_heads 12"),
        ({"model.predictor_heads": 5}, "predictor_dim 768 is not divisible by model.predictor_heads 5"),
        ({"model.positions": "sincos", "model.embed_dim": 90, "model.num_heads": 3}, "90 cannot be divided"),
        ({"model.positions": "sincos", "model.predictor_dim": 90, "model.predictor": "mlp"}, "use 88 or 92"),
        ({"model.positions": "rope", "model.embed_dim": 60}, "head width divisible by 4, not 5"),
        ({"model.num_predicted_blocks": 16}, "only 16 blocks; predict at most 15"),
        ({"model.predictor_attention": "block_causal", "model.predictor_block_size": 3}, "a grid of 16x16"),
        ({"model.target": "features"}, "model.target features needs model.teacher"),
        ({"model.teacher": "timm:NAME"}, "model.target features needs model.teacher"),
        ({"model.mask_ratio": 1.0}, "above 0, below 1"),
        ({"data.crop_scale": (0.5, 0.3)}, "data.crop_scale is 0.5,0.3; it must be smallest,largest"),
        ({"data.crop_scale": (0.0, 1.0)}, "above 0"),
        ({"data.mean": (0.5,)}, "1 channel and data.std 3"),
        ({"data.train": ()}, "data.train or data.weights is empty"),
        ({"data.train": ("A", "B", "A")}, "names a source twice"),
        ({"data.train": ("A", "B"), "data.weights": (1.0,)}, "names 2 sources and data.weights 1"),
        ({"data.val_crop": "border", "data.normalize": "auto"}, "data.val_crop border fills with data.mean"),
        ({"data.channels": 1, "model.in_chans": 3}, "data.channels is 1, model.in_chans is 3"),
        ({"data.val_resize_px": 255}, "val_resize_px is 255, smaller than model.image_size 256"),
        ({"data.normalize": "auto", "data.mean": (0.5,) * 3}, "measures data.mean and data.std, but data."),
    ],
)
def test_what_cannot_be_together_is_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(RunConfig(), changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.predictor": None}, "model.predictor is none"),
        ({"model.block_size": 16}, "no next block; use a smaller model.block_size"),
        ({"train.precision": "fp16", "train.device": "cpu"}, "fp16 needs a GPU"),
    ],
)
def test_what_can_encode_but_not_train_is_refused_for_training_alone(changes, message):
    config = resolve(RunConfig(), changes)
    with pytest.raises(ValueError, match=message):
        config.check_trainable()


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        *(("model.image_size", given, (64, 128)) for given in ("64,128", "64x128", "(64, 128)", (64, 128))),
        *(("model.image_size", given, (64, 128)) for given in ([64, 128], "[64, 128]", "64 x 128")),
        ("model.image_size", "128", 128),
        ("model.block_size", "2x4", (2, 4)),
        ("optim.lr", "1e-3", 0.001),
        ("optim.lr", 1, 1),
        ("optim.lr", np.float64(0.001), 0.001),
        ("model.depth", np.int64(2), 2),
        ("data.mean", np.full(3, 0.5), (0.5, 0.5, 0.5)),
        ("optim.betas", "0.8,0.9", (0.8, 0.9)),
        ("data.max_pixels", "1_000_000", 1_000_000),
        *(("train.compile", given, True) for given in ("yes", "on", "true", "True", True)),
        ("data.val", "no", "no"),
        ("data.val", "2024-01-01", "2024-01-01"),
        ("data.train", "[a,b", "[a,b"),
        ("data.train", ["a", "b"], ("a", "b")),
    ],
)
def test_a_value_is_read_by_its_settings_type(name, given, expected):
    section, field = name.split(".")
    found = getattr(getattr(resolve(RunConfig(), {name: given}), section), field)
    assert found == expected
    assert type(found) is type(expected)


def test_a_home_folder_is_found_and_a_folder_called_tilde_x_is_left_alone(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert DataConfig(train=("~/a", "~x", "b~/c")).train == ("/home/me/a", "~x", "b~/c")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data.channels": 1}, (1, 1, (0.459,), (0.226,), "given")),
        ({"model.in_chans": 1}, (1, 1, (0.459,), (0.226,), "given")),
        ({"data.channels": 1, "data.mean": (0.1,), "data.std": (0.2,)}, (1, 1, (0.1,), (0.2,), "given")),
        ({"data.channels": 5}, (5, 5, RunConfig().data.mean, RunConfig().data.std, "auto")),
    ],
)
def test_channels_bring_what_follows_from_them(changes, expected):
    data = (config := resolve(RunConfig(), changes)).data
    assert (data.channels, config.model.in_chans, data.mean, data.std, data.normalize) == expected
    assert resolve(config, {"data.channels": 3, "data.normalize": "given"}).data == RunConfig().data


@pytest.mark.parametrize(
    ("base", "size", "resize_px"),
    [
        *((RunConfig(), size, px) for size, px in ((256, 300), (128, 150), ((64, 192), 225))),
        (get_preset("xtra-h14").config, 448, 512),
        (get_preset("xtra-tiny").config, 64, 64),
    ],
)
def test_the_validation_size_follows_the_image_size_in_the_ratio_of_the_preset(base, size, resize_px):
    assert resolve(base, {"model.image_size": size}).data.val_resize_px == resize_px
    told = resolve(base, {"model.image_size": size}, {"data.val_resize_px": 600})
    assert told.data.val_resize_px == 600
    if base == RunConfig():
        assert RunConfig(model=ModelConfig(image_size=size)).data.val_resize_px == resize_px


@pytest.mark.parametrize(
    ("text", "steps"),
    [("3ep", 30), ("0.5ep", 5), ("7st", 7), ("640sa", 10), (" 2 ep ", 20), ("2.5%", 5), ("100%", 200)],
)
def test_a_duration_counts_in_steps(text, steps):
    duration = Duration.parse(text, allow=("ep", "st", "sa", "%"))
    assert duration.steps(batch_size=64, steps_per_epoch=10, total_steps=200) == steps


@pytest.mark.parametrize(
    "text", ["", "10", "-3ep", "3 epochs", "1e3st", "30min", "3ep4st", "½ep", "\uff13ep"]
)
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match=r"800ep \(epochs\), 500000st"):
        Duration.parse(text)


UNUSUAL = resolve(
    RunConfig(preset="xtra-b16", seed=7, checkpoint=CheckpointConfig(every="100st", keep_every="1ep")),
    {"model.image_size": (64, 128), "model.block_size": (2, 4), "model.order": "random"},
    {"data.train": ("DIR", "digits"), "data.weights": (0.8, 0.2), "data.mean": (0.5,) * 3},
    {"optim.lr": 3e-4, "optim.betas": (0.9, 0.999), "optim.clip_grad": None, "train.duration": "500st"},
    {"train.micro_batch_size": 2, "train.precision": "fp32", "monitor.pictures_every": None},
)


@pytest.mark.parametrize("config", [RunConfig(), UNUSUAL], ids=["default", "unusual"])
def test_a_config_comes_back_from_yaml_and_from_dotted_names(config):
    assert from_dict(RunConfig, yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config
    assert from_dict(RunConfig, flatten(to_dict(config))) == config


def test_keys_that_are_left_out_keep_their_defaults_and_a_retired_one_is_skipped():
    older = {"model": {"depth": 3, "token_px": None}}
    assert from_dict(RunConfig, older) == RunConfig(model=ModelConfig(depth=3))


def test_only_what_does_not_decide_the_weights_is_no_difference():
    assert UNUSUAL.differences(copy.deepcopy(UNUSUAL)) == {}
    changed = replace(UNUSUAL, model=replace(UNUSUAL.model, block_size=(4, 2)), seed=8)
    assert UNUSUAL.differences(changed) == {"seed": (7, 8), "model.block_size": ([2, 4], [4, 2])}
    free = []
    for dotted in flatten(to_dict(UNUSUAL)):
        changed = copy.deepcopy(UNUSUAL)
        section, _, name = dotted.rpartition(".")
        object.__setattr__(getattr(changed, section) if section else changed, name, "another")
        if not UNUSUAL.differences(changed):
            free.append(dotted)
    unsaid = [name for name in free if not name.startswith(("checkpoint.", "monitor."))]
    places = ["data.train", "data.val", "data.workers", "data.max_bad_fraction", "data.cache_dir"]
    assert unsaid == ["preset", "model.teacher", *places, "data.cache_gb", "train.strategy", "train.device"]
    assert len(free) - len(unsaid) == len(fields(CheckpointConfig)) + len(fields(MonitorConfig))


def test_every_setting_has_a_sentence_under_it():
    for name, _, _, owner in [*setting_types(RunConfig), *setting_types(PackConfig)]:
        assert sentences(owner).get(name.rpartition(".")[2]), name
