"""One model on several processes: replicated (DDP) or sharded (FSDP2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from nextblock.config import RunConfig
from nextblock.models import NextBlockModel
from nextblock.plan import count_parameters
from nextblock.train.distributed import Group

Strategy = Literal["single", "ddp", "fsdp"]

BYTES_PER_PARAMETER = 16
"""Weight, gradient and AdamW's two moments, fp32."""
REPLICATED_SHARE = 0.6
"""`train.strategy auto` replicates a model if its training state fills at most this share of a GPU."""


def choose_strategy(config: RunConfig, group: Group, device: torch.device) -> Strategy:
    """Resolve `train.strategy`: auto shards a model only if it does not fit on one GPU."""
    if config.train.strategy == "fsdp":
        return "fsdp"
    if group.size == 1:
        return "single"
    if config.train.strategy == "ddp" or device.type != "cuda":
        return "ddp"
    memory = torch.cuda.get_device_properties(device).total_memory
    fits = BYTES_PER_PARAMETER * count_parameters(config.model).trained <= REPLICATED_SHARE * memory
    return "ddp" if all(group.gather(fits)) else "fsdp"


def replicate(
    model: nn.Module, forward: Any, device: torch.device, zero_loss: Callable[[nn.Module], Tensor]
) -> DistributedDataParallel:
    """Wrap a model for DDP so that its first step sums gradients in the same order as every later step.

    `zero_loss` returns a loss of 0 that depends on every parameter.
    """
    # Ranks have equal buffers: tables and fixed centroids. The option's name depends on torch's version.
    known = signature(DistributedDataParallel).parameters
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {sync_buffers: False, "gradient_as_bucket_view": True}
    if device.type == "cuda":
        options["device_ids"] = [device.index]
    replicas = DistributedDataParallel(forward, **options)
    # DDP regroups gradients into buckets after its first backward pass, and sums over three or more ranks
    # depend on the buckets. A resumed run starts with another step, so it would differ in the last digit.
    # Two empty passes in every run make all steps use the final buckets.
    for _ in range(2):
        zero_loss(replicas).backward()
    model.zero_grad(set_to_none=True)
    return replicas


def shard(
    make: Callable[[], NextBlockModel], config: RunConfig, device: torch.device, group: Group
) -> NextBlockModel:
    """Build a sharded model; only rank 0 calls `make`, for the weights.

    Each layer is gathered when it is computed. Only rank 0 holds the whole model, in CPU memory.
    """
    with group.together():
        weights = make().state_dict() if group.is_main else {}
    with torch.device("meta"):
        model = NextBlockModel(config.model)
    assert model.predictor is not None
    layers = [*model.encoder.blocks, *getattr(model.predictor, "blocks", ())]
    mesh = init_device_mesh(device.type, (group.size,))
    # Layers are compiled before they are sharded; recomputation happens outside, in the loop over layers. The
    # root shards the parameters that belong to no layer.
    for layer in layers:
        if config.train.compile:
            layer.compile()
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for method in ("encode", "targets_of"):
        register_fsdp_forward_method(model, method)
    model.to_empty(device=device)
    model.make_buffers()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=options)  # type: ignore[arg-type]
    return model


def full_weights(model: nn.Module) -> Mapping[str, Any]:
    """Full weights by name; of a sharded model, on rank 0 only. All ranks must call this."""
    if not isinstance(model, FSDPModule):
        return model.state_dict()
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def local_part(tensor: Tensor) -> Tensor:
    """Part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def synchronised(forward: nn.Module | Callable[..., object], *, is_last: bool) -> Iterator[None]:
    """Sum gradients over ranks only in the last backward pass of a step (DDP)."""
    # FSDP2 sums in every pass: unsynchronised gradients would need full-size memory on every rank.
    if isinstance(forward, DistributedDataParallel) and not is_last:
        with forward.no_sync():
            yield
    else:
        yield
