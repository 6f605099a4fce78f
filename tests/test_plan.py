"""The plan of a training, against what torch counts and keeps of small models."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nextblock.cli import main
from nextblock.models import NextBlockModel
from nextblock.optim import parameter_groups
from nextblock.plan import (
    GPUS,
    activation_bytes,
    count_parameters,
    forward_flops,
    images_per_s,
    memory,
    peak_tflops,
    step_flops,
)
from nextblock.presets import get_preset, list_presets, model_config

WIDTHS = {"embed_dim": 40, "depth": 2, "num_heads": 4, "predictor_dim": 24, "predictor_depth": 3}
XTRA = model_config("xtra-tiny", **WIDTHS, predictor_heads=2, projection_dim=52, block_mlp_dim=56)
AIM = model_config("aim-tiny", **WIDTHS)
MODELS = {
    "xtra": XTRA,
    "xtra, two ahead": replace(XTRA, num_predicted_blocks=2, norm_pixels=False),
    "xtra, patches": replace(XTRA, block_size=1, projection_dim=None, block_mlp_dim=None),
    "xtra with a prefix": replace(XTRA, prefix=True, num_predicted_blocks=2),
    "aim": AIM,
    "aim, linear": replace(AIM, predictor="linear"),
    "aim, blocks": replace(AIM, block_size=(2, 4), predictor_extra_norm=False, patch_norm=False),
    "aim, tokens": replace(AIM, target="tokens", vocab_size=32),
}


def made(config, batch, *, recompute=False):
    """A model, and arguments whose prefixes are every length as often: the mean that is planned for."""
    model = NextBlockModel(config).train()
    model.set_grad_checkpointing(recompute)
    if model.tokenizer is not None:
        model.tokenizer.centroids.normal_()
    batch *= config.num_blocks - 1 if config.prefix else 1
    prefixes = torch.arange(batch) % (config.num_blocks - 1) + 1 if config.prefix else None
    return model, (torch.rand(batch, 3, 32, 32), None, prefixes)


def saved_bytes(call, model):
    """Bytes that autograd keeps of a call besides the model itself."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no address is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    assert result is not None  # and holds what was kept until here
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_of_torchs_counter(name, recompute):
    """Exactly, with attention as two products, the only one on a CPU that the counter knows.

    A fused kernel makes the scores again in its backward pass: five products, of which four are counted.
    """
    config = MODELS[name]
    model, arguments = made(config, 2, recompute=recompute)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = model(*arguments).loss
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    counted = forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()
    planned = sum(forward_flops(config).values()), step_flops(config, recompute=recompute)
    assert [flops / len(arguments[0]) for flops in counted] == pytest.approx(planned)


def test_aim_7b_needs_what_its_parameters_tell():
    """Six operations a parameter and token, twelve a pair of tokens and channel; the head sees half."""
    config, tokens = model_config("aim-7b"), 255
    encoder = 6 * 6.445e9 * tokens + 12 * 32 * 4096 * tokens**2
    head = 6 * 0.411e9 * (tokens + 1) / 2
    assert step_flops(config) == pytest.approx(encoder + head, rel=0.002)


@pytest.mark.parametrize(("precision", "batch"), [("fp32", 2), ("bf16", 3)])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_activations_are_those_that_autograd_keeps(name, recompute, batch, precision):
    config, is_bf16 = MODELS[name], precision == "bf16"
    model, arguments = made(config, batch, recompute=recompute)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
        kept = saved_bytes(lambda: model(*arguments), model)
    # Autocast's copies of weights are planned by themselves. Those of recomputed layers are not kept.
    assert model.predictor is not None
    layers = set(model.encoder.blocks.modules()) | set(model.predictor.blocks.modules())
    cast = [m for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    copies = is_bf16 * sum(2 * m.weight.numel() for m in cast if not (recompute and m in layers))
    # On CUDA a norm is given fp32; a CPU's norm of the patches keeps their 16 bits.
    narrow = is_bf16 * config.patch_norm * 2 * len(arguments[0]) * config.num_patches * config.embed_dim
    planned = activation_bytes(config, len(arguments[0]), precision, recompute=recompute)
    assert kept - copies + narrow == pytest.approx(planned, rel=0.02)


@pytest.mark.parametrize("name", list_presets())
def test_parameters_are_exact(name):
    config = get_preset(name).config.model
    # Two layers of each stack, as more of the same kind take long to make.
    config = replace(config, depth=2, predictor_depth=min(2, config.predictor_depth))
    with torch.device("meta"):
        model = NextBlockModel(config)
    groups = parameter_groups(model, 0.0)
    count = count_parameters(config)
    assert count.trained == sum(p.numel() for group in groups for p in group["params"])
    assert count.trained + count.frozen == sum(t.numel() for t in model.state_dict().values())
    assert count.encoder == sum(p.numel() for p in model.encoder.parameters() if p.requires_grad)


def test_fsdp_shards_all_but_the_copies_and_the_layers_at_work():
    config, count = get_preset("aim-7b-dfn2b+").config, count_parameters(model_config("aim-7b"))
    whole, shards = (memory(config, "bf16", 64, sharded=sharded, recompute=True) for sharded in (False, True))
    for name, bytes_ in {"gradients": 4, "moments": 8}.items():
        assert (whole[name], shards[name]) == (bytes_ * count.trained, bytes_ * count.trained / 64)
    assert whole["copies"] == shards["copies"] == pytest.approx(2 * count.trained, rel=0.001)
    assert shards["exchange"] < whole["exchange"] / 8


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_the_peak_of_a_device_is_known_by_its_name(device, tflops):
    assert peak_tflops(device) == tflops


def test_fp32_parts_take_the_time_of_fp32():
    config, gpu = get_preset("xtra-b16-in1k").config, GPUS["v100"]
    slow, fast = (
        images_per_s(replace(config, train=replace(config.train, predictor_fp32=fp32)), gpu, recompute=False)
        for fp32 in (True, False)
    )
    assert fast == pytest.approx(125e12 / step_flops(config.model))
    predictor = 3 * forward_flops(config.model)["predictor"]
    assert 1 / slow - 1 / fast == pytest.approx(predictor * (1 / 15.7e12 - 1 / 125e12))


def planned(capsys, *words):
    assert main(["plan", *words]) == 0
    return capsys.readouterr().out


def test_the_command_prints_what_a_stranger_needs_in_80_columns(capsys):
    out = planned(capsys, "--preset", "aim-7b-dfn2b+", "--gpus", "64", "--gpu", "H100")
    assert max(map(len, out.splitlines())) <= 80
    assert {"6,857.8", "1,200,000", "989.4"} <= set(out.split())


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["--preset", "xtra-b16", "--images", "1000"], 300),
        (["--preset", "xtra-b16", "--images", "100"], 100),
        (["--preset", "xtra-b16", "--train.duration", "25600sa"], 100),
        (["--preset", "xtra-b16"], None),
        (["--preset", "xtra-b16-in1k"], 800 * 613),
        (["--preset", "xtra-tiny", "--data.train", "digits:split=train"], None),
    ],
)
def test_steps_follow_from_the_number_of_images(capsys, words, steps):
    told = json.loads(planned(capsys, *words, "--gpu_memory_gb", "10", "--gpu_tflops", "20", "--json"))
    if "digits:split=train" in words:
        steps = 24 * (told["images"] // 64)
    assert told["steps"] == steps
    assert told["gpu"]["memory_gb"] == 10


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--gpu", "h1000"], "gpu is 'h1000'; did you mean h100?"),
        (["--gpu_memory_gb", "80"], "--gpu must be given"),
        (["--gpu", "v100", "--train.precision", "bf16"], "does not compute in bf16"),
        (["--gpu", "h100", "--gpus", "257"], "257 GPUs are more than the 256 images of a step"),
        (["--gpu", "h100", "--mfu", "1.5"], "above 0 and up to 1"),
        (["--gpu", "h100", "--model.predictor_attention", "full"], "training would learn to copy"),
    ],
)
def test_what_cannot_be_planned_is_refused(capsys, words, reason):
    assert main(["plan", *words]) == 2
    assert reason in capsys.readouterr().err
