"""What a training will need, counted from its settings: arithmetic, memory and time. Nothing is trained.

Arithmetic is that of matrix products, two operations for a multiplication and its addition. Attention counts
all pairs of tokens that it computes, also those that a mask forbids. Encoder and predictor see all blocks but
the last, and a prefix takes predicted blocks away, as in `NextBlockModel.forward`.

Memory is what PyTorch keeps: fp32 weights, gradients and AdamW's moments, autocast's 16-bit copies of the
weights, and what autograd saves for the backward pass if a fused kernel computes attention.
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
"""Share of a GPU's memory left to the CUDA context, NCCL, kernels' workspace and fragmentation."""
Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Gpu:
    """A GPU as its maker describes it; peaks are TFLOP/s of dense products."""

    memory_gb: float
    tflops: float
    """In bf16 or fp16, summed in fp32."""
    fp32_tflops: float
    """In fp32 proper: torch uses TF32 only if it is told to."""
    device: str
    """Regular expression to be found in `torch.cuda.get_device_name()`."""
    source: str
    has_bf16: bool = True


# Makers' figures. The data sheets themselves could not be read, so the source is a page that quotes them.
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
    """Peak dense 16-bit TFLOP/s of what `torch.cuda.get_device_name()` names; None if it is not known."""
    return next((gpu.tflops for gpu in GPUS.values() if re.search(gpu.device, device_name)), None)


# ------------------------------------------------------------------------------------------------- arithmetic


class Stack(NamedTuple):
    """Layers of one kind, and what they compute of an image."""

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
        """The last product of a layer: its MLP's second map."""
        return 2 * self.tokens * self.width * self.hidden

    @property
    def flops(self) -> float:
        """Products of one layer: MLP, and qkv and output maps, scores and weighted sums."""
        attention = 8 * self.tokens * self.width**2 + 4 * self.tokens**2 * self.width
        return 2 * self.last_flops + attention * (self.heads > 0)

    def saved_bytes(self, number: int) -> float:
        """What autograd saves of one layer; `number` is the bytes of a factor of a product."""
        # fp32: what each norm is given, and its two statistics. Factors: what goes into the MLP, and its
        # hidden values before and after the activation. Of attention: its input, q k v, its output, log-sums.
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
    """Blocks of an image that predict; the mean over prefixes, which are uniform on 1 .. k-1."""
    k, ahead = config.num_blocks, config.num_predicted_blocks
    # Of use is a row whose farthest target lies behind the prefix, as in `NextBlockModel.forward`.
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
    """An MLP; without a hidden width, one linear map."""
    return 2 * rows * (inputs * outputs if hidden is None else hidden * (inputs + outputs))


def forward_flops(config: ModelConfig) -> dict[str, float]:
    """Operations of one image's forward pass, by part."""
    encoder, predictor = stacks(config)
    # Per vector that it makes of a patch; all patches are embedded, the last block's too.
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
    # Backward, every product comes twice: once for each factor's gradient. Images want none, and the tokens
    # of k-means are made without gradients.
    times = {"patch_embed": 2, "tokenizer": 1}
    parts = {name: times.get(name, 3) * flops for name, flops in forward_flops(config).items()}
    # A checkpointed layer is run again only as far as the backward pass needs it: without its last product,
    # which nothing saves.
    for name, stack in zip(("encoder", "predictor"), stacks(config), strict=True):
        parts[name] += recompute * stack.depth * (stack.flops - stack.last_flops)
    return parts


def step_flops(config: ModelConfig, *, recompute: bool = False) -> float:
    """Operations of one image's forward and backward pass; with `recompute`, of checkpointed layers too.

    Model-FLOPs utilisation leaves recomputation out, by definition.
    """
    return sum(step_flops_by_part(config, recompute=recompute).values())


# ----------------------------------------------------------------------------------------------------- memory


class Parameters(NamedTuple):
    """Numbers of a model's parameters."""

    encoder: int
    predictor: int
    frozen: int
    """Not trained and in neither: sin-cos positions, and centroids of k-means."""
    cast: int
    """What autocast copies to 16 bits: matrices and their biases."""
    predictor_cast: int
    """Of these, those of the predictor's layers."""
    layer: int
    """The largest layer."""
    outside: int
    """All that lies in no layer, such as the block MLP."""

    @property
    def trained(self) -> int:
        """All that is trained."""
        return self.encoder + self.predictor


@functools.cache
def count_parameters(config: ModelConfig) -> Parameters:
    """Count the parameters of a model that is built without memory."""
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
    """What autograd saves in the forward pass of a batch; with `recompute`, layers keep their input alone."""
    encoder, predictor = stacks(config)
    factor = 4 if precision == "fp32" else 2  # bytes of a factor of a product; all else is fp32
    rows, outputs, n = _rows_by_distance(config), _targets(config).outputs, config.num_patches
    between = _has_layers(config)  # a linear predictor has neither projection nor norm
    layers, masks = 0.0, 0.0
    for stack, number in ((encoder, factor), (predictor, 4 if predictor_fp32 else factor)):
        layers += stack.depth * (4 * stack.tokens * stack.width if recompute else stack.saved_bytes(number))
        # Each attention makes numbers of the mask.
        masks += number * stack.depth * stack.tokens**2 * (stack.heads > 0 and not recompute)
    image = (
        factor * n * config.in_chans * config.patch_size**2
        + 4 * n * (encoder.width + 2) * config.patch_norm
        + layers
        + 4 * encoder.tokens * (encoder.width + 2)  # what the final norm is given, and its statistics
        + between * factor * predictor.tokens * (encoder.width + 2 * (config.projection_dim or 0))
        + between * 4 * predictor.tokens * (predictor.width + 2)
        # A block's tokens as the input of each block MLP, and hidden values before and after the activation.
        + factor * predictor.width * config.patches_per_block * (rows[0] if config.prefix else sum(rows))
        + factor * 2 * (config.block_mlp_dim or 0) * sum(rows)
        # The loss keeps differences, or log-softmax; a prefix puts predictions back into their places.
        + 4 * outputs * sum(config.num_blocks - 1 - i for i in range(len(rows)))
        + factor * outputs * sum(rows) * config.prefix
    )
    # With prefixes every image has its own mask, else the batch has one.
    return batch * (image + masks) if config.prefix else batch * image + masks


def memory(
    config: RunConfig, precision: Precision, gpus: int, *, sharded: bool, recompute: bool
) -> dict[str, float]:
    """Bytes on each GPU: under FSDP2 if `sharded`, else DDP; "image" grows with the micro-batch."""
    count, fp32 = count_parameters(config.model), config.train.predictor_fp32
    share = gpus if sharded else 1
    one, two = (
        activation_bytes(config.model, batch, precision, predictor_fp32=fp32, recompute=recompute)
        for batch in (1, 2)
    )
    # In the backward pass one checkpointed layer at a time has all its tensors.
    encoder, predictor = stacks(config.model)
    factor = 4 if precision == "fp32" else 2
    layer = max(encoder.saved_bytes(factor), predictor.saved_bytes(4 if fp32 else factor))
    return {
        "weights": 4 * (count.trained + count.frozen) / share,
        "gradients": 4 * count.trained / share,
        "moments": 8 * count.trained / share,
        # Whole under FSDP2 too: autograd keeps the copies that autocast makes of gathered weights.
        "copies": 0 if precision == "fp32" else 2 * (count.cast - fp32 * count.predictor_cast),
        # DDP copies gradients into buckets. FSDP2 gathers weights, and makes gradients before it scatters
        # them: of the layer in hand and the next, and all along of what lies in no layer.
        "exchange": 8 * (count.outside + 2 * count.layer) if sharded else 4 * count.trained * (gpus > 1),
        "masks": 2 * one - two,
        "image": two - one + layer * recompute,
    }


# ------------------------------------------------------------------------------------------------------- time


def precision_on(gpu: Gpu, precision: str) -> Precision:
    """What train.precision means on a GPU; `ValueError` if it cannot compute in it."""
    if precision == "auto":
        return "bf16" if gpu.has_bf16 else "fp32"
    require(
        gpu.has_bf16 or precision != "bf16",
        "this GPU does not compute in bf16; use --train.precision fp16 or fp32",
    )
    return precision  # type: ignore[return-value]


def images_per_s(config: RunConfig, gpu: Gpu, *, recompute: bool) -> float:
    """Images a second at a GPU's peak."""
    parts = step_flops_by_part(config.model, recompute=recompute)
    is_fp32 = precision_on(gpu, config.train.precision) == "fp32"
    fp32 = sum(parts.values()) if is_fp32 else parts["predictor"] * config.train.predictor_fp32
    return 1e12 / ((sum(parts.values()) - fp32) / gpu.tflops + fp32 / gpu.fp32_tflops)


def plan(config: RunConfig, gpu: Gpu, gpus: int, *, mfu: float, images: int | None = None) -> dict[str, Any]:
    """All of the above for a training on so many GPUs, as plain values; bytes, operations, images a second.

    Without `images`, the number of images, there may be no steps, samples, epochs and days. `ValueError` for
    what could not be trained.
    """
    from nextblock.models.next_block import check_predicts, masks_leak

    config.check_trainable()
    check_predicts(config.model, leaks=masks_leak(config.model))
    # As the training loop counts: of few images, a batch is all of them; an epoch is whole batches.
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
