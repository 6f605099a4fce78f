"""The settings of a run: frozen dataclasses, checked where they are made, to and from YAML.

Every field is a dotted flag of the command line (`--model.block_size 4`) and a key of `config.yaml`. Types
carry the bounds; only rules across fields are written by hand. Nothing here imports torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from nextblock.settings import (
    Amount,
    Count,
    Natural,
    Positive,
    Rule,
    Share,
    check_types,
    duration,
    flatten,
    require,
    require_range,
    to_dict,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Attention = Literal["native", "causal", "full"]
"""Attention mask used for features: as the model was trained for, the pre-training mask, or none."""

ValCrop = Literal["center", "squash", "border"]
"""How an image is brought to the size of a validation crop."""


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """`4` and `(4, 4)` alike as (rows, columns)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


Size = Annotated[
    int | tuple[int, int],
    Rule(lambda size: min(pair(size)) >= 1, "one whole number from 1, or two: 64, 32,64 or 32x64"),
]
Rate = Annotated[float, Rule(lambda x: 0 <= x < 1, "from 0 to below 1")]
Pixel = Annotated[float, Rule(lambda x: 0 <= x <= 1, "from 0 to 1 (divide values of bytes by 255)")]
Deviation = Annotated[float, Rule(lambda x: 0 < x <= 1, "above 0, up to 1 (divide values of bytes by 255)")]
Jitter = Annotated[
    tuple[Share, Share, Share, Share],
    Rule(lambda changes: changes[3] <= 0.5, "four numbers from 0 to 1, the last (hue) at most 0.5"),
]
Length = Annotated[str, duration("ep", "st", "sa")]


class _Section:
    def __post_init__(self) -> None:
        check_types(self, type(self).__name__.removesuffix("Config").lower())


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Section):
    """The network and its objective: a timm ViT that encodes, and a predictor of the next block's pixels."""

    image_size: Size = 256
    """Image size in pixels: 64 (square), or rows and columns as 32,64 or 32x64."""
    patch_size: Count = 16
    """Side of a patch in pixels."""
    in_chans: Count = 3
    """Channels of the image; sets data.channels too."""
    embed_dim: Count = 768
    """Width of the encoder."""
    depth: Count = 12
    """Layers of the encoder."""
    num_heads: Count = 12
    """Attention heads of the encoder; must divide embed_dim."""
    mlp_ratio: Positive = 4.0
    """Hidden width of an encoder layer's MLP, as a multiple of its width."""
    norm_eps: Positive = 1e-6
    """Epsilon of every LayerNorm."""
    bias: bool = True
    """Give the linear maps of all layers a bias; AIM has none."""
    qk_scale: Positive | None = None
    """Factor on query-key products before the softmax; null: 1 / sqrt(head width)."""
    patch_norm: bool = False
    """Normalise embedded patches before positions are added, as AIM does."""
    positions: Literal["learned", "sincos"] = "learned"
    """Position embeddings of encoder and predictor: learned, or fixed sines and cosines of row and column."""
    weight_init: Literal["trunc_normal", "xavier_uniform"] = "trunc_normal"
    """Initial weights of linear maps: truncated normal 0.02 (XTRA), or Xavier uniform (AIM)."""
    drop_path: Rate = 0.0
    """Drop-path rate of the encoder's last layer; grows linearly from 0 at the first."""
    block_size: Size = 4
    """Patches along a block's side: 4, or rows and columns as 2,4 or 2x4; 1 is plain causal attention."""
    encoder_attention: Literal["block_causal", "full"] = "block_causal"
    """Attention mask of the encoder; full lets every patch see the targets, so it cannot be pre-trained."""
    order: Literal["raster", "spiral", "checkerboard", "fixed_random", "random"] = "raster"
    """Order of the blocks: row by row, from the centre out, every other block first, one random order, or
    random: as many orders as blocks, one drawn a step."""
    order_seed: int = 0
    """Seed of the random orders."""
    prefix: bool = False
    """Let all tokens attend to a prefix of random length, as AIM does; only blocks after it are predicted."""
    num_predicted_blocks: Count = 1
    """How many blocks ahead are predicted, each by its own block MLP; their losses are averaged."""
    predictor: Literal["transformer", "mlp", "linear"] | None = "transformer"
    """Predictor: transformer layers (XTRA), MLPs on each patch (AIM), a linear map; null: encoder only."""
    predictor_attention: Literal["native", "block_causal", "causal", "full"] = "native"
    """Attention mask of a transformer predictor; native: the encoder's. The others are for official files."""
    predictor_block_size: Size | None = None
    """Patches along a block's side in the predictor's own mask: 4, or 2x4; null: block_size."""
    projection_dim: Count | None = 4096
    """Hidden width of the MLP between encoder and predictor; null: one linear map."""
    predictor_dim: Count = 768
    """Width of the predictor."""
    predictor_depth: Count = 8
    """Layers of the predictor."""
    predictor_heads: Count = 6
    """Attention heads of the predictor; must divide predictor_dim."""
    predictor_mlp_ratio: Positive = 4.0
    """Hidden width of a predictor layer's MLP, as a multiple of its width."""
    predictor_extra_norm: bool = False
    """Predictor "mlp": add each layer's normed input before the MLP, as AIM's official code does."""
    block_mlp_dim: Count | None = 6144
    """Hidden width of the MLP that turns a block's tokens into the next block; null: one linear map."""
    norm_pixels: bool = True
    """Normalise the target pixels of each block by its own mean and deviation."""
    loss: Literal["mse", "l1"] = "mse"
    """Distance between predicted and true pixels."""
    tokenizer: Literal["kmeans"] | None = None
    """Predict k-means tokens of patches by cross-entropy instead of pixels; fitted on data.train."""
    vocab_size: Annotated[int, Rule(lambda n: n >= 2, "from 2")] = 8192
    """Number of k-means tokens."""
    feature_attention: Literal["causal", "full"] = "causal"
    """What native attention means for features of this model: the pre-training mask, or no mask."""
    resample_antialias: bool = True
    """Antialias learned positions that are resampled to another grid, as timm does; XTRA does not."""
    init: str | None = None
    """Start from these weights, anything `nextblock info` reads; what does not fit is resampled or fresh."""

    has_class_token = False
    """No setting: these encoders have patches alone, unlike some of timm's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sides, p, block = pair(self.image_size), self.patch_size, pair(self.block_size)
        blocks = f"blocks of {block[0]}x{block[1]} patches of {p} px"
        # Patches first, then blocks, which patches must fill; the nearest sizes that can be cut are named.
        for parts, unit in ((f"{p}-px patches", (p, p)), (blocks, self.block_px)):
            below = tuple(side // px * px for side, px in zip(sides, unit, strict=True))
            above = tuple(-(-side // px) * px for side, px in zip(sides, unit, strict=True))
            near = ["x".join(map(str, dict.fromkeys(size))) for size in (below, above) if min(size) > 0]
            require(
                sides == below,
                f"an image of {sides[0]}x{sides[1]} px cannot be cut into {parts}; "
                f"use model.image_size {' or '.join(near)}, or another patch_size or block_size",
            )
        is_possible = self.encoder_attention == "block_causal" or self.feature_attention == "full"
        require(is_possible, "model.encoder_attention full needs model.feature_attention full")
        self._check_widths("embed_dim", "num_heads")
        if self.predictor is None:
            return
        if self.predictor == "transformer":
            self._check_widths("predictor_dim", "predictor_heads")
        elif self.predictor == "mlp":
            self._check_widths("predictor_dim")
        self._check_own_mask()
        require(
            self.num_blocks == 1 or self.num_predicted_blocks < self.num_blocks,
            f"model.num_predicted_blocks is {self.num_predicted_blocks}, but an image has only "
            f"{self.num_blocks} blocks; predict at most {self.num_blocks - 1} ahead",
        )
        require(
            self.tokenizer is None or (self.norm_pixels and self.loss == "mse"),
            f"model.norm_pixels {self.norm_pixels} and model.loss {self.loss} are for pixels; omit them",
        )

    def check_predicts(self) -> None:
        """Refuse settings of a model that cannot predict; it may still encode."""
        require(self.predictor is not None, "an encoder (model.predictor is null) cannot predict blocks")
        require(
            self.num_blocks > 1,
            "the whole image is one block, so there is no next block; use a smaller model.block_size",
        )

    def _check_widths(self, width: str, heads: str = "") -> None:
        dim, number = getattr(self, width), getattr(self, heads, 1)
        require(dim % number == 0, f"model.{width} {dim} is not divisible by model.{heads} {number}")
        # Sines and cosines of row and column take a quarter of the width each.
        quarters = dim // 4 * 4
        require(
            self.positions == "learned" or dim % 4 == 0,
            f"model.{width} {dim} cannot be divided by 4 (sincos); use {quarters or 4} or {quarters + 4}",
        )

    def _check_own_mask(self) -> None:
        """Refuse attention masks of the predictor's or the encoder's own that nothing could follow."""
        own, block = self.predictor_attention, self.predictor_block_size
        require(
            block is None or own == "block_causal",
            f"model.predictor_block_size {block} needs model.predictor_attention block_causal",
        )
        if own == "native" and self.encoder_attention == "block_causal":
            return
        # These masks count blocks row by row, and know no prefix: other orders would let targets be seen.
        require(
            self.order == "raster" and not self.prefix,
            f"model.encoder_attention {self.encoder_attention} and model.predictor_attention {own} need "
            "model.order raster and no model.prefix",
        )
        require(
            own == "native" or self.predictor == "transformer",
            f"a predictor {self.predictor} has no attention; leave model.predictor_attention native",
        )
        rows, columns = pair(block or 1)
        require(
            self.grid[0] % rows == 0 and self.grid[1] % columns == 0,
            f"model.predictor_block_size {block} does not divide a grid of {self.grid[0]}x{self.grid[1]}",
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along the image, (rows, columns)."""
        rows, columns = pair(self.image_size)
        return rows // self.patch_size, columns // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches in an image, n."""
        return math.prod(self.grid)

    @property
    def block_grid(self) -> tuple[int, int]:
        """Blocks along the image, (rows, columns)."""
        block = pair(self.block_size)
        return self.grid[0] // block[0], self.grid[1] // block[1]

    @property
    def num_blocks(self) -> int:
        """Blocks in an image, k."""
        return math.prod(self.block_grid)

    @property
    def patches_per_block(self) -> int:
        """Patches in a block, m; also its k-means tokens."""
        return math.prod(pair(self.block_size))

    @property
    def block_px(self) -> tuple[int, int]:
        """A block's height and width in pixels."""
        block = pair(self.block_size)
        return block[0] * self.patch_size, block[1] * self.patch_size

    @property
    def block_values(self) -> int:
        """Pixel values in a block, p: channels x height x width."""
        return self.in_chans * math.prod(self.block_px)


@dataclass(frozen=True, kw_only=True)
class DataConfig(_Section):
    """Where the images are and how they are cropped and normalised."""

    train: str | tuple[str, ...] | None = None
    """Images to train on: a directory, a tar, `hf:NAME,split=train`, `digits`; repeat it for a mixture."""
    weights: tuple[Positive, ...] | None = None
    """Share of each source of a mixture in an epoch, in proportion; null: by their numbers of images."""
    epoch_samples: Count | None = None
    """Samples that count as an epoch; null: as many as there are images."""
    val: str | None = None
    """Images to validate on, same grammar; null: none."""
    crop_scale: tuple[float, float] = (0.3, 1.0)
    """Share of the image's area that a training crop covers, smallest and largest; drawn uniformly."""
    crop_ratio: tuple[float, float] = (0.75, 1.5)
    """Width over height of a training crop, smallest and largest; drawn log-uniformly."""
    flip: Share = 0.5
    """Probability of a horizontal flip; use 0 when left and right differ, as in text."""
    color_jitter: Jitter | None = None
    """Largest change of brightness, contrast, saturation and hue in training; null: none."""
    color_jitter_prob: Share = 0.8
    """Probability that a training image's colours are changed at all."""
    val_resize_px: Count | None = None
    """Shorter side in pixels before the validation crop; null: follows model.image_size (300 for 256)."""
    val_crop: ValCrop = "center"
    """Validation crop: center cuts out the middle, squash ignores the aspect ratio, border shows the whole
    image and fills the rest with data.mean."""
    background: Literal["white", "grey", "black"] = "white"
    """Colour under the transparent parts of an image."""
    channels: Count = 3
    """Channels of an image: 1 (grey), 3 (colour), or as many as the files have; sets model.in_chans, and mean
    and std if they are not given: ImageNet's for 1 and 3, else normalize auto."""
    normalize: Literal["given", "auto"] = "given"
    """given: normalise by data.mean and data.std; auto: by those measured on a sample of data.train."""
    mean: tuple[Pixel, ...] = IMAGENET_MEAN
    """Mean of each channel, of pixels in [0, 1], that is subtracted."""
    std: tuple[Deviation, ...] = IMAGENET_STD
    """Standard deviation of each channel, of pixels in [0, 1], that is divided by."""
    workers: Natural | None = None
    """Processes that decode; null: up to 8, one less than there are cores; 0: the main process."""
    decoder: Literal["auto", "pillow", "fast"] = "auto"
    """JPEG decoder: auto is torchcodec if it works here, else Pillow; fast decodes large photos at a half, a
    quarter or an eighth of their size for training crops. Fixed for a run."""
    max_bad_fraction: Share = 0.01
    """Stop when more than this share of the files cannot be read; one is always allowed, unless this is 0."""
    max_pixels: Count = 178_956_970
    """Count an image of more pixels as unreadable; raise it for large scenes."""
    cache_dir: str | None = None
    """Folder for indexes of shards and copies of remote shards; null: ~/.cache/nextblock."""
    cache_gb: Positive = 100.0
    """Most that copies of remote shards may take, in GB; the least recently used go first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        specs, weights = self.train_specs, self.weights
        require(self.train != () != weights, "data.train or data.weights is empty; name one or several")
        require(len(set(specs)) == len(specs), f"data.train names a source twice: {list(specs)}")
        require(
            weights is None or not specs or len(specs) == len(weights),
            f"data.train names {len(specs)} source{'s' * (len(specs) > 1)} and data.weights "
            f"{len(weights or ())}; give --data.train once for each weight, or set data.weights null",
        )
        require(
            self.color_jitter is None or self.channels in (1, 3),
            f"data.color_jitter changes colours, data.channels is {self.channels}; set it null",
        )
        require_range("data.crop_scale", self.crop_scale, 0, 1)
        require_range("data.crop_ratio", self.crop_ratio, 0, 1e6)
        require(
            self.val_crop != "border" or self.normalize == "given",
            "data.val_crop border fills with data.mean, which data.normalize auto measures on such crops; "
            "use center or squash, or give data.mean and data.std",
        )
        require(
            len(self.mean) == len(self.std) > 0,
            f"data.mean has {len(self.mean)} channels and data.std {len(self.std)}; give as many of each",
        )

    @property
    def train_specs(self) -> tuple[str, ...]:
        """The sources to train on."""
        return (self.train,) if isinstance(self.train, str) else self.train or ()

    def resize_px(self, image_size: int | tuple[int, int]) -> int:
        """Pixels of the shorter side before the validation crop: as given, or in proportion 300 to 256."""
        return self.val_resize_px or round(max(pair(image_size)) * 300 / 256)


@dataclass(frozen=True, kw_only=True)
class OptimConfig(_Section):
    """AdamW with linear warm-up and cosine decay, set before every step."""

    lr: Amount = 1e-3
    """Peak learning rate, used as it is: never scaled by the batch size."""
    start_lr: Amount = 1e-4
    """Learning rate of the first warm-up step."""
    end_lr: Amount = 1e-6
    """Learning rate at the end of the cosine."""
    warmup: Annotated[str, duration("ep", "st", "sa", "%", least=0)] = "5%"
    """Length of the linear warm-up: 15ep, 500st, 10000sa, or a share of the run such as 2.5%."""
    weight_decay: Amount = 0.05
    """Decay of weights; biases and one-dimensional parameters are not decayed."""
    betas: tuple[Rate, Rate] = (0.9, 0.95)
    """AdamW's two decay rates."""
    eps: Positive = 1e-8
    """AdamW's epsilon."""
    clip_grad: Annotated[float, Rule(lambda x: x > 0, "above 0")] | None = 1.0
    """Clip the gradient's norm to this; null: no clipping."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(_Section):
    """How long, how much at a time, on what, and in which precision."""

    duration: Length = "100ep"
    """Length of the run: epochs (800ep), steps (500000st) or samples (2000000sa)."""
    batch_size: Count = 256
    """Images per optimizer step, over all GPUs and micro-batches."""
    micro_batch_size: Count | Literal["auto"] | None = None
    """Images per forward pass of a process; lower it when memory runs out: gradients accumulate. auto: as
    many as fit into memory; null: the process's whole share of the batch."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """With several processes: a copy of the model in each (ddp), or a part (fsdp); auto: ddp if it fits."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast precision; weights stay fp32. auto: bf16 if the device computes it, else fp32."""
    predictor_fp32: bool = False
    """Run the predictor in fp32 under fp16, as official XTRA does (it may overflow)."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto: CUDA, then MPS, then CPU."""
    deterministic: bool = False
    """Only deterministic algorithms, so that CUDA runs repeat bit for bit; slower."""
    activation_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile the model with torch.compile."""
    nonfinite_limit: Count = 5
    """Stop after this many steps in a row with NaN or inf in loss or gradient; such steps are skipped."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(_Section):
    """When to save, and how many to keep."""

    every: Annotated[str, duration("ep", "st", "sa", "min")] = "30min"
    """Save this often: 30min, 1ep, 500st or 10000sa. The end of the run, ctrl-C and SIGTERM save as well."""
    keep: Count = 2
    """How many of the latest checkpoints stay."""
    keep_every: Length | None = None
    """Keep one for good this often (a duration); null: none but the latest."""


@dataclass(frozen=True, kw_only=True)
class MonitorConfig(_Section):
    """What is logged and drawn during training. None of it changes the weights."""

    log_every: Length = "10st"
    """Write a line to metrics.jsonl this often."""
    val_every: Length = "1ep"
    """Measure the validation loss this often, if data.val is given."""
    pictures_every: Length | None = "20ep"
    """Draw the same few images' predictions this often; null: never."""
    pictures: Count = 8
    """How many images to draw."""
    knn_every: Length | None = "20ep"
    """Measure kNN accuracy this often, if data.train and data.val have labels; null: never."""
    knn_samples: Count = 10_000
    """Use at most this many images of each source for kNN."""
    tensorboard: bool = True
    """Write TensorBoard events to RUN/tensorboard."""
    loggers: tuple[Literal["wandb", "mlflow", "trackio"], ...] = ()
    """Send the numbers there as well; each needs its package."""
    project: str = "nextblock"
    """Project of the loggers (MLflow: experiment); the run has the name of its directory."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a pre-training run does."""

    preset: str | None = None
    """Preset that these settings start from; `nextblock presets` lists them."""
    seed: Natural = 0
    """Seed of weights, data order, augmentation, block orders and drop path."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network and its objective."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images, crops, decoding."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and learning rate."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Duration, batch, precision, device."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When to save."""
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    """Logging, validation, pictures, kNN."""

    def __post_init__(self) -> None:
        check_types(self)
        resize_px = self.data.resize_px(self.model.image_size)
        # Recorded as a number: the rule may change with a release, the run may not.
        if self.data.val_resize_px is None:
            object.__setattr__(self, "data", replace(self.data, val_resize_px=resize_px))
        require(
            resize_px >= max(pair(self.model.image_size)),
            f"data.val_resize_px is {resize_px}, smaller than model.image_size {self.model.image_size}",
        )
        channels = self.model.in_chans
        require(
            self.data.channels == channels,
            f"data.channels is {self.data.channels}, model.in_chans is {channels}; give one of them",
        )
        require(
            self.data.normalize == "auto" or len(self.data.mean) == channels,
            f"data.mean has {len(self.data.mean)} channels, model.in_chans is {channels}; "
            "give as many numbers, also for data.std, or use data.normalize auto",
        )

    def check_trainable(self) -> None:
        """Refuse settings with which a model may encode, but nothing can be learned."""
        self.model.check_predicts()
        require(
            self.train.precision != "fp16" or self.train.device != "cpu",
            "train.precision fp16 needs a GPU; on a CPU use bf16 or fp32",
        )

    def differences(self, other: RunConfig) -> dict[str, tuple[Any, Any]]:
        """Dotted settings in which two configs are not the same run: {name: (here, there)}."""
        # By setting, as files have them: a resumed run must compute the same, wherever it is stored.
        mine, theirs = flatten(to_dict(self)), flatten(to_dict(other))
        return {
            name: (value, theirs.get(name))
            for name, value in mine.items()
            if theirs.get(name) != value
            and not (name in _FREE_SETTINGS or name.startswith(("checkpoint.", "monitor.")))
        }


_DATA_PLACES = ("train", "val", "workers", "max_bad_fraction", "cache_dir", "cache_gb")
_FREE_SETTINGS = {"preset", "train.device", "train.strategy", *(f"data.{name}" for name in _DATA_PLACES)}
"""What may change when a run is resumed, besides checkpoint and monitor; source.json knows the images."""
