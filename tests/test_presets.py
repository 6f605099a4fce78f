"""Presets: parameter counts, the published settings, and that each one runs as it says."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest
import torch

from nextblock.cli.arguments import build_parser, parse_run
from nextblock.config import RunConfig
from nextblock.models import NextBlockModel
from nextblock.presets import PRESETS, SIZES, get_preset, list_presets, model_config
from nextblock.settings import from_dict, to_dict


def on_meta(name):
    """The network without memory for its weights."""
    with torch.device("meta"):
        return NextBlockModel(get_preset(name).config.model)


def millions(*parts):
    return sum(p.numel() for part in parts for p in part.parameters() if p.requires_grad) / 1e6


# ----------------------------------------------------------------------------------------------- every preset


@pytest.mark.parametrize("name", list_presets())
def test_the_stated_parameter_counts_are_those_of_the_network(name):
    model, preset = on_meta(name), get_preset(name)
    assert round(millions(model.encoder), 2) == pytest.approx(preset.encoder_params_m, abs=0.011)
    assert round(millions(model), 2) == pytest.approx(preset.total_params_m, abs=0.011)


@pytest.mark.parametrize("name", list_presets())
def test_the_command_of_a_preset_parses_to_its_settings(name):
    program, verb, *words = shlex.split(get_preset(name).command)
    assert (program, verb) == ("nextblock", "pretrain")
    parser = build_parser("pretrain", "")
    parser.add_argument("--out", type=str, required=True)
    config, options = parse_run(parser, words)
    assert options.out == "RUN"
    assert config.data.train is not None
    assert config == replace(get_preset(name).config, data=replace(config.data))
    assert replace(config.data, train=None) == get_preset(name).config.data
    assert config.preset == name


@pytest.mark.parametrize("name", list_presets())
def test_a_presets_settings_are_valid_and_come_back_from_plain_values(name):
    preset = get_preset(name)
    assert from_dict(RunConfig, to_dict(preset.config)) == preset.config
    assert preset.config.preset == preset.name == name
    assert preset.about.endswith(".")
    assert preset.config.model.num_blocks > 1
    batch, micro = preset.config.train.batch_size, preset.config.train.micro_batch_size
    assert micro is None or batch % micro == 0


def test_every_size_is_a_preset():
    assert set(SIZES) <= set(PRESETS)
    assert all(get_preset(name).config.model == model for name, model in SIZES.items())


@pytest.mark.parametrize(("name", "nearest"), [("xtra-b16-in-1k", "xtra-b16-in1k"), ("xtra_h14", "xtra-h14")])
def test_an_unknown_preset_is_refused_with_the_nearest_name(name, nearest):
    with pytest.raises(ValueError, match=f"unknown preset '{name}'; did you mean '{nearest}'"):
        get_preset(name)


def test_a_model_is_named_by_size_or_preset_and_any_field_may_change():
    assert model_config("xtra-b16") == SIZES["xtra-b16"]
    assert model_config("xtra-b16-in1k").drop_path == 0.1
    assert model_config("xtra-h14", block_size=(2, 4)).block_size == (2, 4)
    assert model_config("xtra-h14", block_size=[2, 4]).block_size == (2, 4)
    with pytest.raises(ValueError, match="unknown model setting 'drop_paths'; did you mean 'drop_path'"):
        model_config("xtra-b16", drop_paths=0.1)


# ------------------------------------------------------------------------------------------ published figures


@pytest.mark.parametrize(
    ("name", "encoder", "decoder", "block_mlp", "projection"),
    [
        ("xtra-b16-in1k", 85.84, 56.9, 151.0, 6.3),
        ("xtra-h14-in21k", 630.76, 39.6, 184.9, 9.8),
        ("xtra-b16-ablation", 85.84, 14.3, 113.3, None),
    ],
)
def test_the_parts_have_the_parameters_of_the_official_networks(
    name, encoder, decoder, block_mlp, projection
):
    model = on_meta(name)
    predictor = model.predictor
    assert predictor is not None
    assert round(millions(model.encoder), 2) == encoder
    positions = predictor.pos_embed.numel() / 1e6
    assert round(millions(predictor.blocks, predictor.norm) + positions, 1) == decoder
    assert round(millions(predictor.block_mlps), 1) == block_mlp
    assert projection is None or round(millions(predictor.projection), 1) == projection


SHARED = {
    # objective
    "model.block_size": 4,
    "model.order": "raster",
    "model.num_predicted_blocks": 1,
    "model.norm_pixels": True,
    "model.loss": "mse",
    "model.norm_eps": 1e-6,
    "model.mlp_ratio": 4.0,
    "model.predictor_depth": 8,
    "model.feature_attention": "causal",
    "model.init": None,
    # optimizer
    "optim.lr": 1e-3,
    "optim.start_lr": 1e-4,
    "optim.end_lr": 1e-6,
    "optim.weight_decay": 0.05,
    "optim.betas": (0.9, 0.95),
    "optim.clip_grad": 1.0,
    # batch and precision
    "train.batch_size": 2088,
    "train.micro_batch_size": 29,
    "train.precision": "fp16",
    "train.predictor_fp32": True,
    # data
    "data.crop_scale": (0.3, 1.0),
    "data.crop_ratio": (0.75, 1.5),
    "data.flip": 0.5,
    "data.mean": (0.485, 0.456, 0.406),
    "data.std": (0.229, 0.224, 0.225),
    "seed": 0,
}
PUBLISHED = {
    "xtra-b16-in1k": {
        **SHARED,
        "model.image_size": 256,
        "model.patch_size": 16,
        "model.embed_dim": 768,
        "model.depth": 12,
        "model.num_heads": 12,
        "model.projection_dim": 4096,
        "model.predictor_dim": 768,
        "model.predictor_heads": 6,
        "model.block_mlp_dim": 6144,
        "model.drop_path": 0.1,
        "optim.warmup": "15ep",
        "train.duration": "800ep",
        "data.val_resize_px": 300,
    },
    "xtra-h14-in21k": {
        **SHARED,
        "model.image_size": 224,
        "model.patch_size": 14,
        "model.embed_dim": 1280,
        "model.depth": 32,
        "model.num_heads": 16,
        "model.projection_dim": 5120,
        "model.predictor_dim": 640,
        "model.predictor_heads": 8,
        "model.block_mlp_dim": 9408,
        "model.drop_path": 0.2,
        "optim.warmup": "3ep",
        "train.duration": "100ep",
        "data.val_resize_px": 256,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_recipe_is_that_of_the_released_checkpoint(name):
    config = get_preset(name).config
    found = {}
    for dotted in PUBLISHED[name]:
        value = config
        for part in dotted.split("."):
            value = getattr(value, part)
        found[dotted] = value
    assert found == PUBLISHED[name]


@pytest.mark.parametrize(("name", "accuracy"), [("xtra-b16-in1k", "76.8"), ("xtra-h14-in21k", "80.9")])
def test_the_published_result_is_stated(name, accuracy):
    assert accuracy in (get_preset(name).published or "")


def test_the_ablations_baseline_differs_from_the_released_run_where_the_official_one_does():
    differences = get_preset("xtra-b16-ablation").config.differences(get_preset("xtra-b16-in1k").config)
    assert differences == {
        "model.drop_path": (0.0, 0.1),
        "model.predictor_dim": (384, 768),
        "optim.warmup": ("10ep", "15ep"),
        "train.duration": ("100ep", "800ep"),
        "train.micro_batch_size": (116, 29),
    }


@pytest.mark.parametrize("name", [name for name in list_presets() if "ablation-" in name])
def test_an_ablation_changes_the_model_alone(name):
    baseline = "xtra-b16-ablation" if name.startswith("xtra") else "aim-600m-in1k"
    differences = get_preset(name).config.differences(get_preset(baseline).config)
    assert differences
    of_data = {"data.val_resize_px"} if "224" in name else {"data.crop_scale"} if "crop" in name else set()
    assert {n for n in differences if not n.startswith("model.")} == of_data


# ----------------------------------------------------------------------------------------------------- AIM


@pytest.mark.parametrize(
    ("name", "trunk_b"), [("aim-600m", 0.681), ("aim-1b", 1.209), ("aim-3b", 2.720), ("aim-7b", 6.445)]
)
def test_aims_trunks_have_the_parameters_of_apples(name, trunk_b):
    assert round(millions(on_meta(name).encoder) / 1e3, 3) == trunk_b


def test_aims_head_has_the_parameters_of_apples():
    assert round(millions(on_meta("aim-600m").predictor)) == 407


AIM_SHARED = {
    "model.image_size": 224,
    "model.patch_size": 14,
    "model.block_size": 1,
    "model.order": "raster",
    "model.prefix": True,
    "model.positions": "sincos",
    "model.patch_norm": True,
    "model.bias": False,
    "model.weight_init": "xavier_uniform",
    "model.norm_eps": 1e-5,
    "model.mlp_ratio": 4.0,
    "model.drop_path": 0.0,
    "model.predictor": "mlp",
    "model.predictor_dim": 2048,
    "model.predictor_depth": 12,
    "model.predictor_extra_norm": True,
    "model.norm_pixels": True,
    "model.loss": "mse",
    "model.feature_attention": "full",
    "optim.lr": 1e-3,
    "optim.start_lr": 1e-6,
    "optim.end_lr": 0.0,
    "optim.warmup": "2.5%",
    "optim.weight_decay": 0.05,
    "optim.betas": (0.9, 0.95),
    "optim.clip_grad": 1.0,
    "train.batch_size": 4096,
    "train.precision": "bf16",
    "data.crop_scale": (0.4, 1.0),
    "data.flip": 0.5,
    "data.val_resize_px": 256,
}
AIM_DFN = {"data.weights": (0.8, 0.2), "data.color_jitter": None}
AIM_PUBLISHED = {
    "aim-600m-in1k": {"train.duration": "125000st", "data.color_jitter": (0.4, 0.4, 0.2, 0.1)},
    "aim-600m-dfn2b+": {"train.duration": "500000st", "model.embed_dim": 1536, **AIM_DFN},
    "aim-1b-dfn2b+": {"train.duration": "1200000st", "model.embed_dim": 2048, **AIM_DFN},
    "aim-3b-dfn2b+": {"train.duration": "1200000st", "model.embed_dim": 3072, **AIM_DFN},
    "aim-7b-dfn2b+": {"train.duration": "1200000st", "model.embed_dim": 4096, "model.depth": 32, **AIM_DFN},
}


@pytest.mark.parametrize("name", AIM_PUBLISHED)
def test_an_aim_recipe_is_that_of_the_paper_and_apples_code(name):
    config = get_preset(name).config
    expected = {**AIM_SHARED, **AIM_PUBLISHED[name]}
    found = {}
    for dotted in expected:
        value = config
        for part in dotted.split("."):
            value = getattr(value, part)
        found[dotted] = value
    assert found == expected


def test_a_preset_of_a_mixture_names_as_many_sources_as_it_has_weights():
    assert get_preset("aim-1b-dfn2b+").command.count("--data.train") == 2


def test_the_tiny_runs_of_both_kinds_have_the_same_budget():
    differences = get_preset("aim-tiny").config.differences(get_preset("xtra-tiny").config)
    assert differences
    assert all(name.startswith("model.") for name in differences)
