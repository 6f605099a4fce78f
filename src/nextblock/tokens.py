"""Frozen tokenizers: discrete tokens of an image, predicted in place of its pixels (AIM, section 4.1).

Two kinds behind one protocol: k-means over normalised patches, fitted once and saved with the model, and the
encoder of a VQ image model that transformers knows, read from the hub or a folder and never saved. Both run
without gradients and in fp32, whatever the precision around them.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding

from nextblock.blocks import patchify
from nextblock.logs import held_back
from nextblock.objective import normalize_blocks
from nextblock.settings import require

__all__ = [
    "KMeansTokenizer",
    "Tokenizer",
    "TokenizerError",
    "TransformersTokenizer",
    "fit_kmeans",
    "nearest_centroids",
    "open_tokenizer",
    "token_losses",
    "token_targets",
]

log = logging.getLogger(__name__)

MAX_DISTANCES = 2**24
"""Distances held at a time when the nearest centroids are sought: 64 MiB of fp32."""
MAX_LLOYD_PRODUCTS = 2 * 10**10
"""Patches x clusters x values up to which every step of a fit sees all patches: about a minute on a core."""
MAX_SEEDING_ROUNDS = 100
PREPROCESSOR_FILE = "preprocessor_config.json"


class TokenizerError(RuntimeError):
    """A tokenizer that cannot be read: no such folder, no network, weights missing, a package missing."""


@runtime_checkable
class Tokenizer(Protocol):
    """What a model that predicts tokens asks of a tokenizer. It never trains."""

    vocab_size: int
    """Tokens are integers from 0 to below this."""
    token_px: int
    """Side in pixels of the square that a token stands for."""

    def __call__(self, images: Float[Tensor, "b c h w"]) -> Int64[Tensor, "b i j"]:
        """The tokens of images normalised as the model sees them, on a grid of image size // token_px."""
        ...


# ----------------------------------------------------------------------------------------- targets and losses


def token_targets(
    tokens: Int64[Tensor, "b i j"], order: Int64[Tensor, " k"], per_block: tuple[int, int], start: int = 1
) -> Int64[Tensor, "b steps m"]:
    """The tokens of the blocks at positions `start`, start+1, ... of the order, in raster order in a block.

    `per_block` is the number of tokens in a block, (rows, columns).
    """
    return patchify(rearrange(tokens, "b i j -> b 1 i j"), per_block).index_select(1, order[start:])


def token_losses(logits: Float[Tensor, "*b m v"], targets: Int64[Tensor, "*b m"]) -> Float32[Tensor, "*b"]:
    """Mean over a block's tokens of the cross-entropy in nats, in fp32. Guessing evenly costs log(v)."""
    flat = rearrange(logits.float(), "... v -> (...) v")
    return cross_entropy(flat, targets.flatten(), reduction="none").view(targets.shape).mean(-1)


# ---------------------------------------------------------------------------------------------------- k-means


class KMeansTokenizer(nn.Module):
    """Tokens are the nearest of `vocab_size` centroids to each patch's normalised pixels.

    The centroids are a buffer, so a model's file holds them; they are zero until `fit` or a file fills them.
    """

    centroids: Float[Tensor, "v p"]

    def __init__(self, vocab_size: int, in_chans: int, patch_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.token_px = patch_size
        values = in_chans * patch_size**2
        self.register_buffer("centroids", torch.zeros(vocab_size, values, dtype=torch.float32))
        self._seen_fitted = False  # looking at the buffer at every call would hold up a GPU

    @property
    def is_fitted(self) -> bool:
        """Whether there are centroids."""
        return bool(self.centroids.any())

    def patches(self, images: Float[Tensor, "b c h w"]) -> Float32[Tensor, "b n p"]:
        """What is clustered and looked up: every patch's pixels as (c h w), normalised, in raster order."""
        return normalize_blocks(patchify(images.float(), (self.token_px, self.token_px)))

    def fit(self, patches: Float[Tensor, "r p"], seed: int) -> None:
        """Set the centroids to those of a sample of `patches`; see `fit_kmeans`."""
        self.centroids.copy_(fit_kmeans(patches, self.vocab_size, seed))

    def pixels(self, tokens: Int64[Tensor, "*b"]) -> Float[Tensor, "*b p"]:
        """What tokens stand for: their centroids, normalised pixels as (c h w), for drawing."""
        return embedding(tokens, self.centroids)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Int64[Tensor, "b i j"]:
        """The tokens of images; `ValueError` before there are centroids."""
        self._seen_fitted = self._seen_fitted or self.is_fitted
        require(
            self._seen_fitted,
            "the k-means tokenizer has no centroids yet; fit it on patches of the training images, "
            "or load a model that was trained with one",
        )
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            patches = rearrange(self.patches(images), "b n p -> (b n) p")
            tokens = nearest_centroids(patches, self.centroids.float())
        rows, columns = images.shape[-2] // self.token_px, images.shape[-1] // self.token_px
        return rearrange(tokens, "(b i j) -> b i j", i=rows, j=columns)


def nearest_centroids(
    points: Float[Tensor, "r p"], centroids: Float[Tensor, "v p"], max_distances: int = MAX_DISTANCES
) -> Int64[Tensor, " r"]:
    """The index of the centroid nearest to each point, the lowest of those equally near.

    By |x - c|² = |x|² - 2 x·c + |c|², whose first term changes nothing. Points are taken so many at a time
    that at most `max_distances` distances exist at once (but at least those of one point).
    """
    offsets = centroids.square().sum(1)
    size = max(1, max_distances // len(centroids))
    # addmm makes one matrix of distances, not three.
    nearest = [torch.addmm(offsets, part, centroids.T, alpha=-2).argmin(1) for part in points.split(size)]
    return torch.cat(nearest)


def fit_kmeans(patches: Float[Tensor, "r p"], vocab_size: int, seed: int) -> Float32[Tensor, "v p"]:
    """Cluster a sample of patches: centroids, each of which is the nearest of all to at least one patch.

    Lloyd's algorithm where that is affordable, else mini-batches (`MAX_LLOYD_PRODUCTS`). The same patches
    and seed give the same centroids on the same machine. `ValueError` where the patches are too few.
    """
    points = patches.detach().to("cpu", torch.float32).contiguous()
    start = _draw_distinct(points.numpy(), vocab_size, np.random.default_rng(seed % 2**32))
    require(len(start) == vocab_size, _too_few(len(points), len(start), vocab_size))
    centroids = torch.from_numpy(_cluster(points.numpy(), points[start].numpy(), seed % 2**32)).float()
    return _use_all(centroids, points).to(patches.device)


def _too_few(patches: int, distinct: int, vocab_size: int) -> str:
    return (
        f"{patches} patches hold only {distinct} distinct ones, too few for {vocab_size} tokens; "
        f"set model.vocab_size to at most {distinct}, or use more images"
    )


def _draw_distinct(points: np.ndarray, number: int, rng: np.random.Generator) -> list[int]:
    """Rows in random order, none equal to another, as many as wanted or as there are.

    Where the clusters start: many patches are flat and hence equal, and equal starts leave clusters empty.
    """
    drawn: dict[bytes, int] = {}
    for row in rng.permutation(len(points)):
        drawn.setdefault(points[row].tobytes(), int(row))
        if len(drawn) == number:
            break
    return list(drawn.values())


def _cluster(points: np.ndarray, start: np.ndarray, random_state: int) -> np.ndarray:
    from sklearn.cluster import KMeans, MiniBatchKMeans  # a second, and needed only here
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    common: dict[str, Any] = {"init": start, "n_init": 1, "random_state": random_state}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # unused centroids are moved afterwards
        if points.size * len(start) <= MAX_LLOYD_PRODUCTS:
            lloyd = KMeans(len(start), max_iter=25, **common)
            with threadpool_limits(1):  # several threads would add their sums in any order
                return np.asarray(lloyd.fit(points).cluster_centers_)
        # A fixed number of passes: stopping early hangs on a sum that threads add in any order.
        common |= {"max_iter": 5, "max_no_improvement": None, "batch_size": max(1024, len(start))}
        return np.asarray(MiniBatchKMeans(len(start), **common).fit(points).cluster_centers_)


def _use_all(centroids: Float32[Tensor, "v p"], points: Float32[Tensor, "r p"]) -> Float32[Tensor, "v p"]:
    """Move centroids that are nearest to no point onto the points farthest from theirs, until none is left.

    A round takes at most one point of each cluster, so equal points are never taken twice. A moved centroid
    may leave another without points; but every round puts points at distance 0, where they stay.
    """
    centroids, used = centroids.clone(), 0
    for _ in range(MAX_SEEDING_ROUNDS):
        tokens = nearest_centroids(points, centroids)
        unused = (torch.bincount(tokens, minlength=len(centroids)) == 0).nonzero().flatten()
        used = len(centroids) - len(unused)
        if not len(unused):
            return centroids
        farthest = _farthest_of_clusters((points - centroids[tokens]).square().sum(1), tokens)[: len(unused)]
        centroids[unused[: len(farthest)]] = points[farthest]
    raise ValueError(_too_few(len(points), used, len(centroids)))  # differences below what fp32 resolves


def _farthest_of_clusters(
    distances: Float32[Tensor, " r"], tokens: Int64[Tensor, " r"]
) -> Int64[Tensor, " u"]:
    """The point farthest from the centroid in every cluster, the farthest of all first."""
    order = distances.argsort(descending=True, stable=True)
    _, first = np.unique(tokens[order].numpy(), return_index=True)
    return order[torch.from_numpy(np.sort(first))]


# ---------------------------------------------------------------------------------- VQ models of transformers


def _codes_of_encode(module: Any, pixels: Tensor) -> Tensor:
    return module.encode(pixels).image_tokens


def _codes_of_sized_encode(module: Any, pixels: Tensor) -> Tensor:
    sizes = torch.tensor([pixels.shape[-2:]] * len(pixels))  # of every image, as a batch may be padded
    return torch.stack(list(module.encode(pixels, sizes).image_tokens))


def _codes_of_logits(module: Any, pixels: Tensor) -> Tensor:
    return module.get_codebook_indices(pixels)


@dataclass(frozen=True, kw_only=True)
class _Family:
    """How a class of transformers gives its codes, and what its configuration calls the rest."""

    codes: Callable[[Any, Tensor], Tensor]
    vocab_size: str
    in_channels: str = "in_channels"
    token_px: int | None = None
    """None: the resolution is halved between the levels of `channel_multiplier`."""
    prefix: str = ""
    """Of the keys that an image processor's file keeps for it."""
    mean_std: tuple[float, float] = (0.5, 0.5)
    """Normalisation where no file tells: to [-1, 1]."""
    margin: float = 0.0
    """Share of the range that is left free at both ends after normalisation."""


FAMILIES = {
    "ChameleonVQVAE": _Family(codes=_codes_of_encode, vocab_size="num_embeddings"),
    "Emu3VQVAE": _Family(codes=_codes_of_sized_encode, vocab_size="codebook_size"),
    # DALL-E's discrete VAE: its logit-Laplace likelihood takes pixels in [0.1, 0.9].
    "FlavaImageCodebook": _Family(
        codes=_codes_of_logits,
        vocab_size="vocab_size",
        in_channels="input_channels",
        token_px=8,
        prefix="codebook_",
        mean_std=(0.0, 1.0),
        margin=0.1,
    ),
    "JanusVQVAE": _Family(codes=_codes_of_encode, vocab_size="num_embeddings"),
}


class TransformersTokenizer:
    """The frozen encoder of a VQ image model; made by `open_tokenizer`.

    Not a module, so a model that holds one neither saves nor trains it, nor switches it to training mode. It
    follows the images' device. `scale` and `shift` take pixels as the model sees them to what it expects.
    """

    def __init__(
        self,
        module: nn.Module,
        codes: Callable[[Any, Tensor], Tensor],
        vocab_size: int,
        token_px: int,
        scale: Float32[Tensor, " c"],
        shift: Float32[Tensor, " c"],
    ) -> None:
        self.vocab_size = vocab_size
        self.token_px = token_px
        self._module = module.eval().requires_grad_(False)
        self._codes = codes
        self._scale = rearrange(scale, "c -> c 1 1")
        self._shift = rearrange(shift, "c -> c 1 1")

    def __call__(self, images: Float[Tensor, "b c h w"]) -> Int64[Tensor, "b i j"]:
        """The tokens of images normalised as the model sees them."""
        if self._scale.device != images.device:
            self._module.to(images.device)
            self._scale, self._shift = self._scale.to(images.device), self._shift.to(images.device)
        rows, columns = images.shape[-2] // self.token_px, images.shape[-1] // self.token_px
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            codes = self._codes(self._module, torch.addcmul(self._shift, images.float(), self._scale))
        return rearrange(codes.flatten(), "(b i j) -> b i j", i=rows, j=columns)


def open_tokenizer(
    spec: str, mean: Sequence[float], std: Sequence[float], vocab_size: int, token_px: int
) -> TransformersTokenizer:
    """Read the tokenizer `hf:NAME`, a hub name or a folder that `save_pretrained` wrote.

    `mean` and `std` are those that images were normalised by. Pixels are scaled as the image processor's
    file beside the weights says, else to [-1, 1] (to [0.1, 0.9] for DALL-E's VAE). `ValueError` where the
    class is unknown or sizes disagree with the model's settings, `TokenizerError` where it cannot be read.
    """
    assert spec.startswith("hf:"), spec
    name = spec.removeprefix("hf:")
    transformers = _import_transformers()
    try:
        with held_back(logging.ERROR, "huggingface_hub"):
            settings, _ = transformers.PreTrainedConfig.get_config_dict(name)
            architecture = (settings.get("architectures") or ["none"])[0]
            require(architecture in FAMILIES, _unsupported(spec, architecture))
            module, loading = getattr(transformers, architecture).from_pretrained(
                name, dtype=torch.float32, output_loading_info=True
            )
            processor = _read_processor(name)
    except OSError as error:
        raise TokenizerError(
            f"tokenizer {spec} cannot be read ({str(error).splitlines()[0]}); give a folder that "
            "save_pretrained wrote, or a hub name that is in the cache or within reach of the network"
        ) from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise TokenizerError(
            f"the weights of tokenizer {spec} lack {len(missing)} tensors of a {architecture}, such as "
            f"{missing[0]}; use a complete copy"
        )
    family = FAMILIES[architecture]
    side = family.token_px or 2 ** (len(module.config.channel_multiplier) - 1)
    channels = getattr(module.config, family.in_channels)
    _check_sizes(spec, getattr(module.config, family.vocab_size), vocab_size, side, token_px)
    require(
        channels == len(mean),
        f"tokenizer {spec} takes images of {channels} channels, but data.mean has {len(mean)}; "
        "use another model.tokenizer",
    )
    gain, offset = _scaling(family, processor, channels)
    scale, shift = gain * torch.tensor(std), gain * torch.tensor(mean) + offset
    log.info("tokenizer %s: %s, %d tokens of %d px", spec, architecture, vocab_size, side)
    return TransformersTokenizer(module, family.codes, vocab_size, side, scale, shift)


def _import_transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise TokenizerError(
            "tokenizers hf:NAME need transformers, which is missing; pip install transformers"
        ) from error
    return transformers


def _unsupported(spec: str, architecture: str) -> str:
    return (
        f"tokenizer {spec} is a model of class {architecture}, whose codes are unknown here; supported: "
        f"{', '.join(FAMILIES)} (of a larger model, save that part alone by its save_pretrained)"
    )


def _check_sizes(spec: str, codes: int, vocab_size: int, side: int, token_px: int) -> None:
    require(
        codes == vocab_size,
        f"tokenizer {spec} knows {codes} tokens, but model.vocab_size is {vocab_size}; "
        f"set model.vocab_size {codes}",
    )
    require(
        side == token_px,
        f"a token of {spec} stands for {side}x{side} px, but the model expects {token_px}x{token_px} "
        f"(model.token_px, or else a patch); set model.token_px {side}",
    )


def _read_processor(name: str) -> dict[str, Any]:
    """The settings of the image processor beside the weights; empty where there is known to be none."""
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    path = Path(name) / PREPROCESSOR_FILE
    if Path(name).is_dir():
        return json.loads(path.read_text("utf-8")) if path.exists() else {}
    try:
        return json.loads(Path(hf_hub_download(name, PREPROCESSOR_FILE)).read_text("utf-8"))
    except (
        LocalEntryNotFoundError
    ):  # out of reach: other scaling would give other tokens, unless none is known
        if try_to_load_from_cache(name, PREPROCESSOR_FILE) is _CACHED_NO_EXIST:
            return {}
        raise
    except EntryNotFoundError:
        return {}


def _scaling(
    family: _Family, processor: dict[str, Any], channels: int
) -> tuple[Float32[Tensor, " c"], Float32[Tensor, " c"]]:
    """What pixels in [0, 1] are multiplied by, and what is then added."""

    def value(key: str, default: Any) -> Tensor:
        told = processor.get(family.prefix + key)
        return torch.tensor(default if told is None else told, dtype=torch.float32).expand(channels)

    normalize = bool(value("do_normalize", True).all())
    neutral = torch.zeros(channels), torch.ones(channels)
    mean, std = (value(f"image_{key}", family.mean_std[i]) for i, key in enumerate(("mean", "std")))
    mean, std = (mean, std) if normalize else neutral
    rescale = value("rescale_factor", 1 / 255) if value("do_rescale", True).all() else torch.ones(channels)
    gain, offset = 255 * rescale / std, -mean / std
    if value("do_map_pixels", family.margin > 0).all():
        gain, offset = (1 - 2 * family.margin) * gain, (1 - 2 * family.margin) * offset + family.margin
    return gain, offset
