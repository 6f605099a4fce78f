"""Model cards: the README.md beside written weights, in the form that the Hugging Face hub reads.

A card names where the weights come from and under which terms, in its YAML head as well, so that a later
conversion of the same directory can carry both on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from nextblock.config import DataConfig, ModelConfig, pair
from nextblock.models.timm_encoder import TimmConfig

__all__ = [
    "CARD_FILE",
    "OFFICIAL_LICENSES",
    "UNSPECIFIED",
    "Provenance",
    "model_card",
    "official_provenance",
    "read_provenance",
]

CARD_FILE = "README.md"
UNSPECIFIED = "unspecified"
KNOWN_LICENSES = (
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0",
    "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0",
    "cc-by-nc-nd-4.0", "openrail", "apple-ascl", "apple-amlr", "unknown",
)  # fmt: skip
"""Names by which the hub knows a licence; any other is given to it as "other", with a name."""

LICENSE_NAME_CHARS = 60

OFFICIAL_LICENSES = {
    "official AIM": "Apple's own licence, if these are the weights that Apple released; see their origin",
    "official XTRA": "none is stated for the official XTRA weights, if these are they; ask their authors",
}
"""By the words for a format that `reading` has. One's own weights may be written in these layouts too."""


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where weights come from, and the terms they are under."""

    origin: str
    """What they were read from, in words."""
    license: str = UNSPECIFIED
    """The weights' licence, which is not that of this software."""
    license_name: str | None = None
    """What a card calls a licence that the hub does not know."""
    license_link: str | None = None
    """Where such a licence stands."""

    def changed(self, *, origin: str | None, license: str | None) -> Provenance:  # noqa: A002 - the field
        """The same but for what is given; another licence has no name and link yet."""
        origin = origin or self.origin
        return replace(self, origin=origin) if license is None else Provenance(origin=origin, license=license)


def official_provenance(source_format: str, name: str) -> Provenance:
    """What is known of weights in an official layout."""
    return Provenance(
        origin=f"{name}, in the layout of {source_format} files", license=OFFICIAL_LICENSES[source_format]
    )


def read_provenance(directory: Path, *, origin: str | None = None) -> Provenance | None:
    """What the card in a directory says; None where there is no card, or it does not tell.

    `origin` counts where the card, of whoever wrote it, names a licence alone.
    """
    card = directory / CARD_FILE
    if not card.is_file():
        return None
    head = re.match(r"---\n(.*?)\n---\n", card.read_text(encoding="utf-8"), flags=re.DOTALL)
    try:
        told = yaml.safe_load(head[1]) if head is not None else None
    except yaml.YAMLError:
        return None
    if not isinstance(told, dict):
        return None
    named, origin = _license_told(told), told.get("weights_origin") or origin
    if origin is None or (named is None and not told.get("weights_origin")):
        return None
    name, link = (
        None if told.get(key) is None else str(told[key]) for key in ("license_name", "license_link")
    )
    if named is not None and name == _slug(named):  # our own cards have it beside the words
        name = None
    return Provenance(origin=str(origin), license=named or UNSPECIFIED, license_name=name, license_link=link)


def _license_told(head: Mapping[str, Any]) -> str | None:
    """The licence in a card's head, by its words, its own name, or the hub's name for it."""
    known = head.get("license")
    known = ", ".join(map(str, known)) if isinstance(known, list) else known
    told = head.get("weights_license") or (known != "other" and known) or head.get("license_name") or known
    return str(told) if told else None


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
    """A card in Markdown; `opening` is the code that opens the weights, `notes` what its reader must know."""
    head = yaml.safe_dump(_head(library, provenance), sort_keys=False, allow_unicode=True).strip()
    rows = "\n".join(f"| {name} | {value} |" for name, value in _settings(config, data).items())
    told = "\n".join(f"- {note}" for note in notes)
    return (
        f"""---
{head}
---

# {title}

A vision transformer encoder written by nextblock.

Origin of the weights: {provenance.origin}.
Licence of the weights: {provenance.license}{_link(provenance)}.

```python
{opening}
```

| setting | value |
|---|---|
{rows}

{told}
""".rstrip()
        + "\n"
    )


def _link(provenance: Provenance) -> str:
    return "" if provenance.license_link is None else f" ({provenance.license_link})"


def _head(library: str, provenance: Provenance) -> dict[str, Any]:
    head: dict[str, Any] = {"library_name": library, "pipeline_tag": "image-feature-extraction"}
    if provenance.license.lower() in KNOWN_LICENSES:
        head["license"] = provenance.license.lower()
    elif provenance.license != UNSPECIFIED:
        head |= {"license": "other", "license_name": provenance.license_name or _slug(provenance.license)}
        head |= {"license_link": provenance.license_link} if provenance.license_link else {}
    tags = {"tags": ["nextblock", "vision-transformer"]}
    return {**head, **tags, "weights_origin": provenance.origin, "weights_license": provenance.license}


def _slug(text: str) -> str:
    """Words as the hub takes them for the name of a licence ("apple-s-own-licence"), whole ones only."""
    slug = re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")
    if len(slug) > LICENSE_NAME_CHARS:
        slug = slug[: LICENSE_NAME_CHARS + 1].rpartition("-")[0] or slug[:LICENSE_NAME_CHARS]
    return slug.strip("-.")


def _settings(config: ModelConfig | TimmConfig, data: DataConfig) -> dict[str, str]:
    return {
        **(_of_timm(config) if isinstance(config, TimmConfig) else _of_ours(config)),
        "shorter side resized to": f"{data.resize_px(config.image_size)} px",
        "validation crop": data.val_crop,
        "mean": ", ".join(f"{part:g}" for part in data.mean),
        "standard deviation": ", ".join(f"{part:g}" for part in data.std),
    }


def _of_timm(config: TimmConfig) -> dict[str, str]:
    rows, columns = config.image_size
    return {
        "encoder": f"timm's {config.architecture}, {config.embed_dim} wide, {config.depth} layers",
        "image": f"{rows}x{columns} px, {config.in_chans} channels",
        "class token": "yes" if config.has_class_token else "no",
    }


def _of_ours(config: ModelConfig) -> dict[str, str]:
    rows, columns = pair(config.image_size)
    block = pair(config.block_size)
    causal = f"block-causal, blocks of {block[0]}x{block[1]} patches, {config.order} order"
    return {
        "encoder": f"{config.embed_dim} wide, {config.depth} layers, {config.num_heads} heads",
        "image": f"{rows}x{columns} px, {config.in_chans} channels, {config.patch_size}-px patches",
        "attention of its features": causal if config.feature_attention == "causal" else "full",
        "positions": "learned" if config.positions == "learned" else "fixed sines and cosines",
        "bias in linear maps": "yes" if config.bias else "no",
        "norm after patch embedding": "yes" if config.patch_norm else "no",
        "LayerNorm epsilon": f"{config.norm_eps:g}",
        "predictor": "left out" if config.predictor is None else f"{config.predictor}, inside",
    }
