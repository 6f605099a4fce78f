"""Presets: their settings against the first release's, published figures, their parameters and commands."""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import replace

import pytest
import torch

from nextblock.cli.arguments import Parser, parse_run
from nextblock.config import RunConfig
from nextblock.errors import UsageError
from nextblock.models import NextBlockModel
from nextblock.plan import count_parameters
from nextblock.presets import get_preset, list_presets, model_config
from nextblock.settings import flatten, from_dict, to_dict

NEWER = """
    model.class_token model.encoder_attention model.layer_scale model.mask_ratio model.predict_visible
    model.predictor_attention model.predictor_block_size model.qk_scale model.qk_norm model.resample_antialias
    model.rope_rescale model.target_positions model.teacher model.teacher_digest model.teacher_dim
    train.strategy checkpoint.in_background checkpoint.keep_best checkpoint.requeue monitor.collapse
    monitor.early_stop monitor.knn_train monitor.knn_val monitor.loggers monitor.patience monitor.project
""".split()  # noqa: SIM905
"""Settings that the first recorded presets did not have yet: their defaults change nothing."""


def settings_of(name):
    found = json.loads(json.dumps(flatten(to_dict(get_preset(name).config))))
    defaults = flatten(to_dict(RunConfig()))
    found = {key: value for key, value in found.items() if key not in NEWER or value != defaults[key]}
    target = found.pop("model.target")
    return found | {"model.tokenizer": {"pixels": None, "tokens": "kmeans"}.get(target, target)}


@pytest.mark.parametrize("name", list_presets())
def test_a_presets_settings_and_parameters_are_those_recorded(name, golden_dir):
    recorded = json.loads((golden_dir / "presets.json").read_text())
    expected, encoder_m, total_m = recorded["presets"][name]
    assert hashlib.sha256(json.dumps(settings_of(name), sort_keys=True).encode()).hexdigest()[:16] == expected
    count = count_parameters(get_preset(name).config.model)
    assert (count.encoder, count.trained) == pytest.approx((1e6 * encoder_m, 1e6 * total_m), abs=11_000)
    is_small_folder = name.startswith("xtra-small-")
    assert not is_small_folder or total_m - encoder_m <= encoder_m, "the predictor does not outweigh"


@pytest.mark.parametrize("name", list_presets())
def test_a_preset_comes_back_from_its_command_and_from_plain_values(name):
    preset = get_preset(name)
    program, verb, *words = shlex.split(preset.command)
    assert (program, verb) == ("nextblock", "pretrain")
    parser = Parser("pretrain")
    parser.add_argument("--out", type=str, required=True)
    config, options = parse_run(parser, words)
    assert options.out == "RUN"
    assert words.count("--data.train") == len(preset.config.data.weights or "1")
    assert replace(config, data=replace(config.data, train=None)) == preset.config
    assert from_dict(RunConfig, to_dict(preset.config)) == preset.config
    batch, micro = preset.config.train.batch_size, preset.config.train.micro_batch_size
    assert micro is None or (isinstance(micro, int) and batch % micro == 0)


def test_a_model_is_named_by_size_or_preset_and_any_field_may_change():
    assert model_config("xtra-b16-in1k").drop_path == 0.1
    assert model_config("xtra-h14", block_size="2x4") == model_config("xtra-h14", block_size=[2, 4])
    with pytest.raises(ValueError, match=r"'model.drop_paths'; did you mean 'model.drop_path'"):
        model_config("xtra-b16", drop_paths=0.1)


def test_a_run_a_file_or_an_unknown_name_instead_of_a_preset_is_told_apart(tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UsageError, match="it is a run: --out"):
        get_preset(str(tmp_path))
    with pytest.raises(UsageError, match="--config takes settings"):
        get_preset(str(tmp_path / "config.yaml"))
    with pytest.raises(UsageError, match="unknown preset 'xtra_h14'; did you mean 'xtra-h14'"):
        get_preset("xtra_h14")


def millions(*parts):
    return sum(p.numel() for part in parts for p in part.parameters() if p.requires_grad) / 1e6


PARTS = {
    "encoder": lambda model: millions(model.encoder),
    "predictor": lambda model: millions(model.predictor),
    "layers": lambda model: (
        millions(model.predictor.blocks, model.predictor.norm) + model.predictor.pos_embed.numel() / 1e6
    ),
    "block MLPs": lambda model: millions(model.predictor.block_mlps),
    "projection": lambda model: millions(model.predictor.projection),
}


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("xtra-b16-in1k", {"encoder": 85.84, "layers": 56.9, "block MLPs": 151.0, "projection": 6.3}),
        ("xtra-h14-in21k", {"encoder": 630.76, "layers": 39.6, "block MLPs": 184.9, "projection": 9.8}),
        ("xtra-b16-ablation", {"encoder": 85.84, "layers": 14.3, "block MLPs": 113.3}),
        ("aim-600m", {"encoder": 681, "predictor": 407}),
        *(("aim-1b", {"encoder": 1209}), ("aim-3b", {"encoder": 2720}), ("aim-7b", {"encoder": 6445})),
    ],
)
def test_the_parts_have_the_parameters_of_the_official_networks(name, published):
    """In millions, to the digits that are published."""
    with torch.device("meta"):
        model = NextBlockModel(get_preset(name).config.model)
    for part, expected in published.items():
        digits = len(str(expected).partition(".")[2])
        assert round(PARTS[part](model), digits) == expected, part


@pytest.mark.parametrize(
    "name", ["aim-tiny", "nepa-tiny", *(name for name in list_presets() if "ablation-" in name)]
)
def test_an_ablation_and_the_other_tiny_run_change_the_model_alone(name):
    baseline = "xtra-b16-ablation" if name.startswith("xtra") else "aim-600m-in1k"
    baseline = "xtra-tiny" if name.endswith("-tiny") else baseline
    differences = get_preset(name).config.differences(get_preset(baseline).config)
    assert differences
    of_data = {"data.val_resize_px"} if "224" in name else {"data.crop_scale"} if "crop" in name else set()
    assert {n for n in differences if not n.startswith("model.")} == of_data
