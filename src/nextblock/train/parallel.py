"""One model on several processes: a copy each (DDP), or a part each (FSDP2)."""

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
from nextblock.train.distributed import Group

Strategy = Literal["single", "ddp", "fsdp"]

BYTES_PER_PARAMETER = 16
"""Weight, gradient and AdamW's two moments, fp32."""
REPLICATED_SHARE = 0.6
"""`train.strategy auto` replicates a model whose training state fills at most this share of a GPU."""


def choose_strategy(config: RunConfig, group: Group, device: torch.device) -> Strategy:
    """What `train.strategy` stands for: auto shards a model only if a GPU could not hold it whole."""
    if config.train.strategy == "fsdp":
        return "fsdp"
    if group.size == 1:
        return "single"
    if config.train.strategy == "ddp" or device.type != "cuda":
        return "ddp"
    with torch.device("meta"):
        parameters = sum(p.numel() for p in NextBlockModel(config.model).parameters())
    memory = torch.cuda.get_device_properties(device).total_memory
    fits = BYTES_PER_PARAMETER * parameters <= REPLICATED_SHARE * memory
    return "ddp" if all(group.gather(fits)) else "fsdp"


def replicate(
    model: nn.Module, forward: Any, device: torch.device, touch: Callable[[nn.Module], Tensor]
) -> DistributedDataParallel:
    """Wrap a model for DDP, ready to run the same way in its first step as in every later one.

    `touch` gives a loss of zero that depends on every parameter.
    """
    # Tables are the same everywhere, and centroids never change. Older releases of torch have another name.
    known = signature(DistributedDataParallel).parameters
    sync_buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {sync_buffers: False, "gradient_as_bucket_view": True}
    if device.type == "cuda":
        options["device_ids"] = [device.index]
    replicas = DistributedDataParallel(forward, **options)
    # DDP regroups gradients into buckets after its first backward pass. Sums over three ranks and more
    # depend on the buckets, so a resumed run, whose first pass is another step's, would differ in the last
    # digit. Two passes over nothing, in every run, leave all steps with the final buckets.
    for _ in range(2):
        touch(replicas).backward()
    model.zero_grad(set_to_none=True)
    return replicas


def shard(
    make: Callable[[], NextBlockModel], config: RunConfig, device: torch.device, group: Group
) -> NextBlockModel:
    """Build a model of which every rank holds a part; rank 0 alone calls `make` for the weights.

    Each layer is gathered as it is computed. Nowhere but on rank 0's CPU is the whole model in memory.
    """
    with group.together():
        weights = make().state_dict() if group.is_main else {}
    with torch.device("meta"):
        model = NextBlockModel(config.model)
    assert model.predictor is not None
    layers = [*model.encoder.blocks, *getattr(model.predictor, "blocks", ())]
    mesh = init_device_mesh(device.type, (group.size,))
    # In this order: recomputation is in the loop over the layers, compilation in each layer, and the root
    # takes what belongs to no layer.
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
    """The whole weights by name, of a sharded model on rank 0 alone. All ranks must call this."""
    if not isinstance(model, FSDPModule):
        return model.state_dict()
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor that was computed from parts."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def synchronised(forward: nn.Module | Callable[..., object], *, is_last: bool) -> Iterator[None]:
    """Add gradients up over ranks in the last backward pass of a step only."""
    # FSDP2 adds them up in every pass: kept unsynchronised they would be kept whole, on every rank.
    if isinstance(forward, DistributedDataParallel) and not is_last:
        with forward.no_sync():
            yield
    else:
        yield
