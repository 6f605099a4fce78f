"""Settings: what is refused and how, durations, the way to YAML and back, what makes two runs the same."""

from __future__ import annotations

import ast
import copy
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import yaml

import nextblock.config
from nextblock.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    MonitorConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    pair,
)
from nextblock.presets import resolve
from nextblock.settings import Duration, flatten, from_dict, nearest_name, to_dict


def refuses(make, *parts):
    """The call raises a ValueError whose message has all these parts."""
    with pytest.raises(ValueError) as caught:
        make()
    for part in parts:
        assert part in str(caught.value), str(caught.value)


# --------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"image_size": 224}, ("blocks of 4x4 patches", "use model.image_size 192 or 256")),
        (
            {"image_size": (128, 200), "patch_size": 8, "block_size": (4, 2)},
            ("128x200 px", "blocks of 4x2 patches", "128x192 or 128x208"),
        ),
        ({"image_size": 32}, ("use model.image_size 64,",)),
        ({"image_size": 100}, ("100x100 px", "16-px patches", "96 or 112")),
    ],
)
def test_a_grid_that_does_not_divide_is_refused_with_the_nearest_sizes(settings, parts):
    refuses(lambda: ModelConfig(**settings), *parts)


@pytest.mark.parametrize("size", [192, 256, (128, 192)])
def test_the_sizes_that_the_message_names_are_accepted(size):
    assert ModelConfig(image_size=size).num_blocks == pair(size)[0] * pair(size)[1] // 64**2


def test_derived_numbers_count_rows_before_columns():
    config = ModelConfig(image_size=(32, 96), patch_size=8, block_size=(2, 3), in_chans=1)
    assert (config.grid, config.num_patches) == ((4, 12), 48)
    assert (config.block_grid, config.num_blocks, config.patches_per_block) == ((2, 4), 8, 6)
    assert (config.block_px, config.block_values) == ((16, 24), 16 * 24)


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.depth", 0, "a whole number from 1"),
        ("model.depth", True, "a whole number"),
        ("model.depth", "\uff11\uff12", "a whole number"),
        ("model.depth", "012", "a whole number"),
        ("model.depth", "1:30", "a whole number"),
        ("model.block_mlp_dim", 0, "a whole number from 1 or null"),
        ("model.block_size", (2, 0), "one whole number from 1, or two: 64, 32,64 or 32x64"),
        ("model.block_size", 2.0, "one whole number"),
        ("model.block_size", (1, 2, 3), "one whole number"),
        ("model.norm_eps", 0.0, "a number above 0"),
        ("model.drop_path", 1.0, "from 0 to below 1"),
        ("model.order", "diagonal", "raster or spiral or checkerboard"),
        ("model.tokenizer", "hf:a/b", "kmeans or null"),
        ("model.vocab_size", 1, "from 2"),
        ("data.train", 3, "text or a list, each text or null"),
        ("data.weights", (0.5, 0.0), "each a number above 0"),
        ("data.flip", 1.5, "from 0 to 1"),
        ("data.flip", True, "a number"),
        ("data.mean", (123.7,) * 3, "divide values of bytes by 255"),
        ("data.std", (0.2, 0.0, 0.2), "above 0"),
        ("data.workers", -1, "from 0"),
        ("optim.lr", float("nan"), "a number from 0"),
        ("optim.lr", "1,5", "a number"),
        ("optim.betas", (0.9, 1.0), "a list of 2, each a number from 0 to below 1"),
        ("optim.clip_grad", 0.0, "above 0 or null"),
        ("optim.warmup", "15", "(epochs)"),
        ("train.duration", "2.5%", "800ep (epochs), 500000st (steps), 2000000sa (samples)"),
        ("train.duration", "0ep", "800ep"),
        ("train.precision", "fp8", "auto or fp32 or bf16 or fp16"),
        ("train.compile", 1, "true or false"),
        ("checkpoint.every", "30", "30min (minutes)"),
        ("checkpoint.keep_every", "30min", "800ep"),
        ("monitor.pictures_every", 20, "800ep"),
        ("seed", -1, "from 0"),
        ("seed", None, "a whole number from 0"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name_and_what_it_must_be(name, value, message):
    refuses(lambda: resolve(RunConfig(), {name: value}), f"{name} is {value!r}; it must be ", message)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: ModelConfig(embed_dim=100, num_heads=3), ("model.embed_dim 100", "model.num_heads 3")),
        (lambda: ModelConfig(predictor_heads=5), ("model.predictor_dim 768", "model.predictor_heads 5")),
        (lambda: ModelConfig(num_predicted_blocks=16), ("is 16", "only 16 blocks", "at most 15")),
        (lambda: ModelConfig(predictor_block_size=4), ("model.predictor_block_size 4 needs", "block_causal")),
        (
            lambda: ModelConfig(predictor_attention="block_causal", predictor_block_size=3),
            ("predictor_block_size 3 does not divide a grid of 16x16",),
        ),
        (lambda: ModelConfig(predictor_attention="full", prefix=True), ("no model.prefix",)),
        (
            lambda: ModelConfig(predictor_attention="causal", predictor="mlp"),
            ("a predictor mlp has no attention",),
        ),
        (lambda: ModelConfig(encoder_attention="full"), ("needs model.feature_attention full",)),
        (
            lambda: ModelConfig(positions="sincos", embed_dim=90, num_heads=3),
            ("model.embed_dim 90 cannot be divided among the sines", "use 88 or 92"),
        ),
        (
            lambda: ModelConfig(positions="sincos", predictor_dim=90, predictor_heads=3),
            ("model.predictor_dim 90", "use 88 or 92"),
        ),
        (lambda: ModelConfig(tokenizer="kmeans", loss="l1"), ("model.loss l1", "cross-entropy")),
        (lambda: ModelConfig(tokenizer="kmeans", norm_pixels=False), ("norm_pixels False", "for pixels")),
        (lambda: DataConfig(crop_scale=(0.5, 0.3)), ("data.crop_scale is (0.5, 0.3)", "(smallest, largest)")),
        (lambda: DataConfig(crop_scale=(0.0, 1.0)), ("data.crop_scale", "above 0")),
        (lambda: DataConfig(mean=(0.5,)), ("1 channels", "data.std 3")),
        (lambda: DataConfig(train=()), ("data.train or data.weights is empty",)),
        (lambda: DataConfig(train=("A", "B", "A")), ("names a source twice", "A")),
        (lambda: DataConfig(train=("A", "B"), weights=(1.0,)), ("names 2 sources", "data.weights 1")),
        (
            lambda: DataConfig(color_jitter=(0.4, 0.4, 0.2, 0.6)),
            ("data.color_jitter is", "(hue) at most 0.5"),
        ),
        (lambda: DataConfig(val_crop="border", normalize="auto"), ("data.val_crop border", "center or")),
        (lambda: RunConfig(model=ModelConfig(in_chans=1)), ("data.channels is 3", "model.in_chans is 1")),
        (lambda: RunConfig(data=DataConfig(val_resize_px=255)), ("val_resize_px is 255", "image_size 256")),
        (
            lambda: RunConfig(model=ModelConfig(predictor=None)).check_trainable(),
            ("model.predictor is null",),
        ),
        (
            lambda: RunConfig(model=ModelConfig(block_size=16)).check_trainable(),
            ("no next block", "smaller model.block_size"),
        ),
        (
            lambda: RunConfig(train=TrainConfig(precision="fp16", device="cpu")).check_trainable(),
            ("fp16 needs a GPU",),
        ),
        (
            lambda: resolve(RunConfig(), {"data.normalize": "auto", "data.mean": (0.5,) * 3}),
            ("data.normalize auto measures", "but data.mean is given"),
        ),
    ],
)
def test_what_cannot_be_together_is_refused(make, parts):
    refuses(make, *parts)


# ----------------------------------------------------------------------------------------- what a value means


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        *(("model.image_size", given, (64, 128)) for given in ("64,128", "64x128", "(64, 128)", "[64, 128]")),
        *(("model.image_size", given, (64, 128)) for given in ([64, 128], (64, 128), "64 x 128")),
        ("model.image_size", "128", 128),
        ("model.block_size", "2x4", (2, 4)),
        ("optim.lr", "1e-3", 0.001),
        ("optim.lr", 1, 1),
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
    found = resolve(RunConfig(), {name: given})
    for part in name.split("."):
        found = getattr(found, part)
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


def test_channels_that_contradict_each_other_are_refused():
    refuses(lambda: resolve(RunConfig(), {"data.channels": 1, "model.in_chans": 3}), "data.channels is 1")


@pytest.mark.parametrize(("size", "resize_px"), [(256, 300), (128, 150), ((64, 192), 225)])
def test_the_validation_size_follows_the_image_size(size, resize_px):
    model = ModelConfig(image_size=size)
    assert RunConfig(model=model).data.val_resize_px == DataConfig().resize_px(size) == resize_px
    assert resolve(RunConfig(), {"model.image_size": size}).data.val_resize_px == resize_px
    told = resolve(RunConfig(), {"model.image_size": size}, {"data.val_resize_px": 400})
    assert told.data.val_resize_px == 400


# -------------------------------------------------------------------------------------------------- durations


@pytest.mark.parametrize(
    ("text", "steps"),
    [("3ep", 30), ("0.5ep", 5), ("7st", 7), ("640sa", 10), (" 2 ep ", 20), ("2.5%", 5), ("100%", 200)],
)
def test_a_duration_counts_in_steps(text, steps):
    duration = Duration.parse(text, allow=("ep", "st", "sa", "%"))
    assert duration.steps(batch_size=64, steps_per_epoch=10, total_steps=200) == steps


def test_minutes_are_read_where_they_are_allowed():
    assert Duration.parse("1.5min", allow=("st", "min")) == Duration(value=1.5, unit="minutes")


@pytest.mark.parametrize(
    "text", ["", "10", "-3ep", "3 epochs", "1e3st", "30min", "5%", "3ep4st", "½ep", "\uff13ep"]
)
def test_what_is_no_duration_is_refused_with_examples(text):
    refuses(lambda: Duration.parse(text), repr(text), "800ep (epochs)", "500000st (steps)", "2000000sa")


# ------------------------------------------------------------------------------------------- to and from YAML

UNUSUAL = RunConfig(
    preset="xtra-b16",
    seed=7,
    model=ModelConfig(image_size=(64, 128), block_size=(2, 4), predictor_dim=96, order="random"),
    data=DataConfig(train=("DIR", "digits"), weights=(0.8, 0.2), mean=(0.5, 0.5, 0.5), workers=0),
    optim=OptimConfig(lr=3e-4, end_lr=1e-6, betas=(0.9, 0.999), clip_grad=None),
    train=TrainConfig(duration="500st", micro_batch_size=2, precision="fp32"),
    checkpoint=CheckpointConfig(every="100st", keep_every="1ep"),
    monitor=MonitorConfig(pictures_every=None),
)


@pytest.mark.parametrize("config", [RunConfig(), UNUSUAL], ids=["default", "unusual"])
def test_a_config_comes_back_from_yaml_as_it_was(config):
    assert from_dict(RunConfig, yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config


def test_an_unknown_key_is_refused_with_the_nearest_known_one():
    refuses(lambda: from_dict(RunConfig, {"model": {"blok_size": 2}}), "'blok_size'", "'block_size'")
    refuses(lambda: resolve(RunConfig(), {"optim.lrr": 2}), "'optim.lrr'", "did you mean 'optim.lr'?")


def test_a_name_like_no_other_is_answered_with_all_known_ones():
    assert nearest_name("zzz", ["alpha", "beta"]) == "known: alpha, beta"


def test_keys_that_are_left_out_keep_their_defaults_and_a_retired_one_is_skipped():
    older = {"model": {"depth": 3, "token_px": None}}
    assert from_dict(RunConfig, older) == RunConfig(model=ModelConfig(depth=3))


def test_dotted_names_are_settings_too():
    assert from_dict(RunConfig, flatten(to_dict(UNUSUAL))) == UNUSUAL


# ---------------------------------------------------------------------------------------- the same run or not


def test_a_run_is_the_same_as_itself():
    assert UNUSUAL.differences(from_dict(RunConfig, to_dict(UNUSUAL))) == {}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (replace(UNUSUAL, seed=8), {"seed": (7, 8)}),
        (
            replace(UNUSUAL, model=replace(UNUSUAL.model, block_size=(4, 2))),
            {"model.block_size": ([2, 4], [4, 2])},
        ),
        (
            replace(UNUSUAL, optim=replace(UNUSUAL.optim, clip_grad=1.0), seed=1),
            {"optim.clip_grad": (None, 1.0), "seed": (7, 1)},
        ),
    ],
)
def test_a_setting_that_decides_the_weights_makes_another_run(changed, expected):
    assert UNUSUAL.differences(changed) == expected


def test_only_what_does_not_decide_the_weights_is_free():
    def changed(config, name, value):
        copied = copy.deepcopy(config)
        object.__setattr__(copied, name, value)
        return copied

    free = []
    for dotted in flatten(to_dict(UNUSUAL)):
        section, _, name = dotted.rpartition(".")
        part = changed(getattr(UNUSUAL, section), name, "another") if section else "another"
        if not UNUSUAL.differences(changed(UNUSUAL, section or name, part)):
            free.append(dotted)
    unsaid = [name for name in free if not name.startswith(("checkpoint.", "monitor."))]
    places = ["data.train", "data.val", "data.workers", "data.max_bad_fraction", "data.cache_dir"]
    assert unsaid == ["preset", *places, "data.cache_gb", "train.device"]
    assert len(free) - len(unsaid) == len(fields(CheckpointConfig)) + len(fields(MonitorConfig))


# ---------------------------------------------------------------------------------------------- documentation


def test_every_setting_has_a_sentence_under_it_and_every_section_is_frozen():
    tree = ast.parse(Path(nextblock.config.__file__).read_text())
    for cls in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for field, after in zip(cls.body, [*cls.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{cls.name}.{ast.unparse(field.target)}"
    for section in fields(RunConfig):
        if is_dataclass(value := getattr(RunConfig(), section.name)):
            with pytest.raises(AttributeError):
                setattr(value, fields(value)[0].name, None)
