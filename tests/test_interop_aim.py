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

from conftest import GOLDEN_DIR
from nextblock.checkpoint import CheckpointError, MissingSettingError, UnknownFormatError
from nextblock.interop import aim, load, load_model
from nextblock.interop.aim import read_aim
from nextblock.interop.files import LoadOptions, unwrapped
from nextblock.presets import model_config
from test_checkpoint import same_weights
from test_load import Malicious
from toy import tiny_images

PROJECTION = "preprocessor.patchifier.proj.weight"
BLOCKS = "trunk.blocks."
TO_LOAD = {"num_heads": 3, "probe_layers": (1, 2)}
BACKBONE, HEAD = (torch.load(GOLDEN_DIR / f"aim_nano_{part}.pth") for part in ("backbone", "head"))
WHOLE = load_file(GOLDEN_DIR / "aim_pretrain_nano_weights.safetensors")
"""A model with its prediction head, in the layout of the training code."""


def read(content, num_heads: int | None = 3, beside=None, **settings) -> Any:
    weights = unwrapped(content)
    if not any(name.endswith("pos_embed") for name in weights):
        settings = {"image_size": 224, **settings}
    return read_aim(weights, beside or {}, "FILE", LoadOptions(num_heads=num_heads, **settings))


def test_a_backbone_alone_is_an_encoder_of_any_size_with_the_settings_of_the_inference_code():
    default, told = read(BACKBONE), read(BACKBONE, image_size=56)
    config, images = default.config, tiny_images(size=(56, 56))
    assert (config.patch_size, config.embed_dim, config.depth, config.num_heads) == (14, 48, 4, 3)
    assert (config.mlp_ratio, config.norm_eps, config.feature_attention) == (4.0, 1e-6, "full")
    assert (config.predictor, config.image_size) == (None, 224)
    # Positions that are not stored are computed for any size.
    torch.testing.assert_close(default.encode(images).tokens, told.encode(images).tokens)
    assert read(BACKBONE, image_size=(28, 56)).config.grid == (2, 4)


def test_the_hubs_configuration_tells_what_the_file_does_not():
    beside = {"img_size": [28, 56], "embed_dim": 48, "num_blocks": 4, "num_heads": 6}
    for told, layers in (([1, 2], (1, 2)), (3, (1, 2, 3))):
        found = read(BACKBONE | HEAD, None, {**beside, "probe_layers": told}, image_size=None)
        config = found.encoder_model.config
        assert (found.head_config.layers, config.num_heads, config.image_size) == (layers, 6, (28, 56))
    with pytest.raises(MissingSettingError, match="how many attention heads"):
        read(BACKBONE, None, {**beside, "embed_dim": 1536})  # of another model


def test_a_directory_of_apples_files_is_a_classifier(golden, golden_dir, tmp_path):
    expected = golden("aim_nano")
    (tmp_path / "two").mkdir()
    for part in ("backbone", "head"):
        shutil.copy(golden_dir / f"aim_nano_{part}.pth", tmp_path / "two" / f"{part}.pth")
    save_file(BACKBONE | HEAD, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    told = {"img_size": 56, "embed_dim": 48, "num_blocks": 4, "num_heads": 3, "probe_layers": [1, 2]}
    (tmp_path / "config.json").write_text(json.dumps(told))
    for place, settings in (("two", TO_LOAD), (".", {}), ("model.safetensors", {})):
        found: Any = load(tmp_path / place, **settings)
        torch.testing.assert_close(found(expected["images"]), expected["logits"], atol=1e-4, rtol=1e-4)
    other: Any = load(tmp_path, probe_layers=(0, 1))
    assert other.head_config.layers == (0, 1)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON .*; repair or remove it"):
        load(tmp_path)


def test_a_whole_model_is_read_in_any_precision_with_the_settings_of_the_training_code():
    config = read(WHOLE).config
    assert (config.image_size, config.norm_eps, config.prefix) == (56, 1e-5, True)
    assert (config.predictor, config.predictor_extra_norm) == ("mlp", True)
    assert (config.predictor_dim, config.predictor_depth, config.predictor_mlp_ratio) == (64, 2, 4.0)
    assert (config.projection_dim, config.block_mlp_dim) == (None, None)
    trunk = read({name: tensor for name, tensor in WHOLE.items() if not name.startswith("head.")})
    assert (trunk.config.predictor, trunk.config.image_size) == (None, 56)
    half = read({name: tensor.to(torch.bfloat16) for name, tensor in WHOLE.items()})  # positions are rounded
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_is_read_or_refused_if_it_is_damaged_or_malicious(tmp_path):
    from torch.distributed.checkpoint import save

    place, trap = tmp_path / "dcp", tmp_path / "trap"
    optimizer = {"state": {"x": torch.zeros(3)}, "param_groups": {"lr": 0.1}}
    named = {name.replace("preprocessor.", "preprocessor.blocks.0."): WHOLE[name] for name in WHOLE}
    save({"model": named, "optimizer": optimizer}, checkpoint_id=place, no_dist=True)
    torch.save({"iteration": 9}, place / "other.pth")
    assert same_weights(load_model(place, num_heads=3), read(WHOLE))
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


def test_settings_of_omegaconf_beside_the_weights_are_not_imported(tmp_path, monkeypatch):
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
    torch.save({"model": WHOLE, "cfg": settings, "iteration": 9}, tmp_path / "consolidated.pth")
    monkeypatch.undo()
    assert same_weights(load_model(tmp_path / "consolidated.pth", num_heads=3), read(WHOLE))
    assert not [name for name in sys.modules if name.startswith("omegaconf")]


def test_the_tables_of_official_sizes_are_used_if_the_caller_says_no_more(monkeypatch):
    sizes = [model_config(name) for name in ("aim-600m", "aim-1b", "aim-3b", "aim-7b")]
    best = [aim.BEST_LAYERS_OF_SIZE[size.embed_dim, size.depth] for size in sizes]
    assert best == [tuple(range(first, first + 6)) for first in (14, 12, 12, 14)]
    monkeypatch.setitem(aim.NUM_HEADS_OF_SIZE, (48, 4), 6)
    monkeypatch.setitem(aim.BEST_LAYERS_OF_SIZE, (48, 4), (0, 3))
    monkeypatch.setattr(aim, "PROBED_LAYERS", 3)
    assert read(BACKBONE, num_heads=None).config.num_heads == 6
    assert read(BACKBONE).config.num_heads == 3
    for name, layers in (("best", (0, 3)), ("last", (1, 2, 3))):
        assert read(BACKBONE | HEAD, probe_layers=name).head_config.layers == layers


def test_an_image_size_that_the_patches_or_the_positions_do_not_make_is_refused():
    wider = {**BACKBONE, PROJECTION: torch.zeros(*BACKBONE[PROJECTION].shape[:2], 18, 18)}
    with pytest.raises(CheckpointError, match=r"18-px patches, which do not make an image of 224x224 px"):
        read(wider)
    assert read(wider, image_size=36).config.grid == (2, 2)
    with pytest.raises(CheckpointError, match=r"grid of 16x16 patches .* give image_size="):
        read(WHOLE, image_size=224)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({f"{BLOCKS}0.mlp.fc3.weight": (192, 48)}, "AIMv2 (RMSNorm and SwiGLU); only AIM v1"),
        ({f"{BLOCKS}{i}.norm_1.bias": None for i in range(4)}, "AIMv2 (RMSNorm and SwiGLU)"),
        ({PROJECTION: (48, 3, 14, 3)}, "has patches of 14x3 px; they must be"),
        ({PROJECTION: None}, "lacks 'encoder.patch_embed.proj.weight'"),
        ({f"{BLOCKS}2.mlp.fc2.weight": None}, "missing: encoder.blocks.2.mlp.fc2.weight"),
        ({"trunk.extra": (1,)}, "holds 'trunk.extra', which is not in"),
        ({f"{BLOCKS}0.attn.qkv.bias": (144,)}, "unexpected: encoder.blocks.0"),
        ({f"{BLOCKS}1.attn.q_proj.weight": (48,)}, "blocks.1.attn.k_proj.we"),
    ],
)
def test_a_file_of_another_architecture_or_with_something_missing_is_refused(shapes, words):
    kept = {name: weight for name, weight in BACKBONE.items() if name not in shapes}
    added = {name: torch.zeros(shape) for name, shape in shapes.items() if shape is not None}
    with pytest.raises(CheckpointError, match=re.escape(words)):
        read(kept | added)


@pytest.mark.parametrize("name", ["preprocessor.pos_embed", "head.decoder_pos_embed"])
def test_positions_that_are_not_the_fixed_ones_are_refused(name):
    other = WHOLE[name].clone()
    other[0, 5, 7] += 0.01
    with pytest.raises(CheckpointError, match="are not AIM's sines and cosines on a grid of 4x4 patches"):
        read({**WHOLE, name: other})


@pytest.mark.parametrize(
    ("head", "layers", "words"),
    [
        (BACKBONE, (1, 2), "is not the head of an AIM classifier"),
        ([torch.zeros(1)], (1, 2), "is not the head of an AIM classifier"),
        ({**HEAD, "head.extra": torch.zeros(1)}, (1, 2), r"holds 'head\.extra'"),
        ({"head.cls_token": torch.zeros(1, 1, 48)}, (1, 2), r"lacks 'head\.linear\.weight'"),
        (HEAD, "last", "last 6 layers"),
        (HEAD, (3, 4), "an encoder with 4"),
        (HEAD, "best", "known for AIM's sizes only, and FILE is 48 wide with 4 layers"),
    ],
)
def test_a_head_that_does_not_fit_or_is_not_whole_is_refused(head, layers, words, tmp_path):
    torch.save(head, tmp_path / "head.pth")
    with pytest.raises((ValueError, CheckpointError), match=words):
        read(BACKBONE, head=tmp_path / "head.pth", probe_layers=layers)


def test_a_second_head_none_and_a_head_alone_are_refused(golden_dir, tmp_path):
    with pytest.raises(CheckpointError, match=r"has a head of its own .head\.bn"):
        read(BACKBONE | HEAD, head=golden_dir / "aim_nano_head.pth")
    with pytest.raises(CheckpointError, match=r"none\.pth does not exist; give the path"):
        load(golden_dir / "aim_nano_backbone.pth", tmp_path / "none.pth", **TO_LOAD)
    with pytest.raises(UnknownFormatError, match="give its backbone, and this file as head="):
        load(golden_dir / "aim_nano_head.pth")
