"""Low-rank adapters (LoRA, Hu et al. 2021) on an encoder's attention, by peft, and their merging.

They lie on each layer's `qkv` and `proj`. timm keeps queries, keys and values in one matrix, so one adapter
of rank r serves the three.
"""

from __future__ import annotations

from typing import Any

from timm.layers import Attention
from torch import nn

from nextblock.errors import UsageError
from nextblock.evaluate.features import seeded

__all__ = ["TARGETS", "MissingPeftError", "add_lora", "merge_lora"]

TARGETS = r"blocks\.\d+\.attn\.(qkv|proj)"
"""Names of the adapted maps; a bare "proj" would be the patch embedding as well."""


class MissingPeftError(RuntimeError):
    """LoRA was asked for, and peft is not installed."""


def add_lora(encoder: nn.Module, *, rank: int, alpha: float, dropout: float, seed: int) -> None:
    """Put adapters on a timm encoder's attention, in place, and freeze all but them.

    At first they add nothing. Raises `ValueError` for attention of other kinds, which may use the weights of
    `qkv` without calling it, and `MissingPeftError` where peft is not installed.
    """
    peft = _import_peft()
    blocks: Any = getattr(encoder, "blocks", ())
    attention = [getattr(block, "attn", None) for block in blocks]
    if not attention or not all(isinstance(one, Attention) for one in attention):
        raise UsageError(
            f"LoRA is for the attention of timm's VisionTransformer, and this {type(encoder).__name__} has "
            "another kind; train the whole network (lora.rank 0)"
        )
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=TARGETS)
    with seeded(seed):
        peft.LoraModel(encoder, config, "default")
    adapted = [name for name, _ in encoder.named_modules() if name.endswith("lora_A")]
    assert len(adapted) == 2 * len(attention), adapted


def merge_lora(encoder: nn.Module) -> None:
    """Add the adapters to the weights they lie on, and remove them: the same function, without peft."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {name: part for name, part in encoder.named_modules() if isinstance(part, BaseTunerLayer)}
    for name, adapter in found.items():
        adapter.merge()
        parent, _, child = name.rpartition(".")
        setattr(encoder.get_submodule(parent), child, adapter.get_base_layer())


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingPeftError(
            f"lora.rank needs peft, which cannot be imported ({error}); "
            "pip install peft, or train the whole network (lora.rank 0)"
        ) from error
    return peft
