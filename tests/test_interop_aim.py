"""Official AIM files: both layouts, what a file cannot tell, and what is refused."""

import json
import pickle
import re
import shutil
import sys
from collections import defaultdict
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nextblock.checkpoint import CheckpointError, MissingSettingError, UnknownFormatError
from nextblock.interop import aim, load, load_model
from nextblock.interop.aim import read_aim
from nextblock.interop.files import LoadOptions, unwrapped
from nextblock.models.heads import ImageClassifier
from nextblock.presets import model_config
from test_checkpoint import same_weights
from test_load import Malicious
from toy import tiny_images

PROJECTION = "preprocessor.patchifier.proj.weight"
BLOCKS = "trunk.blocks."
TO_LOAD = {"num_heads": 3, "probe_layers": (1, 2)}


@pytest.fixture
def backbone(golden_dir):
    return torch.load(golden_dir / "aim_nano_backbone.pth", weights_only=True)


@pytest.fixture
def head(golden_dir):
    return torch.load(golden_dir / "aim_nano_head.pth", weights_only=True)


@pytest.fixture
def whole(golden_dir):
    """A model with its prediction head, in the layout of the training code."""
    return load_file(golden_dir / "aim_pretrain_nano_weights.safetensors")


def read(content, num_heads: int | None = 3, beside=None, **settings) -> Any:
    weights = unwrapped(content)
    if not any(name.endswith("pos_embed") for name in weights):
        settings = {"image_size": 224, **settings}
    return read_aim(weights, beside or {}, "FILE", LoadOptions(num_heads=num_heads, **settings))


def test_a_backbone_alone_is_an_encoder_of_any_size_with_the_settings_of_the_inference_code(backbone):
    default, told = read(backbone), read(backbone, image_size=56)
    config, images = default.config, tiny_images(size=(56, 56))
    assert (config.patch_size, config.embed_dim, config.depth, config.num_heads) == (14, 48, 4, 3)
    assert (config.mlp_ratio, config.norm_eps, config.feature_attention) == (4.0, 1e-6, "full")
    assert (config.predictor, config.image_size) == (None, 224)
    # Positions that are not stored are computed for any size.
    torch.testing.assert_close(default.encode(images).tokens, told.encode(images).tokens)
    assert read(backbone, image_size=(28, 56)).config.grid == (2, 4)


def test_the_hubs_configuration_tells_what_the_file_does_not(backbone, head):
    beside = {"img_size": [28, 56], "embed_dim": 48, "num_blocks": 4, "num_heads": 6}
    for told, layers in (([1, 2], (1, 2)), (3, (1, 2, 3))):
        found = read({**backbone, **head}, None, {**beside, "probe_layers": told}, image_size=None)
        assert found.head_config.layers == layers
        config = found.encoder_model.config
        assert (config.num_heads, config.image_size) == (6, (28, 56))
    with pytest.raises(MissingSettingError, match="how many attention heads"):
        read(backbone, None, {**beside, "embed_dim": 1536})  # of another model


def test_a_directory_of_apples_files_is_a_classifier(backbone, head, golden, golden_dir, tmp_path):
    expected = golden("aim_nano")
    (tmp_path / "two").mkdir()
    for part in ("backbone", "head"):
        shutil.copy(golden_dir / f"aim_nano_{part}.pth", tmp_path / "two" / f"{part}.pth")
    save_file({**backbone, **head}, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    told = {"img_size": 56, "embed_dim": 48, "num_blocks": 4, "num_heads": 3, "probe_layers": [1, 2]}
    (tmp_path / "config.json").write_text(json.dumps(told))
    for place, settings in (("two", TO_LOAD), (".", {}), ("model.safetensors", {})):
        found = load(tmp_path / place, **settings)
        assert isinstance(found, ImageClassifier)
        torch.testing.assert_close(found(expected["images"]), expected["logits"], atol=1e-4, rtol=1e-4)
    other = load(tmp_path, probe_layers=(0, 1))
    assert isinstance(other, ImageClassifier)
    assert other.head_config.layers == (0, 1)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON .*; repair or remove it"):
        load(tmp_path)


def as_the_training_code_names(weights):
    return {name.replace("preprocessor.", "preprocessor.blocks.0."): w for name, w in weights.items()}


def test_a_whole_model_is_read_with_the_settings_of_the_training_code(whole):
    config = read(whole).config
    assert (config.image_size, config.norm_eps, config.prefix) == (56, 1e-5, True)
    assert (config.predictor, config.predictor_extra_norm) == ("mlp", True)
    assert (config.predictor_dim, config.predictor_depth, config.predictor_mlp_ratio) == (64, 2, 4.0)
    assert (config.projection_dim, config.block_mlp_dim) == (None, None)
    trunk = read({name: tensor for name, tensor in whole.items() if not name.startswith("head.")})
    assert (trunk.config.predictor, trunk.config.image_size) == (None, 56)


def test_half_precision_is_cast_to_fp32_and_its_rounded_positions_are_accepted(whole):
    model = read({n: w.to(torch.bfloat16) for n, w in whole.items()})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_is_read_or_refused_if_it_is_damaged_or_malicious(whole, tmp_path):
    from torch.distributed.checkpoint import save

    place, trap = tmp_path / "dcp", tmp_path / "trap"
    optimizer = {"state": {"x": torch.zeros(3)}, "param_groups": {"lr": 0.1}}
    content = {"model": as_the_training_code_names(whole), "optimizer": optimizer}
    save(content, checkpoint_id=place, no_dist=True)
    torch.save({"iteration": 9}, place / "other.pth")
    assert same_weights(load_model(place, num_heads=3), read(whole))
    table = (place / ".metadata").read_bytes()
    for damaged in (table[:100], b"", pickle.dumps({"a": Malicious(trap)})):
        (place / ".metadata").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="dcp"):
            load_model(place, num_heads=3)
    assert not trap.exists()
    (place / ".metadata").write_bytes(table)
    shard = next(place.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="dcp cannot be read as a weight file"):
        load_model(place, num_heads=3)


def test_settings_of_omegaconf_beside_the_weights_are_not_imported(whole, tmp_path, monkeypatch):
    made: dict[str, Any] = {}
    monkeypatch.setitem(sys.modules, "omegaconf", ModuleType("omegaconf"))
    for name, kind in {"base": "ContainerMetadata", "nodes": "AnyNode", "dictconfig": "DictConfig"}.items():
        module = ModuleType(f"omegaconf.{name}")
        made[kind] = type(kind, (), {"__module__": module.__name__})
        setattr(module, kind, made[kind])
        monkeypatch.setitem(sys.modules, module.__name__, module)
    metadata, node, settings = (make() for make in made.values())
    cache = defaultdict(dict, {"a": {"b": 1}})
    vars(metadata).update(key_type=Any, ref_type=dict, resolver_cache=cache)
    vars(node).update(_val=12, _metadata=metadata)
    vars(settings).update(_content={"num_heads": node}, _metadata=metadata, _parent=None)
    torch.save({"model": whole, "cfg": settings, "iteration": 9}, tmp_path / "consolidated.pth")
    monkeypatch.undo()
    assert same_weights(load_model(tmp_path / "consolidated.pth", num_heads=3), read(whole))
    assert not [name for name in sys.modules if name.startswith("omegaconf")]


def test_the_tables_of_official_sizes_are_used_if_the_caller_says_no_more(backbone, head, monkeypatch):
    sizes = [model_config(name) for name in ("aim-600m", "aim-1b", "aim-3b", "aim-7b")]
    best = [aim.BEST_LAYERS_OF_SIZE[size.embed_dim, size.depth] for size in sizes]
    assert best == [tuple(range(first, first + 6)) for first in (14, 12, 12, 14)]
    monkeypatch.setitem(aim.NUM_HEADS_OF_SIZE, (48, 4), 6)
    monkeypatch.setitem(aim.BEST_LAYERS_OF_SIZE, (48, 4), (0, 3))
    monkeypatch.setattr(aim, "PROBED_LAYERS", 3)
    assert read(backbone, num_heads=None).config.num_heads == 6
    assert read(backbone).config.num_heads == 3
    for name, layers in (("best", (0, 3)), ("last", (1, 2, 3))):
        assert read({**backbone, **head}, probe_layers=name).head_config.layers == layers


def test_an_image_size_that_the_patches_or_the_positions_do_not_make_is_refused(backbone, whole):
    wider = {**backbone, PROJECTION: torch.zeros(*backbone[PROJECTION].shape[:2], 18, 18)}
    with pytest.raises(CheckpointError, match=r"18-px patches, which do not make an image of 224x224 px"):
        read(wider)
    assert read(wider, image_size=36).config.grid == (2, 2)
    with pytest.raises(CheckpointError, match=r"grid of 16x16 patches .* give image_size="):
        read(whole, image_size=224)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        (f"{BLOCKS}0.mlp.fc3.weight", (192, 48), "AIMv2 (RMSNorm and SwiGLU); only AIM v1"),
        (PROJECTION, (48, 3, 14, 3), "has patches of 14x3 px; they must be"),
        (PROJECTION, None, "lacks 'encoder.patch_embed.proj.weight'"),
        (f"{BLOCKS}2.mlp.fc2.weight", None, "missing: encoder.blocks.2.mlp.fc2.weight"),
        ("trunk.extra", (1,), "holds 'trunk.extra', which is not in"),
        (f"{BLOCKS}0.attn.qkv.bias", (144,), "unexpected: encoder.blocks.0"),
        (f"{BLOCKS}1.attn.q_proj.weight", (48,), "blocks.1.attn.k_proj.we"),
    ],
)
def test_a_file_of_another_architecture_or_with_something_missing_is_refused(name, shape, words, backbone):
    changed = {**backbone, name: torch.zeros(shape or 1)}
    if shape is None:
        del changed[name]
    with pytest.raises(CheckpointError, match=re.escape(words)):
        read(changed)


def test_norms_without_biases_are_aimv2s(backbone):
    rms = {name: w for name, w in backbone.items() if not ("norm" in name and name.endswith(".bias"))}
    with pytest.raises(CheckpointError, match="AIMv2"):
        read(rms)


@pytest.mark.parametrize("name", ["preprocessor.pos_embed", "head.decoder_pos_embed"])
def test_positions_that_are_not_the_fixed_ones_are_refused(name, whole):
    whole[name][0, 5, 7] += 0.01
    with pytest.raises(CheckpointError, match="are not AIM's sines and cosines on a grid of 4x4 patches"):
        read(whole)


def test_a_head_that_does_not_belong_or_is_not_whole_is_refused(backbone, head, golden_dir, tmp_path):
    file = tmp_path / "head.pth"
    for of_head, layers, words in (
        (backbone, (1, 2), "is not the head of an AIM classifier"),
        ([torch.zeros(1)], (1, 2), "is not the head of an AIM classifier"),
        ({**head, "head.extra": torch.zeros(1)}, (1, 2), r"holds 'head\.extra'"),
        ({"head.cls_token": torch.zeros(1, 1, 48)}, (1, 2), r"lacks 'head\.linear\.weight'"),
        (head, "last", "last 6 layers"),
        (head, (3, 4), "an encoder with 4"),
        (head, "best", "known for AIM's sizes only, and FILE is 48 wide with 4 layers"),
    ):
        torch.save(of_head, file)
        with pytest.raises((ValueError, CheckpointError), match=words):
            read(backbone, head=file, probe_layers=layers)
    with pytest.raises(CheckpointError, match=r"has a head of its own .head\.bn"):
        read({**backbone, **head}, head=golden_dir / "aim_nano_head.pth")
    with pytest.raises(CheckpointError, match=r"none\.pth does not exist; give the path"):
        load(golden_dir / "aim_nano_backbone.pth", tmp_path / "none.pth", **TO_LOAD)
    with pytest.raises(UnknownFormatError, match="give its backbone, and this file as head="):
        load(golden_dir / "aim_nano_head.pth")
