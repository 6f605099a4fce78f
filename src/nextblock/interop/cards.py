"""Model cards: the README.md next to written weights, with an origin and licence that conversions keep."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from nextblock.config import DataConfig, ModelConfig, pair
from nextblock.logs import counted, muted
from nextblock.models.timm_encoder import TimmConfig

CARD_FILE = "README.md"
UNSPECIFIED = "unspecified"
KNOWN_LICENSES = (
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0",
    "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0",
    "cc-by-nc-nd-4.0", "openrail", "apple-ascl", "apple-amlr", "unknown",
)  # fmt: skip
"""Licence names that the hub knows; it refuses any other, so these become "other" with a name."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Origin and licence of weights (not of this software)."""

    origin: str
    license: str = UNSPECIFIED
    license_name: str | None = None
    """Name in a card for a licence that the hub does not know."""
    license_link: str | None = None


def read_provenance(directory: Path, *, origin: str) -> Provenance | None:
    """Read the card in a directory; `origin` is the default. None if it has neither origin nor licence."""
    try:
        with muted(logging.ERROR, "huggingface_hub.repocard"):  # a card without metadata is not an error
            head = ModelCard.load(directory / CARD_FILE, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # any file: no card, no YAML, not text
        return None
    # The hub knows a licence by a short name, or as "other" with a name. A card by nextblock has the full
    # text in weights_license, which wins. "other" says least and comes last.
    known = head.get("license")
    known = ", ".join(map(str, known)) if isinstance(known, list) else known
    text = head.get("weights_license") or (known != "other" and known) or head.get("license_name") or known
    if not text and not head.get("weights_origin"):
        return None
    name, link = (head.get(key) and str(head[key]) for key in ("license_name", "license_link"))
    return Provenance(
        origin=str(head.get("weights_origin") or origin),
        license=str(text or UNSPECIFIED),
        license_name=None if text and name == _slug(str(text)) else name,
        license_link=link,
    )


def model_card(
    config: ModelConfig | TimmConfig,
    *,
    title: str,
    library: str,
    data: DataConfig,
    provenance: Provenance,
    opening: str,
    notes: Sequence[str] = (),
) -> str:
    """Write a card in Markdown; `opening` is code that loads the weights, `notes` are bullet points."""
    licence: dict[str, Any] = {}
    if provenance.license.lower() in KNOWN_LICENSES:
        licence = {"license": provenance.license.lower()}
    elif provenance.license != UNSPECIFIED:
        name = provenance.license_name or _slug(provenance.license)
        licence = {"license": "other", "license_name": name, "license_link": provenance.license_link}
    head = ModelCardData(
        library_name=library,
        pipeline_tag="image-feature-extraction",
        tags=["nextblock", "vision-transformer"],
        weights_origin=provenance.origin,
        weights_license=provenance.license,
        **licence,
    )
    link = f" ({provenance.license_link})" if provenance.license_link else ""
    encoder, attention = f"{config.embed_dim} wide, {counted(config.depth, 'layer')}", "full"
    if isinstance(config, TimmConfig):
        encoder, attention = f"timm's {config.architecture}, {encoder}", "its own"
    else:
        encoder += f", {counted(config.num_heads, 'head')}, patches of {config.patch_size} px"
        if config.feature_attention == "causal":
            block = pair(config.block_size)
            attention = f"block-causal, blocks of {block[0]}x{block[1]} patches, {config.order} order"
    rows, columns = pair(config.image_size)
    mean, std = (", ".join(f"{part:g}" for part in parts) for parts in (data.mean, data.std))
    return f"""---
{head.to_yaml()}
---

# {title}

A vision transformer encoder written by nextblock.

Origin of the weights: {provenance.origin}.
Licence of the weights: {provenance.license}{link}.

```python
{opening}
```

| setting | value |
|---|---|
| encoder | {encoder} |
| attention of its features | {attention} |
| image | {rows}x{columns} px, {counted(config.in_chans, "channel")} |
| shorter side resized to | {data.resize_px(config.image_size)} px |
| validation crop | {data.val_crop} |
| mean | {mean} |
| standard deviation | {std} |
{"".join(f"{chr(10)}- {note}" for note in notes)}
"""


def _slug(text: str) -> str:
    """Licence name as the hub accepts it ("apple-s-own-licence"), at most 60 characters."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower())[:60].strip("-.")
