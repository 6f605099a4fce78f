"""Official AIM files: both layouts, what a file cannot tell, and what is refused."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from nextblock.checkpoint import CheckpointError, MissingSettingError
from nextblock.interop import aim, load_model
from nextblock.interop.aim import hub_settings, is_aim, is_aim_head, read_aim
from nextblock.interop.files import LoadOptions
from nextblock.models import NextBlockModel
from nextblock.models.heads import ImageClassifier
from nextblock.presets import SIZES
from test_checkpoint import same_weights
from test_load import Malicious
from toy import tiny_images

IMAGES = tiny_images(size=(56, 56))


@pytest.fixture
def backbone(golden_dir):
    """The content of an official backbone file, to be changed."""
    return torch.load(golden_dir / "aim_nano_backbone.pth", weights_only=True)


@pytest.fixture
def head(golden_dir):
    """The content of the head's file that belongs to it."""
    return torch.load(golden_dir / "aim_nano_head.pth", weights_only=True)


@pytest.fixture
def whole(golden_dir):
    """A model with its prediction head, in the layout of the training code."""
    return load_file(golden_dir / "aim_pretrain_nano_weights.safetensors")


def read_model(content, num_heads: int | None = 3, **settings) -> NextBlockModel:
    """An encoder or a whole model."""
    model = read_aim(content, "FILE", LoadOptions(num_heads=num_heads, **settings))
    assert isinstance(model, NextBlockModel)
    return model


def read_classifier(content, head=None, num_heads: int | None = 3, **settings) -> ImageClassifier:
    """A classifier of one file, or two."""
    classifier = read_aim(content, "FILE", LoadOptions(num_heads=num_heads, **settings), head)
    assert isinstance(classifier, ImageClassifier)
    return classifier


# ------------------------------------------------------------------------------------------- inference layout


def test_a_backbone_alone_is_an_encoder_of_any_size_with_the_settings_of_the_inference_code(backbone):
    default, told = read_model(backbone), read_model(backbone, image_size=56)
    config = default.config
    assert (config.patch_size, config.embed_dim, config.depth, config.num_heads) == (14, 48, 4, 3)
    assert (config.mlp_ratio, config.norm_eps, config.feature_attention) == (4.0, 1e-6, "full")
    assert (config.predictor, config.image_size) == (None, 224)
    # Positions that are not stored are computed for any size.
    torch.testing.assert_close(default.encode(IMAGES).tokens, told.encode(IMAGES).tokens)
    assert read_model(backbone, image_size=(28, 56)).config.grid == (2, 4)


def test_the_hubs_configuration_tells_what_the_file_does_not(backbone):
    config = {"img_size": [28, 56], "embed_dim": 48, "num_blocks": 24, "num_heads": 3}
    told = hub_settings({**config, "probe_layers": [1, 2]}, backbone)
    assert told == {"num_heads": 3, "probe_layers": (1, 2), "image_size": (28, 56)}
    assert hub_settings({**config, "probe_layers": 3}, backbone)["probe_layers"] == (21, 22, 23)
    assert hub_settings(config, backbone)["probe_layers"] == (18, 19, 20, 21, 22, 23)
    assert hub_settings({**config, "embed_dim": 1536}, backbone) == {}, "of another model"


# -------------------------------------------------------------------------------------------- training layout


def test_a_whole_model_is_read_with_the_settings_of_the_training_code(whole):
    config = read_model(whole).config
    assert (config.image_size, config.norm_eps, config.prefix) == (56, 1e-5, True)
    assert (config.predictor, config.predictor_extra_norm) == ("mlp", True)
    assert (config.predictor_dim, config.predictor_depth, config.predictor_mlp_ratio) == (64, 2, 4.0)
    assert (config.projection_dim, config.block_mlp_dim) == (None, None)
    trunk = {name: tensor for name, tensor in whole.items() if not name.startswith("head.")}
    assert (read_model(trunk).config.predictor, read_model(trunk).config.image_size) == (None, 56)


def test_queries_keys_and_values_are_joined_in_that_order(whole):
    for i, layer in enumerate(read_model(whole).encoder.blocks):
        for rows, part in zip(layer.get_parameter("attn.qkv.weight").split(48), "qkv", strict=True):
            assert torch.equal(rows, whole[f"trunk.blocks.{i}.attn.{part}_proj.weight"])


def test_the_pixels_of_the_last_map_go_from_row_column_channel_to_channel_row_column(whole):
    ours = read_model(whole).get_submodule("predictor.block_mlps.0")
    weight, bias = ours.get_parameter("weight"), ours.get_parameter("bias")
    for c, h, w in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 13, 5)]:
        row, official_row = (c * 14 + h) * 14 + w, (h * 14 + w) * 3 + c
        assert torch.equal(weight[row], whole["head.decoder_pred.weight"][official_row])
        assert torch.equal(bias[row], whole["head.decoder_pred.bias"][official_row])


def as_the_training_code_names(weights):
    return {name.replace("preprocessor.", "preprocessor.blocks.0."): w for name, w in weights.items()}


def test_weights_are_found_in_their_wrappers(whole, backbone):
    for weights in (whole, backbone):
        for wrapped in (
            {"model": weights, "iteration": 9},
            {"state_dict": {f"model.{name}": tensor for name, tensor in weights.items()}},
            as_the_training_code_names(weights),
        ):
            assert same_weights(read_model(wrapped), read_model(weights))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_cast_to_fp32_and_its_rounded_positions_are_accepted(dtype, whole):
    model = read_model({n: w.to(dtype) for n, w in whole.items()})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# --------------------------------------------------------------------- what the training code saves, as files


@pytest.fixture
def distributed(whole, tmp_path):
    """A checkpoint as the training code saves it, with an optimizer's state."""
    from torch.distributed.checkpoint import save

    optimizer = {"state": {"x": torch.zeros(3)}, "param_groups": {"lr": 0.1}}
    content = {"model": as_the_training_code_names(whole), "optimizer": optimizer}
    save(content, checkpoint_id=tmp_path / "dcp", no_dist=True)
    torch.save({"iteration": 9}, tmp_path / "dcp" / "other.pth")
    return tmp_path / "dcp"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_is_read_without_a_process_group(distributed, whole):
    assert same_weights(load_model(distributed, num_heads=3), read_model(whole))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_damaged_or_malicious_table_of_a_distributed_checkpoint_is_refused(distributed, tmp_path):
    table = (distributed / ".metadata").read_bytes()
    for content in (table[:100], b"", pickle.dumps({"a": Malicious(tmp_path / "trap")})):
        (distributed / ".metadata").write_bytes(content)
        with pytest.raises(CheckpointError, match="dcp"):
            load_model(distributed, num_heads=3)
    assert not (tmp_path / "trap").exists()
    (distributed / ".metadata").write_bytes(table)
    shard = next(distributed.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="dcp cannot be read as a weight file"):
        load_model(distributed, num_heads=3)


SAVE_WITH_SETTINGS = """
import sys, types, typing, collections, torch
from safetensors.torch import load_file
made = {"collections": collections, "typing": typing}
sys.modules["omegaconf"] = types.ModuleType("omegaconf")
names = {"base": ["ContainerMetadata"], "nodes": ["AnyNode"], "dictconfig": ["DictConfig"]}
for name, classes in names.items():
    module = types.ModuleType("omegaconf." + name)
    sys.modules[module.__name__] = module
    for one in classes:
        made[one] = type(one, (), {"__module__": module.__name__})
        setattr(module, one, made[one])
metadata = made["ContainerMetadata"]()
cache = collections.defaultdict(dict, {"a": {"b": 1}})
metadata.__dict__.update(key_type=typing.Any, ref_type=dict, resolver_cache=cache)
node = made["AnyNode"]()
node.__dict__.update(_val=12, _metadata=metadata)
settings = made["DictConfig"]()
settings.__dict__.update(_content={"num_heads": node}, _metadata=metadata, _parent=None)
torch.save({"model": load_file(sys.argv[1]), "cfg": settings, "iteration": 9}, sys.argv[2])
"""


def test_settings_of_omegaconf_beside_the_weights_are_passed_over_without_importing_them(
    golden_dir, whole, tmp_path
):
    source, target = golden_dir / "aim_pretrain_nano_weights.safetensors", tmp_path / "consolidated.pth"
    subprocess.run([sys.executable, "-c", SAVE_WITH_SETTINGS, source, target], check=True)
    assert same_weights(load_model(target, num_heads=3), read_model(whole))
    assert not [name for name in sys.modules if name.startswith("omegaconf")]


# ------------------------------------------------------------------------------------ what a file cannot tell


def test_each_kind_of_file_is_told_by_its_content(backbone, head, whole, golden_dir):
    xtra = torch.load(golden_dir / "xtra_k2.ckpt", weights_only=True)
    assert all(map(is_aim, (backbone, {**backbone, **head}, whole)))
    assert not any(map(is_aim, (head, xtra, {"weight": torch.zeros(2)}, {})))
    assert is_aim_head(head)
    assert not any(map(is_aim_head, (backbone, {**backbone, **head}, whole, xtra, {})))


def test_official_sizes_tell_their_best_layers():
    sizes = [SIZES[name] for name in ("aim-600m", "aim-1b", "aim-3b", "aim-7b")]
    best = [aim.BEST_LAYERS_OF_SIZE[size.embed_dim, size.depth] for size in sizes]
    assert best == [tuple(range(first, first + 6)) for first in (14, 12, 12, 14)]


def test_the_tables_are_used_if_the_caller_says_no_more(backbone, head, monkeypatch):
    monkeypatch.setitem(aim.NUM_HEADS_OF_SIZE, (48, 4), 6)
    monkeypatch.setitem(aim.BEST_LAYERS_OF_SIZE, (48, 4), (0, 3))
    monkeypatch.setattr(aim, "PROBED_LAYERS", 3)
    assert read_model(backbone, num_heads=None).config.num_heads == 6
    assert read_model(backbone).config.num_heads == 3
    assert read_classifier(backbone, head, probe_layers="best").head_config.layers == (0, 3)
    assert read_classifier(backbone, head, probe_layers="last").head_config.layers == (1, 2, 3)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("last", "last 6 layers"),
        ((3, 4), "an encoder with 4"),
        ("best", "says nothing of FILE, an encoder 48 wide with 4 layers"),
    ],
)
def test_layers_that_the_encoder_does_not_have_are_refused(layers, words, backbone, head):
    with pytest.raises((ValueError, CheckpointError), match=words):
        read_classifier(backbone, head, probe_layers=layers)


def test_an_image_size_is_asked_for_if_it_cannot_be_guessed(backbone, whole):
    weight = backbone["preprocessor.patchifier.proj.weight"]
    wider = {**backbone, "preprocessor.patchifier.proj.weight": torch.zeros(*weight.shape[:2], 18, 18)}
    with pytest.raises(MissingSettingError, match=r"18-px patches, which do not make an image of 224x224 px"):
        read_model(wider)
    assert read_model(wider, image_size=36).config.grid == (2, 2)
    assert read_model(wider, fallback={"image_size": 36}).config.grid == (2, 2)
    longer = {**whole, "preprocessor.pos_embed": torch.zeros(1, 18, 48)}
    with pytest.raises(MissingSettingError, match=r"18 positions of 14-px patches, .* 56x56 px; give"):
        read_model(longer)
    with pytest.raises(CheckpointError, match=r"16 positions of 14-px patches, .* 224x224 px"):
        read_model(whole, image_size=224)


# --------------------------------------------------------------------------------------------------- refusals


def rms_norm(weights):
    for name in [name for name in weights if "norm" in name and name.endswith(".bias")]:
        del weights[name]


PROJECTION = "preprocessor.patchifier.proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.update({"trunk.blocks.0.attn.qkv.lora_A": torch.zeros(16, 48)}), "holds LoRA"),
        (rms_norm, "is an AIMv2 model (RMSNorm and SwiGLU), and only AIM v1 is read"),
        (lambda w: w.update({"trunk.blocks.0.mlp.fc3.weight": torch.zeros(192, 48)}), "is an AIMv2 model"),
        (lambda w: w.update({"encoder.layers.0.rms_norm1.weight": torch.zeros(8)}), "is an AIMv2 model"),
        (lambda w: w.update({"image_encoder.trunk.norm_1.weight": torch.zeros(8)}), "is an AIMv2 model"),
        (lambda w: w.update({PROJECTION: torch.zeros(48, 3, 14, 3)}), "has patches of 14x3 px; they must be"),
        (lambda w: w.pop(PROJECTION), f"lacks '{PROJECTION}'"),
        (lambda w: w.pop("trunk.blocks.2.mlp.fc2.weight"), "missing: encoder.blocks.2.mlp.fc2.weight"),
        (lambda w: w.update({"trunk.extra": torch.zeros(1)}), "holds 'trunk.extra', which is no part"),
        (
            lambda w: w.update({"trunk.blocks.0.attn.qkv.bias": torch.zeros(144)}),
            "unexpected: encoder.blocks.0",
        ),
        (
            lambda w: w.update({"trunk.blocks.1.attn.q_proj.weight": torch.zeros(48)}),
            "blocks.1.attn.k_proj.we",
        ),
    ],
)
def test_a_file_of_another_architecture_or_with_something_missing_is_refused(change, words, backbone):
    change(backbone)
    assert is_aim(backbone)
    with pytest.raises(CheckpointError, match=re.escape(words)):
        read_model(backbone)


@pytest.mark.parametrize("name", ["preprocessor.pos_embed", "head.decoder_pos_embed"])
def test_positions_that_are_not_the_fixed_ones_are_refused(name, whole):
    moved = {**whole, name: whole[name].clone()}
    moved[name][0, 5, 7] += 0.01
    with pytest.raises(CheckpointError, match="are not AIM's sines and cosines on a grid of 4x4 patches"):
        read_model(moved)


def test_a_head_that_does_not_belong_is_refused(backbone, head):
    with pytest.raises(CheckpointError, match=r"is no head of an AIM classifier .it holds: preprocessor"):
        read_classifier(backbone, backbone)
    with pytest.raises(CheckpointError, match=r"has a head of its own .head\.bn"):
        read_classifier({**backbone, **head}, head)
    head["head.extra"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"holds 'head\.extra'"):
        read_classifier(backbone, head, probe_layers=(1, 2))
