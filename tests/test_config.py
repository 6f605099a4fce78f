"""Settings: what is refused and how, durations, the way to YAML and back, what makes two runs the same."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Literal

import pytest
import yaml

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
from nextblock.settings import Duration, check_types, flatten, from_dict, nearest_name, to_dict


def refuses(make, *parts):
    """The call raises a ValueError whose message has all these parts."""
    with pytest.raises(ValueError) as caught:
        make()
    for part in parts:
        assert part in str(caught.value), str(caught.value)


# --------------------------------------------------------------------------------------------------- geometry


def test_a_grid_that_the_block_does_not_divide_is_refused_with_the_nearest_sizes():
    with pytest.raises(ValueError) as caught:
        ModelConfig(image_size=224, patch_size=16, block_size=4)
    message = str(caught.value)
    assert "14x14 patches" in message
    assert "blocks of 4x4" in message
    assert "use model.image_size 192 or 256" in message


@pytest.mark.parametrize("size", [192, 256])
def test_the_sizes_that_the_message_names_are_accepted(size):
    assert ModelConfig(image_size=size, patch_size=16, block_size=4).num_blocks == (size // 64) ** 2


def test_an_oblong_image_is_told_oblong_sizes():
    refuses(
        lambda: ModelConfig(image_size=(128, 200), patch_size=8, block_size=(4, 2)),
        "16x25 patches",
        "blocks of 4x2",
        "[128, 192] or [128, 208]",
    )


def test_an_image_smaller_than_a_block_is_told_the_one_larger_size():
    refuses(lambda: ModelConfig(image_size=32, patch_size=16, block_size=4), "use model.image_size 64,")


def test_an_image_of_broken_patches_is_refused_with_the_nearest_sizes():
    refuses(lambda: ModelConfig(image_size=100, patch_size=16), "100x100 px", "16-px patches", "96 or 112")


def test_derived_numbers_count_rows_before_columns():
    config = ModelConfig(image_size=(32, 96), patch_size=8, block_size=(2, 3), in_chans=1)
    assert (config.grid, config.num_patches) == ((4, 12), 48)
    assert (config.block_grid, config.num_blocks, config.patches_per_block) == ((2, 4), 8, 6)
    assert (config.block_px, config.block_values) == ((16, 24), 16 * 24)


def test_one_number_stands_for_both_sides():
    assert pair(4) == pair((4, 4)) == (4, 4)
    assert pair((4, 2)) == (4, 2)


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: ModelConfig(embed_dim=100, num_heads=3), ("model.embed_dim 100", "model.num_heads 3")),
        (lambda: ModelConfig(predictor_heads=5), ("model.predictor_dim 768", "model.predictor_heads 5")),
        (lambda: ModelConfig(depth=0), ("model.depth is 0", "at least 1")),
        (lambda: ModelConfig(block_mlp_dim=0), ("model.block_mlp_dim is 0",)),
        (lambda: ModelConfig(block_size=(2, 0)), ("model.block_size is (2, 0)",)),
        (lambda: ModelConfig(block_size=-1), ("model.block_size is -1",)),
        (lambda: ModelConfig(norm_eps=0.0), ("model.norm_eps is 0.0", "above 0")),
        (lambda: ModelConfig(mlp_ratio=-4.0), ("model.mlp_ratio is -4.0", "above 0")),
        (lambda: ModelConfig(drop_path=1.0), ("model.drop_path is 1.0", "[0, 1)")),
        (lambda: ModelConfig(num_predicted_blocks=16), ("is 16", "only 16 blocks", "at most 15")),
        (lambda: DataConfig(crop_scale=(0.5, 0.3)), ("data.crop_scale is (0.5, 0.3)", "(smallest, largest)")),
        (lambda: DataConfig(crop_scale=(0.0, 1.0)), ("data.crop_scale", "above 0")),
        (lambda: DataConfig(flip=1.5), ("data.flip is 1.5", "[0, 1]")),
        (lambda: DataConfig(mean=(0.5,)), ("1 channels", "data.std 3")),
        (lambda: DataConfig(std=(0.2, 0.0, 0.2)), ("data.std", "above 0")),
        (lambda: DataConfig(workers=-1), ("data.workers is -1",)),
        (lambda: DataConfig(max_bad_fraction=2.0), ("data.max_bad_fraction is 2.0",)),
        (lambda: OptimConfig(lr=-1.0), ("optim.lr is -1.0",)),
        (lambda: OptimConfig(lr=float("nan")), ("optim.lr is nan", "finite")),
        (lambda: OptimConfig(betas=(0.9, 1.0)), ("optim.betas", "[0, 1)")),
        (lambda: OptimConfig(clip_grad=0.0), ("optim.clip_grad is 0.0", "null for none")),
        (lambda: OptimConfig(warmup="15"), ("'15' is not a duration", "2.5%")),
        (lambda: TrainConfig(duration="2.5%"), ("'2.5%' is not a duration here", "800ep")),
        (lambda: TrainConfig(micro_batch_size=0), ("micro_batch_size is 0", "at least 1")),
        (lambda: TrainConfig(nonfinite_limit=0), ("train.nonfinite_limit is 0",)),
        (lambda: CheckpointConfig(every="30"), ("'30' is not a duration", "30min (minutes)")),
        (lambda: CheckpointConfig(keep_every="30min"), ("'30min' is not a duration here",)),
        (lambda: CheckpointConfig(keep=0), ("checkpoint.keep is 0",)),
        (lambda: MonitorConfig(pictures=0), ("monitor.pictures is 0",)),
        (lambda: MonitorConfig(log_every="often"), ("'often' is not a duration",)),
        (lambda: RunConfig(seed=-1), ("seed is -1",)),
        (lambda: RunConfig(model=ModelConfig(in_chans=1)), ("data.channels is 3", "model.in_chans is 1")),
        (
            lambda: RunConfig(data=DataConfig(val_resize_px=255)),
            ("data.val_resize_px is 255", "model.image_size 256"),
        ),
    ],
)
def test_an_impossible_setting_is_refused_with_its_name_and_value(make, parts):
    refuses(make, *parts)


@pytest.mark.parametrize(
    ("config", "name", "value", "parts"),
    [
        (ModelConfig(), "depth", "12", ("model.depth is '12'", "must be int")),
        (ModelConfig(), "depth", True, ("model.depth is True", "must be int")),
        (ModelConfig(), "block_size", 2.0, ("model.block_size is 2.0", "int or (int, int)")),
        (ModelConfig(), "block_size", (1, 2, 3), ("model.block_size is (1, 2, 3)",)),
        (ModelConfig(), "order", "diagonal", ("model.order is 'diagonal'", "'raster' or 'spiral'")),
        (ModelConfig(), "predictor", "conv", ("model.predictor is 'conv'", "'mlp' or 'linear' or null")),
        (DataConfig(), "mean", (0.5, "x", 0.5), ("data.mean", "(float, ...)")),
        (DataConfig(), "flip", True, ("data.flip is True", "float")),
        (DataConfig(), "train", 3, ("data.train is 3", "str or (str, ...) or null")),
        (OptimConfig(), "betas", [0.9, 0.95], ("optim.betas is [0.9, 0.95]", "(float, float)")),
        (TrainConfig(), "precision", "fp8", ("train.precision is 'fp8'", "'fp32' or 'bf16' or 'fp16'")),
        (TrainConfig(), "compile", 1, ("train.compile is 1", "bool")),
        (CheckpointConfig(), "keep", 2.5, ("checkpoint.keep is 2.5", "int")),
        (MonitorConfig(), "pictures_every", 20, ("monitor.pictures_every is 20", "str or null")),
        (RunConfig(), "model", {"depth": 3}, ("model is {'depth': 3}", "ModelConfig")),
        (RunConfig(), "seed", 0.5, ("seed is 0.5", "int")),
    ],
)
def test_a_value_of_the_wrong_type_or_choice_is_refused(config, name, value, parts):
    changed = _changed(config, name, value)  # by hand: in tests the annotations refuse it before the check
    refuses(changed.__post_init__, *parts)


def _changed(config, name, value):
    copied = copy.deepcopy(config)
    object.__setattr__(copied, name, value)
    return copied


def test_a_whole_number_counts_as_a_float():
    assert OptimConfig(clip_grad=1).clip_grad == 1


def test_a_config_of_ones_own_is_checked_by_its_annotations():
    @dataclass(frozen=True, kw_only=True)
    class Own:
        sizes: tuple[int, ...] = ()
        kind: Literal["a", "b"] | None = None

    Own.__annotations__ = {"sizes": tuple[int, ...], "kind": Literal["a", "b"] | None}
    check_types(Own(sizes=(1, 2), kind="b"))
    refuses(
        lambda: check_types(_changed(Own(), "sizes", (1, 2.5))), "sizes is (1, 2.5); it must be (int, ...)"
    )
    refuses(
        lambda: check_types(_changed(Own(), "kind", "c"), "own"), "own.kind is 'c'; it must be 'a' or 'b'"
    )


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: ModelConfig(predictor_block_size=4), ("model.predictor_block_size is 4", "block_causal")),
        (
            lambda: ModelConfig(predictor_attention="block_causal", predictor_block_size=3),
            ("predictor_block_size 3 does not divide a grid of 16x16",),
        ),
        (lambda: ModelConfig(predictor_attention="full", prefix=True), ("no model.prefix",)),
        (
            lambda: ModelConfig(predictor_attention="causal", predictor="mlp"),
            ("a predictor mlp has no attention",),
        ),
        (lambda: ModelConfig(encoder_attention="full"), ("model.feature_attention is causal", "full")),
        (lambda: ModelConfig(qk_scale=0.0), ("model.qk_scale is 0.0",)),
        (lambda: ModelConfig(tokenizer="kmeans", vocab_size=1), ("model.vocab_size is 1", "at least 2")),
        (
            lambda: ModelConfig(positions="sincos", embed_dim=90, num_heads=3),
            ("model.embed_dim 90 cannot be divided among the sines", "use 88 or 92"),
        ),
        (
            lambda: ModelConfig(positions="sincos", predictor_dim=90, predictor_heads=3),
            ("model.predictor_dim 90", "use 88 or 92"),
        ),
        (lambda: ModelConfig(tokenizer="kmeans", loss="l1"), ("model.loss l1", "cross-entropy")),
        (
            lambda: ModelConfig(tokenizer="kmeans", norm_pixels=False),
            ("model.norm_pixels False", "for pixels"),
        ),
        (lambda: ModelConfig(block_mlp_dim=0), ("model.block_mlp_dim is 0", "at least 1")),
        (lambda: DataConfig(train=()), ("data.train names no source",)),
        (lambda: DataConfig(train=("A", "B", "A")), ("names a source twice", "A")),
        (lambda: DataConfig(train=("A", "B"), weights=(0.5, 0.0)), ("data.weights are [0.5, 0.0]",)),
        (lambda: DataConfig(train=("A", "B"), weights=(1.0,)), ("names 2 sources", "data.weights 1")),
        (lambda: DataConfig(train="A", epoch_samples=0), ("data.epoch_samples is 0",)),
        (
            lambda: DataConfig(color_jitter=(0.4, 0.4, 0.2, 0.6)),
            ("data.color_jitter is", "hue's in [0, 0.5]"),
        ),
        (lambda: DataConfig(color_jitter_prob=2), ("data.color_jitter_prob is 2",)),
        (lambda: DataConfig(val_crop="border", normalize="auto"), ("data.val_crop border", "center or")),
    ],
)
def test_what_cannot_be_together_is_refused(make, parts):
    refuses(make, *parts)


def test_one_source_and_several_are_named_alike():
    assert DataConfig().train_specs == ()
    assert DataConfig(train="A").train_specs == ("A",)
    assert DataConfig(train=("A", "B")).train_specs == ("A", "B")


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
    "text", ["", "10", "ep", "-3ep", "3 epochs", "1e3st", "30min", "5%", "3ep4st", "½ep"]
)
def test_what_is_no_duration_is_refused_with_examples(text):
    refuses(lambda: Duration.parse(text), repr(text), "800ep (epochs)", "500000st (steps)", "2000000sa")


# ------------------------------------------------------------------------------------------- to and from YAML

UNUSUAL = RunConfig(
    preset="xtra-b16",
    seed=7,
    model=ModelConfig(image_size=(64, 128), block_size=(2, 4), predictor_dim=96, order="random"),
    data=DataConfig(
        train=("DIR", "digits"), weights=(0.8, 0.2), mean=(0.5, 0.5, 0.5), workers=0, val_resize_px=128
    ),
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
    refuses(lambda: from_dict(RunConfig, {"optimiser": {}}), "'optimiser'", "did you mean 'optim'?")


def test_a_name_like_no_other_is_answered_with_all_known_ones():
    assert nearest_name("zzz", ["alpha", "beta"]) == "known: alpha, beta"


def test_keys_that_are_left_out_keep_their_defaults():
    assert from_dict(RunConfig, {"model": {"depth": 3}}) == RunConfig(model=ModelConfig(depth=3))


def test_flatten_gives_dotted_names():
    assert flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": None}) == {"a.b.c": 1, "a.d": [2], "e": None}


# ---------------------------------------------------------------------------------------- the same run or not


def test_a_run_is_the_same_as_itself():
    assert UNUSUAL.differences(from_dict(RunConfig, to_dict(UNUSUAL))) == {}


@pytest.mark.parametrize(
    "changed",
    [
        replace(UNUSUAL, preset=None),
        replace(UNUSUAL, data=replace(UNUSUAL.data, workers=5)),
        replace(UNUSUAL, train=replace(UNUSUAL.train, device="cpu")),
        replace(UNUSUAL, checkpoint=CheckpointConfig(every="1ep", keep=9, keep_every="2ep")),
        replace(UNUSUAL, monitor=MonitorConfig(log_every="3st", knn_every=None, tensorboard=False)),
    ],
    ids=["preset", "workers", "device", "checkpoint", "monitor"],
)
def test_free_settings_do_not_make_another_run(changed):
    assert UNUSUAL.differences(changed) == {}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (replace(UNUSUAL, seed=8), {"seed": (7, 8)}),
        (
            replace(UNUSUAL, model=replace(UNUSUAL.model, block_size=(4, 2))),
            {"model.block_size": ([2, 4], [4, 2])},
        ),
        (
            replace(UNUSUAL, data=replace(UNUSUAL.data, decoder="pillow")),
            {"data.decoder": ("auto", "pillow")},
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
    free = []
    for dotted in flatten(to_dict(UNUSUAL)):
        section, _, name = dotted.rpartition(".")
        if section:
            other = _changed(UNUSUAL, section, _changed(getattr(UNUSUAL, section), name, "another"))
        else:
            other = _changed(UNUSUAL, name, "another")
        if not UNUSUAL.differences(other):
            free.append(dotted)
    unsaid = [name for name in free if not name.startswith(("checkpoint.", "monitor."))]
    places = ["data.cache_dir", "data.cache_gb"]
    assert unsaid == ["preset", "data.workers", "data.max_bad_fraction", *places, "train.device"]
    assert len(free) - len(unsaid) == len(fields(CheckpointConfig)) + len(fields(MonitorConfig))


# ---------------------------------------------------------------------------------------------- documentation


def test_every_setting_has_a_docstring_under_it():
    import ast
    from pathlib import Path

    import nextblock.config

    tree = ast.parse(Path(nextblock.config.__file__).read_text())
    for cls in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for field, after in zip(cls.body, [*cls.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{cls.name}.{ast.unparse(field.target)}"


def test_every_section_of_a_run_is_a_frozen_dataclass():
    for section in fields(RunConfig()):
        value = getattr(RunConfig(), section.name)
        if is_dataclass(value):
            with pytest.raises(AttributeError):
                setattr(value, fields(value)[0].name, None)
