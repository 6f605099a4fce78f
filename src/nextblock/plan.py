"""Estimate the arithmetic, memory and time of a training run from its settings, without training.

Arithmetic is that of matrix products, two operations per multiply-add. Attention counts all pairs of tokens,
including masked ones. Encoder and predictor see all blocks but the last, and a prefix removes predicted
blocks, as in `NextBlockModel.forward`.

Memory is what PyTorch keeps: fp32 weights, gradients and AdamW's moments, autocast's 16-bit copies of the
weights, and what autograd saves for the backward pass with a fused attention kernel.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from nextblock.config import ModelConfig, RunConfig
from nextblock.settings import Duration, require

RESERVE = 0.1
"""Share of a GPU's memory reserved for CUDA context, NCCL, kernel workspace and fragmentation."""
Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Gpu:
    """A GPU's published figures; peaks are TFLOP/s of dense products."""

    memory_gb: float
    tflops: float
    """In bf16 or fp16, accumulated in fp32."""
    fp32_tflops: float
    """In true fp32: torch uses TF32 only on request."""
    device: str
    """Regular expression that matches `torch.cuda.get_device_name()`."""
    source: str
    has_bf16: bool = True


# Vendors' figures. Their data sheets could not be read, so each source is a page that quotes them.
_GARDEN = "glennklockwood.com/garden/processors"
GPUS = {
    "h100": Gpu(80, 989.4, 66.9, r"\bH100 80GB HBM3", f"{_GARDEN}/h100 (SXM)"),
    "h100-pcie": Gpu(80, 756.5, 51, r"\bH100 PCIe", "archive-lib.hpctech.co.jp/gpuproduct/nvidia-h100.html"),
    "h200": Gpu(141, 989.4, 66.9, r"\bH200$", f"{_GARDEN}/h100"),
    "b200": Gpu(180, 2250, 80, r"\bB200\b", f"{_GARDEN}/B200 (HGX); memory: MLPerf's B200-SXM-180GB"),
    "a100": Gpu(80, 312, 19.5, r"\bA100\b", f"{_GARDEN}/A100"),
    "a100-40gb": Gpu(40, 312, 19.5, r"\bA100\b", f"{_GARDEN}/A100"),
    "v100": Gpu(
        *(32, 125, 15.7, r"\bV100-SXM", "developer.nvidia.com/programming-tensor-cores-cuda-9-0"),
        has_bf16=False,
    ),
    "l40s": Gpu(48, 362, 91.6, r"\bL40S\b", "mullet.se/product.html?product_id=355414"),
    "rtx4090": Gpu(24, 165.2, 82.6, r"\bRTX 4090$", "waredb.com/processor/nvidia-geforce-rtx-4090"),
    "mi300x": Gpu(192, 1307.4, 163.4, r"\bMI300X", "github.com/alpharomercoma/MI300X-vs-H200"),
}


def peak_tflops(device_name: str) -> float | None:
    """Peak dense 16-bit TFLOP/s of a `torch.cuda.get_device_name()`; None if unknown."""
    return next((gpu.tflops for gpu in GPUS.values() if re.search(gpu.device, device_name)), None)


# ------------------------------------------------------------------------------------------------- arithmetic


class Stack(NamedTuple):
    """Layers of one kind, and their work per image."""

    depth: int
    tokens: float
    width: int
    hidden: int
    """Hidden width of a layer's MLP."""
    heads: int
    """0: no attention."""
    norms: int

    @property
    def last_flops(self) -> float:
        """Operations of a layer's last product, its MLP's second map."""
        return 2 * self.tokens * self.width * self.hidden

    @property
    def flops(self) -> float:
        """Operations of one layer: MLP, qkv and output maps, scores and weighted sums."""
        attention = 8 * self.tokens * self.width**2 + 4 * self.tokens**2 * self.width
        return 2 * self.last_flops + attention * (self.heads > 0)

    def saved_bytes(self, number: int) -> float:
        """Bytes that autograd saves per layer; `number` is the bytes per element of a product's operands."""
        # fp32: each norm's input and two statistics. Operands: the MLP's input, and its hidden values before
        # and after the activation. Attention: its input, q k v, its output, and log-sums.
        rest = 4 * self.norms * (self.width + 2) + number * (self.width + 2 * self.hidden)
        attention = 5 * number * self.width + 4 * self.heads
        return self.tokens * (rest + attention * (self.heads > 0))


def stacks(config: ModelConfig) -> tuple[Stack, Stack]:
    """The layers of encoder and predictor."""
    m = config.patches_per_block
    tokens = (config.num_blocks - (config.mask_ratio is None)) * m + config.class_token
    encoder = Stack(
        config.depth, tokens, config.embed_dim, int(config.embed_dim * config.mlp_ratio), config.num_heads, 2
    )
    if not _has_layers(config):
        return encoder, Stack(0, _rows(config) * m, config.embed_dim, 0, 0, 0)
    width, depth = config.predictor_dim, config.predictor_depth
    hidden = int(width * config.predictor_mlp_ratio)
    if config.predictor == "transformer":
        return encoder, Stack(depth, tokens, width, hidden, config.predictor_heads, 2)
    return encoder, Stack(depth, _rows(config) * m, width, hidden, 0, 1 + config.predictor_extra_norm)


def _rows(config: ModelConfig) -> float:
    """Blocks per image that predict, averaged over prefixes, which are uniform on 1 .. k-1."""
    k, ahead = config.num_blocks, config.num_predicted_blocks
    # A row is computed if its farthest target lies behind the prefix, as in `NextBlockModel.forward`.
    lost = sum(max(0, length - ahead) for length in range(1, k)) / (k - 1)
    return k - (config.mask_ratio is None) + config.class_token - lost * config.prefix


def _rows_by_distance(config: ModelConfig) -> list[float]:
    """Rows that each block MLP sees."""
    return [_rows(config) if config.prefix else config.steps(d).number for d in config.distances]


def _has_layers(config: ModelConfig) -> bool:
    """Whether the predictor is more than an output map."""
    return config.predictor in ("transformer", "mlp")


def _targets(config: ModelConfig) -> Any:
    import torch

    from nextblock.targets import make_targets

    with torch.device("meta"):
        return make_targets(config)


def _mlp_flops(rows: float, inputs: int, hidden: int | None, outputs: int) -> float:
    """Operations of an MLP; without a hidden width, of one linear map."""
    return 2 * rows * (inputs * outputs if hidden is None else hidden * (inputs + outputs))


def forward_flops(config: ModelConfig) -> dict[str, float]:
    """Operations of one image's forward pass, by part."""
    encoder, predictor = stacks(config)
    # Per dimension of the embedding. All patches are embedded, including the last block's.
    patches = 2 * config.num_patches * config.in_chans * config.patch_size**2
    projection = _mlp_flops(predictor.tokens, config.embed_dim, config.projection_dim, predictor.width)
    joined, rows = predictor.width * config.patches_per_block, sum(_rows_by_distance(config))
    return {
        "patch_embed": patches * config.embed_dim,
        "encoder": encoder.depth * encoder.flops,
        "projection": projection * _has_layers(config),
        "predictor": predictor.depth * predictor.flops,
        "block_mlp": _mlp_flops(rows, joined, config.block_mlp_dim, _targets(config).outputs)
        * (config.predictor != "identity"),
        "tokenizer": _targets(config).flops,
    }


def step_flops_by_part(config: ModelConfig, *, recompute: bool = False) -> dict[str, float]:
    """Operations of one image's forward and backward pass, by part."""
    # The backward pass has two products for each one, a gradient per operand. Images need no gradient, and
    # k-means tokens are computed without.
    times = {"patch_embed": 2, "tokenizer": 1}
    parts = {name: times.get(name, 3) * flops for name, flops in forward_flops(config).items()}
    # A checkpointed layer is recomputed only as far as the backward pass needs it: without its last product,
    # which nothing saves.
    for name, stack in zip(("encoder", "predictor"), stacks(config), strict=True):
        parts[name] += recompute * stack.depth * (stack.flops - stack.last_flops)
    return parts


def step_flops(config: ModelConfig, *, recompute: bool = False) -> float:
    """Operations of one image's forward and backward pass; with `recompute`, including checkpointed layers.

    Model-FLOPs utilisation leaves recomputation out, by definition.
    """
    return sum(step_flops_by_part(config, recompute=recompute).values())


# ----------------------------------------------------------------------------------------------------- memory


class Parameters(NamedTuple):
    """Parameter counts of a model."""

    encoder: int
    predictor: int
    frozen: int
    """Not trained, and counted in neither: sin-cos positions and k-means centroids."""
    cast: int
    """Copied to 16 bits by autocast: matrices and their biases."""
    predictor_cast: int
    """The part of `cast` in the predictor's layers."""
    layer: int
    """In the largest layer."""
    outside: int
    """Outside all layers, such as in the block MLP."""

    @property
    def trained(self) -> int:
        """All trained parameters."""
        return self.encoder + self.predictor


@functools.cache
def count_parameters(config: ModelConfig) -> Parameters:
    """Count the parameters of a model, built on the meta device."""
    import torch
    from torch import nn

    from nextblock.models import NextBlockModel

    def count(module: nn.Module, *, trained: bool = True) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad is trained)

    def cast(module: nn.Module) -> int:
        return sum(count(part) for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d))

    with torch.device("meta"):
        model = NextBlockModel(config)
    assert model.predictor is not None, "an encoder alone is not trained"
    layers = [count(layer) for layer in [*model.encoder.blocks, *model.predictor.blocks]]
    return Parameters(
        encoder=count(model.encoder),
        predictor=count(model) - count(model.encoder),  # with the mask token
        frozen=count(model, trained=False)
        + sum(b.numel() for b in (model.tokenizer or nn.Module()).buffers()),
        cast=cast(model),
        predictor_cast=cast(model.predictor.blocks),
        layer=max(layers),
        outside=count(model) - sum(layers),
    )


def activation_bytes(
    config: ModelConfig,
    batch: int = 1,
    precision: Precision = "bf16",
    *,
    predictor_fp32: bool = False,
    recompute: bool = False,
) -> float:
    """Bytes that autograd saves for a batch; with `recompute`, layers keep only their input."""
    encoder, predictor = stacks(config)
    factor = 4 if precision == "fp32" else 2  # bytes per element of operands; the rest is fp32
    rows, outputs, n = _rows_by_distance(config), _targets(config).outputs, config.num_patches
    between = _has_layers(config)  # a linear predictor has neither projection nor norm
    layers, masks = 0.0, 0.0
    for stack, number in ((encoder, factor), (predictor, 4 if predictor_fp32 else factor)):
        layers += stack.depth * (4 * stack.tokens * stack.width if recompute else stack.saved_bytes(number))
        # Each attention converts the boolean mask to numbers.
        masks += number * stack.depth * stack.tokens**2 * (stack.heads > 0 and not recompute)
    image = (
        factor * n * config.in_chans * config.patch_size**2
        + 4 * n * (encoder.width + 2) * config.patch_norm
        + layers
        + 4 * encoder.tokens * (encoder.width + 2)  # the final norm's input and statistics
        + between * factor * predictor.tokens * (encoder.width + 2 * (config.projection_dim or 0))
        + between * 4 * predictor.tokens * (predictor.width + 2)
        # A block's tokens as the input of each block MLP, and hidden values before and after the activation.
        + factor * predictor.width * config.patches_per_block * (rows[0] if config.prefix else sum(rows))
        + factor * 2 * (config.block_mlp_dim or 0) * sum(rows)
        # The loss keeps differences, or log-softmax; a prefix puts predictions back into their places.
        + 4 * outputs * sum(config.num_blocks - 1 - i for i in range(len(rows)))
        + factor * outputs * sum(rows) * config.prefix
    )
    # With prefixes every image has its own mask, else the batch shares one.
    return batch * (image + masks) if config.prefix else batch * image + masks


def image_bytes(config: RunConfig, precision: Precision, *, recompute: bool) -> tuple[float, float]:
    """Bytes of activations that the images of a batch share (masks), and bytes of each image."""
    one, two = (
        activation_bytes(
            config.model, batch, precision, predictor_fp32=config.train.predictor_fp32, recompute=recompute
        )
        for batch in (1, 2)
    )
    return 2 * one - two, two - one


def memory(
    config: RunConfig, precision: Precision, gpus: int, *, sharded: bool, recompute: bool
) -> dict[str, float]:
    """Bytes per GPU, under FSDP2 if `sharded`, else DDP; "image" is per image of the micro-batch."""
    count, fp32 = count_parameters(config.model), config.train.predictor_fp32
    share = gpus if sharded else 1
    masks, image = image_bytes(config, precision, recompute=recompute)
    # In the backward pass one checkpointed layer at a time has all its tensors.
    encoder, predictor = stacks(config.model)
    factor = 4 if precision == "fp32" else 2
    layer = max(encoder.saved_bytes(factor), predictor.saved_bytes(4 if fp32 else factor))
    return {
        "weights": 4 * (count.trained + count.frozen) / share,
        "gradients": 4 * count.trained / share,
        "moments": 8 * count.trained / share,
        # Not sharded by FSDP2: autograd keeps autocast's copies of the gathered weights.
        "copies": 0 if precision == "fp32" else 2 * (count.cast - fp32 * count.predictor_cast),
        # DDP copies gradients into buckets. FSDP2 holds gathered weights and unscattered gradients of the
        # current and the next layer, and throughout of parameters outside all layers.
        "exchange": 8 * (count.outside + 2 * count.layer) if sharded else 4 * count.trained * (gpus > 1),
        "masks": masks,
        "image": image + layer * recompute,
    }


# ------------------------------------------------------------------------------------------------------- time


def precision_on(gpu: Gpu, precision: str) -> Precision:
    """Resolve train.precision on a GPU; raises `ValueError` if the GPU does not support it."""
    if precision == "auto":
        return "bf16" if gpu.has_bf16 else "fp32"
    require(
        gpu.has_bf16 or precision != "bf16",
        "this GPU does not compute in bf16; use --train.precision fp16 or fp32",
    )
    return precision  # type: ignore[return-value]


def images_per_s(config: RunConfig, gpu: Gpu, *, recompute: bool) -> float:
    """Images per second at a GPU's peak."""
    parts = step_flops_by_part(config.model, recompute=recompute)
    is_fp32 = precision_on(gpu, config.train.precision) == "fp32"
    fp32 = sum(parts.values()) if is_fp32 else parts["predictor"] * config.train.predictor_fp32
    return 1e12 / ((sum(parts.values()) - fp32) / gpu.tflops + fp32 / gpu.fp32_tflops)


def plan(config: RunConfig, gpu: Gpu, gpus: int, *, mfu: float, images: int | None = None) -> dict[str, Any]:
    """Estimate a training run on `gpus` GPUs, as plain values in bytes, operations and images per second.

    Without `images`, the number of images, steps, samples and epochs may be None. Raises `ValueError` for
    settings that cannot be trained.
    """
    from nextblock.models.next_block import check_predicts, masks_leak

    config.check_trainable()
    check_predicts(config.model, leaks=masks_leak(config.model))
    # As in the training loop: a batch is at most all images, and an epoch is a whole number of batches.
    epoch, batch_size = config.data.epoch_samples or images, config.train.batch_size
    batch_size = min(batch_size, epoch or batch_size)
    duration, steps_per_epoch = Duration.parse(config.train.duration), epoch and epoch // batch_size
    steps = None
    if steps_per_epoch or duration.unit != "epochs":
        steps = max(1, duration.steps(batch_size=batch_size, steps_per_epoch=steps_per_epoch or 1))
    require(gpus <= batch_size, f"{gpus} GPUs are more than the {batch_size} images of a step; use fewer")

    precision, count = precision_on(gpu, config.train.precision), count_parameters(config.model)
    share = math.ceil(batch_size / gpus)
    micro = config.train.micro_batch_size
    micro_batch = share if micro is None or micro == "auto" else min(share, micro)
    layouts = []
    for sharded, recompute in itertools.product((False, True) if gpus > 1 else (False,), (False, True)):
        needs = memory(config, precision, gpus, sharded=sharded, recompute=recompute)
        fixed = sum(needs.values()) - needs["image"]
        room = gpu.memory_gb * 1e9 * (1 - RESERVE) - fixed
        rate = gpus * mfu * images_per_s(config, gpu, recompute=recompute)
        layouts.append(
            {"sharded": sharded, "recompute": recompute, **needs}
            | {"activations": needs["masks"] + micro_batch * needs["image"]}
            | {"total": fixed + micro_batch * needs["image"]}
            | {"largest_micro_batch": max(0, int(room // needs["image"])), "images_per_s": rate}
        )
    return {
        "precision": precision,
        "parameters": count._asdict() | {"trained": count.trained},
        "forward_flops": forward_flops(config.model),
        "step_flops": step_flops(config.model),
        "step_flops_recomputed": step_flops(config.model, recompute=True),
        "batch_size": batch_size,
        "images_per_gpu": share,
        "micro_batch": micro_batch,
        "layouts": layouts,
        "steps": steps,
        "samples": steps and steps * batch_size,
        "epochs": steps and steps_per_epoch and steps / steps_per_epoch,
        "model_bytes": 4 * (count.trained + count.frozen),
        "optimizer_bytes": 8 * count.trained,
    }
