"""The network to fine-tune: an encoder with a head, drop path and optional adapters.

Adapters (LoRA, Hu et al. 2021, from peft) sit on each layer's `qkv` and `proj`. timm keeps queries, keys and
values in one matrix, so one adapter of rank r serves all three.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from timm.layers import Attention, AttentionRope
from torch import Tensor, nn

from nextblock.config import pair
from nextblock.data import keyed_seed
from nextblock.errors import UsageError
from nextblock.evaluate.features import seeded
from nextblock.evaluate.finetune.settings import LAYERS, FinetuneSettings
from nextblock.interop.timm import encoder_at
from nextblock.models import EncoderModel, NextBlockModel
from nextblock.models.heads import HeadConfig, ImageClassifier, last_layers
from nextblock.optim import layer_decay_groups
from nextblock.settings import require

ADAPTED = r"blocks\.\d+\.attn\.(qkv|proj)"
"""Names of the adapted layers; a bare "proj" would also match the patch embedding."""


class KeyedDropPath(nn.Module):
    """Drop path with given draws, uniform in [0, 1), one per image; draws below `rate` drop the branch.

    timm's drop path draws from a global generator, so its result depends on ranks and micro-batches.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        # Set before each forward pass. They stay until its backward pass is done, so activation
        # checkpointing recomputes a layer with the same draws.
        self.draws: Float[Tensor, " b"] | None = None

    def forward(self, branch: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Drop the branches of some images, and scale the others to keep the expectation."""
        if not self.training:
            return branch
        assert self.draws is not None
        return branch * (self.draws >= self.rate).to(branch.dtype).div(1 - self.rate)[:, None, None]


def build_classifier(
    model: EncoderModel, settings: FinetuneSettings, class_names: Sequence[str]
) -> ImageClassifier:
    """Build a classifier on the CPU from a copy of the encoder, with head and adapters drawn from the seed.

    In models of this package, the given image size and attention replace the encoder's own. Raises
    `UsageError` if the encoder does not support a setting.
    """
    model = copy.deepcopy(model).cpu()
    if isinstance(model, NextBlockModel):
        model = encoder_at(model, settings.image_size, settings.attention)
    else:
        name, size = model.config.architecture, model.config.image_size
        is_causal = settings.attention == "causal"
        require(not is_causal, f"{name} was not trained with a causal mask; use attention native or full")
        require(
            settings.image_size is None or pair(settings.image_size) == size,
            f"timm builds {name} at {size}; give another size with the name: timm:NAME,img_size=N",
        )
    model.requires_grad_(requires_grad=True)
    depth = model.config.depth
    head_config = HeadConfig(
        kind=settings.head,
        num_classes=len(class_names),
        layers=last_layers(min(settings.layers or LAYERS[settings.head], depth), depth),
        norm_layers=True,
        batch_norm=False,
        num_heads=settings.attentive_heads or 16,
        tokens=settings.tokens,
    )
    with seeded(keyed_seed(settings.seed, "fine-tuning head")):
        classifier = ImageClassifier(model, head_config, class_names)
    encoder: Any = model.encoder
    set_drop_path(encoder, settings.decay_and_drop_path[1])
    if settings.activation_checkpointing:
        (model if isinstance(model, NextBlockModel) else encoder).set_grad_checkpointing(True)
    if settings.lora.rank:
        add_lora(encoder, settings)
    return classifier


def set_drop_path(encoder: nn.Module, rate: float) -> None:
    """Set the drop path of a timm encoder's layers, rising from 0 at the first to `rate` at the last.

    Raises `UsageError` if the layers do not support a `rate` above 0.
    """
    blocks: list[Any] = list(getattr(encoder, "blocks", ()))
    names = ("drop_path1", "drop_path2")
    has_paths = bool(blocks) and all(hasattr(block, name) for block in blocks for name in names)
    require(
        has_paths or not rate,
        f"the layers of this {type(encoder).__name__} have no drop path; set drop_path 0, not {rate:g}",
    )
    for i, block in enumerate(blocks if has_paths else ()):
        block_rate = rate * i / max(1, len(blocks) - 1)
        for name in names:
            setattr(block, name, KeyedDropPath(block_rate) if block_rate else nn.Identity())


def tuning_groups(classifier: ImageClassifier, settings: FinetuneSettings) -> list[dict[str, Any]]:
    """Parameter groups: layer i of L learns at decay^(L + 1 - i) of the rate, norm and head at the rate."""
    depth = classifier.encoder_model.config.depth
    blocks: Any = getattr(classifier.encoder_model.encoder, "blocks", ())
    decay, _ = settings.decay_and_drop_path
    has_layers = decay == 1 or len(blocks) == depth
    require(has_layers, f"layer_decay is {decay:g}, but this encoder has no `blocks`; set layer_decay 1")

    def layer_of(name: str) -> int:
        part = name.removeprefix("encoder_model.encoder.")
        if part == name or re.match(r"(fc_)?norm\.", part):  # the head, or the encoder's final norm
            return depth + 1
        block = re.match(r"blocks\.(\d+)\.", part)
        return 0 if block is None else int(block[1]) + 1  # patch and position embeddings come before layer 1

    return layer_decay_groups(classifier, settings.weight_decay, decay, layer_of, depth + 1)


# ------------------------------------------------------------------------------------------------- adapters


def add_lora(encoder: nn.Module, settings: FinetuneSettings) -> None:
    """Add adapters to a timm encoder's attention in place, and freeze everything else.

    New adapters add nothing to the output. Raises `UsageError` if peft is not installed, and for other kinds
    of attention, which may use the weights of `qkv` without calling it.
    """
    try:
        import peft
    except ImportError as error:
        raise UsageError(
            f"lora.rank needs peft ({error}): pip install peft, or train the whole network (lora.rank 0)"
        ) from error
    blocks: Any = getattr(encoder, "blocks", ())
    attention = [getattr(block, "attn", None) for block in blocks]
    known = [isinstance(module, Attention | AttentionRope) and module.qkv is not None for module in attention]
    require(
        bool(known) and all(known),
        f"LoRA is for the attention of timm's VisionTransformer; this {type(encoder).__name__} has another "
        "kind: train the whole network (lora.rank 0)",
    )
    rank, alpha = settings.lora.rank or 0, settings.lora.alpha
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type] # a float works too
        target_modules=ADAPTED,
    )
    with seeded(keyed_seed(settings.seed, "adapters")):
        peft.LoraModel(encoder, config, "default")  # type: ignore[arg-type] # any module works
    adapted = [name for name, _ in encoder.named_modules() if name.endswith("lora_A")]
    assert len(adapted) == 2 * len(attention), adapted


def merge_lora(encoder: nn.Module) -> None:
    """Merge adapters into the weights and remove them, which leaves the encoder's function unchanged."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapters = {name: part for name, part in encoder.named_modules() if isinstance(part, BaseTunerLayer)}
    for name, adapter in adapters.items():
        adapter.merge()
        parent, _, child = name.rpartition(".")
        setattr(encoder.get_submodule(parent), child, adapter.get_base_layer())
