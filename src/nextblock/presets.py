"""Named runs and model sizes as rows of data, and how settings are changed by name.

XTRA's figures come from the paper's abstract and the official code and checkpoints; AIM's from the paper
(arXiv 2401.08541) and Apple's training code (`apple/ml-l3m`), whose AIM recipe is an example on ImageNet;
NEPA's and D-iGPT's come from their papers and code. Values that none of them states are marked as
ours. To add a preset, add a row; settings are named without their section.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from nextblock.config import IMAGENET_MEAN, IMAGENET_STD, ModelConfig, RunConfig, pair
from nextblock.errors import UsageError
from nextblock.settings import flatten, from_dict, nearest_name, read_value, require, setting_types, to_dict

DEFAULT_PRESET = "xtra-b16"
"""The preset of a run that names none."""

GREY_MEAN, GREY_STD = (0.459,), (0.226,)
"""ImageNet's, with channels weighted 0.299, 0.587 and 0.114 as in the conversion to grey."""

_HINTS = {setting.name: setting.hint for setting in setting_types(RunConfig)}
_SECTIONED = {name.rpartition(".")[2]: name for name in _HINTS}


def resolve(base: RunConfig, *layers: Mapping[str, Any]) -> RunConfig:
    """Change a run's settings by dotted name ("optim.lr") or nested dicts; later layers win."""
    # Change a flat dict name by name, then build and check the config once at the end: until then, two
    # settings may contradict each other.
    values, typed = flatten(to_dict(base)), dict[str, Any]()
    for layer in layers:
        typed = flatten(layer)
        for name in typed:
            if name not in _HINTS:
                raise UsageError(f"unknown setting {name!r}; {nearest_name(name, list(_HINTS))}")
        # Layer by layer, so that a later layer can change what followed from an earlier one.
        new = {name: read_value(name, value, _HINTS[name]) for name, value in typed.items()}
        values |= _with_followers(new, values)
    config = from_dict(RunConfig, values)
    # Check only the last layer, which the user typed: a run's own config.yaml rightly has both.
    measured = " and ".join(name for name in ("data.mean", "data.std") if name in typed)
    require(
        not measured or config.data.normalize == "given",
        f"data.normalize auto measures data.mean and data.std, but {measured} "
        f"{'are' if ' ' in measured else 'is'} given; leave {measured} out, or set data.normalize given",
    )
    return config


def _with_followers(new: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Add the settings that follow from these changes, unless they are given too."""
    if "model.image_size" in new and "data.val_resize_px" not in new:
        # In proportion: published recipes use 300 for 256 and 256 for 224, and each keeps its ratio.
        scale = max(pair(new["model.image_size"])) / max(pair(values["model.image_size"]))
        new["data.val_resize_px"] = round(values["data.val_resize_px"] * scale)
    # One number under two names: the given one sets the other. If both are given, they must agree.
    for name, other in (("data.channels", "model.in_chans"), ("model.in_chans", "data.channels")):
        if name in new:
            new.setdefault(other, new[name])
    channels = new.get("data.channels", values["data.channels"])
    if channels != values["data.channels"] and not {"data.mean", "data.std"} & new.keys():
        # ImageNet's numbers suit grey and colour; for other channels they must be measured.
        if channels in (1, 3):
            means, deviations = (GREY_MEAN, GREY_STD) if channels == 1 else (IMAGENET_MEAN, IMAGENET_STD)
            new |= {"data.mean": means, "data.std": deviations}
        else:
            new.setdefault("data.normalize", "auto")
    return new


@dataclass(frozen=True)
class Preset:
    """A named run: changes to another preset, or to the defaults."""

    name: str
    group: Literal["size", "recipe", "small", "ablation"]
    images: str
    """How many images it suits, or the data set it was published for."""
    about: str
    """What it is, and where its settings come from."""
    changes: Mapping[str, Any]
    """Settings without their section: `{"embed_dim": 192}`."""
    base: str | None = None
    published: str | None = None
    """Its published result, if confirmed."""

    @cached_property
    def config(self) -> RunConfig:
        """All settings, resolved."""
        # Presets build on each other: sizes, then recipes, then ablations.
        base = RunConfig() if self.base is None else PRESETS[self.base].config
        changes = {_SECTIONED[name]: value for name, value in self.changes.items()}
        return resolve(base, changes | {"preset": self.name})

    @property
    def least_images(self) -> int:
        """The number of images that it suits at least, as a rule of thumb; 0 if it is for one data set."""
        number, _, unit = self.images.replace(",", "").partition(" ")
        units = {"": 1, "million": 10**6, "billion": 10**9}
        return int(number) * units[unit] if number.isdecimal() and unit in units else 0

    @property
    def command(self) -> str:
        """The command that runs it."""
        sources = [f"DIR{i + 1}" for i in range(len(self.config.data.weights or ()))] or ["DIR"]
        sources = ["digits:split=train"] if self.name.endswith("-tiny") else sources
        named = " ".join(f"--data.train {source}" for source in sources)
        return f"nextblock pretrain --preset {self.name} {named} --out RUN"


def _set(text: str) -> dict[str, str]:
    """Settings as on a command line: "depth=4 lr=2e-3"; their types read the text."""
    return dict(word.split("=", 1) for word in text.split())


def _size(name: str, images: str, base: str | None = None, **changes: Any) -> Preset:
    about = "A size with defaults for any folder of images. The defaults are ours, not a published recipe."
    return Preset(name, "size", images, about, changes, base)


def _ablation(
    base: str, family: str, axis: str, published: str | None = None, note: str = "", /, **changes: Any
) -> Preset:
    """A recipe with a few settings changed, the most important first."""
    # The text is made from the changes, so the two cannot disagree.
    what = ", ".join(f"{name} {value}" for name, value in changes.items())
    unknown = "No confirmed result is published." if "xtra" in base else "The paper's figure is not known."
    about = (f"Ablation: {what}; all else as {base}.", note, "" if published else unknown)
    return Preset(f"{family}-{axis}", "ablation", "", " ".join(filter(None, about)), changes, base, published)


# ------------------------------------------------------------------------------------------------------- XTRA

_224 = _set("image_size=224 val_resize_px=256")
_PATCH14 = _set("patch_size=14") | _224
_XTRA = _set("batch_size=2088 micro_batch_size=29 precision=fp16 predictor_fp32=true")
_TINY = _set("""
    image_size=32 patch_size=4 embed_dim=128 depth=4 num_heads=4 predictor_dim=128 predictor_heads=4 flip=0
    val_resize_px=32 lr=2e-3 warmup=3ep duration=24ep batch_size=64 precision=fp32
    pictures_every=8ep knn_every=8ep
""")


def _width(dim: int, heads: int, projection: int, predictor: int, predictor_heads: int) -> dict[str, int]:
    encoder = {"embed_dim": dim, "num_heads": heads, "projection_dim": projection}
    return encoder | {"predictor_dim": predictor, "predictor_heads": predictor_heads}


# b16 and h14 were released. The other encoders are defined by the official code and used by no released run:
# their predictors (as wide as the encoder up to B, else half as wide; projection 4x the width) are ours.
_H14 = {**_PATCH14, **_width(1280, 16, 5120, 640, 8), "depth": 32, "block_mlp_dim": 9408}
_G14 = {**_width(1408, 16, 5632, 704, 8), "depth": 40, "mlp_ratio": 48 / 11}
_XTRA_SIZES = [
    _size("xtra-ti16", "50,000", "xtra-b16", **_width(192, 3, 768, 192, 3)),
    _size("xtra-s16", "100,000", "xtra-b16", **_width(384, 6, 1536, 384, 6)),
    _size("xtra-b16", "300,000", micro_batch_size=32),
    _size("xtra-l16", "1 million", "xtra-b16", **_width(1024, 16, 4096, 512, 8), depth=24),
    _size("xtra-h14", "3 million", "xtra-b16", **_H14),
    _size("xtra-g14", "10 million", "xtra-h14", **_G14),
]

_SMALL = _set("""
    embed_dim=192 depth=6 num_heads=3 block_size=2 projection_dim=384 predictor_depth=2 block_mlp_dim=384
    normalize=auto warmup=10% duration=250000sa batch_size=32 precision=fp32
""")
_SMALL_ABOUT = (
    "For folders of 1,000 to 50,000 images; about an hour on two CPU cores (an estimate). This project's "
    "own: docs/results/small_folders.md says what was measured, and what was not."
)

_XTRA_RUNS = [
    Preset(
        *("xtra-small-64", "small", "1,000"),
        about=_SMALL_ABOUT,
        changes=_SMALL
        | _set("image_size=64 val_resize_px=64 patch_size=8 predictor_dim=192 predictor_heads=3"),
    ),
    Preset(
        *("xtra-small-128", "small", "1,000"),
        about=f"{_SMALL_ABOUT} Costs as much as xtra-small-64, with patches of 16 px; for larger images.",
        changes=_SMALL | _set("image_size=128 val_resize_px=128 predictor_dim=128 predictor_heads=2"),
    ),
    Preset(
        *("xtra-tiny", "small", "digits"),
        about="A few minutes on two CPU cores; for the demo and the tests. This project's own.",
        changes=_TINY | _set("block_size=2 projection_dim=256 predictor_depth=2 block_mlp_dim=256"),
    ),
    Preset(
        *("xtra-b16-in1k", "recipe", "ImageNet-1k"),
        about="XTRA ViT-B/16 on ImageNet-1k as the evaluated checkpoint was trained. The official files "
        "disagree: the configuration file says 1600 epochs, warm-up 40, drop path 0.2; the name of the "
        "checkpoint that was evaluated says 800, 15 and 0.1, and those are used here. Batch 2088 = 29 "
        "images x 72 GPUs (derived; the official job script asks for 96). Validation: resized to 300 px, "
        "then the centre is cut.",
        base="xtra-b16",
        changes=_XTRA | _set("drop_path=0.1 warmup=15ep duration=800ep"),
        published="76.8 % attentive probe on ImageNet-1k (official README)",
    ),
    Preset(
        *("xtra-h14-in21k", "recipe", "ImageNet-21k"),
        about="XTRA ViT-H/14 on ImageNet-21k (winter 2021, 13.1 million images as the authors prepared it). "
        "Batch 2088 = 29 x 72 GPUs (derived).",
        base="xtra-h14",
        changes=_XTRA | _set("drop_path=0.2 warmup=3ep duration=100ep"),
        published="80.9 % attentive probe on ImageNet-1k (official README)",
    ),
    Preset(
        *("xtra-b16-ablation", "recipe", "ImageNet-1k"),
        about="The baseline of XTRA's ablations: ViT-B/16 on ImageNet-1k, 100 epochs, predictor half as wide."
        " Officially 114 images a GPU on an unknown number of GPUs; 2088 is assumed. "
        "No confirmed result is published.",
        base="xtra-b16",
        changes=_XTRA | _set("predictor_dim=384 warmup=10ep duration=100ep micro_batch_size=116"),
    ),
]

_xtra = partial(_ablation, "xtra-b16-ablation", "xtra-b16-ablation")
_XTRA_ABLATIONS = [
    _xtra("block-16px", block_size=1),
    _xtra("block-16px-2ahead", block_size=1, num_predicted_blocks=2),
    _xtra("block-32px", block_size=2),
    _xtra("block-32px-2ahead", block_size=2, num_predicted_blocks=2),
    _xtra("block-64px-2ahead", num_predicted_blocks=2),
    *(_xtra(f"predictor-depth-{depth}", predictor_depth=depth) for depth in (1, 2, 4, 16)),
    *(_xtra(f"predictor-width-{width}", predictor_dim=width) for width in (192, 576, 768)),
    _xtra("l1", loss="l1"),
    _xtra("random-order", order="random"),
    *(_xtra(f"224-block-{14 * side}px", block_size=side, **_PATCH14) for side in (1, 2, 4)),
    *(_xtra(f"224-block-{16 * side}px", block_size=side, **_224) for side in (1, 2)),
]

# -------------------------------------------------------------------------------------------------------- AIM

# norm_eps and the head's extra residual come from the training code.
_AIM_MODEL = _set("""
    bias=false norm_eps=1e-5 patch_norm=true positions=sincos weight_init=xavier_uniform block_size=1
    prefix=true predictor=mlp projection_dim=none predictor_extra_norm=true block_mlp_dim=none
    feature_attention=full
""")
_AIM = _set("""
    batch_size=4096 micro_batch_size=64 precision=bf16 log_every=50st
    val_every=5000st pictures_every=5000st knn_every=20000st
""")
_AIM_600M = _set("""
    embed_dim=1536 depth=24 num_heads=12 predictor_dim=2048 predictor_depth=12 predictor_heads=16
    crop_scale=0.4,1 micro_batch_size=32 start_lr=1e-6 end_lr=0 warmup=2.5%
""")
_AIM_SIZES = [
    _size("aim-600m", "10 million", **_PATCH14, **_AIM_MODEL, **_AIM_600M, crop_ratio=(3 / 4, 4 / 3)),
    _size("aim-1b", "100 million", "aim-600m", embed_dim=2048, num_heads=16),
    _size("aim-3b", "1 billion", "aim-600m", embed_dim=3072, num_heads=24),
    _size("aim-7b", "1 billion", "aim-600m", embed_dim=4096, num_heads=32, depth=32),
]


def _dfn(size: str, steps: int, last: float, best: float) -> Preset:
    return Preset(
        *(f"aim-{size}-dfn2b+", "recipe", "DFN-2B+"),
        about=f"AIM-{size.upper().replace('600M', '0.6B')} on DFN-2B+: 80 % of the first source (DFN-2B), "
        f"20 % of the second (ImageNet-1k). Batch 4096, {steps:,} steps, lr 1e-3 as in the paper; betas, "
        "decay, clipping, warm-up share and final rate as in the training code's ImageNet example; an "
        "epoch of 1,000 steps is ours.",
        base=f"aim-{size}",
        changes=_AIM | _set(f"weights=0.8,0.2 epoch_samples=4096000 duration={steps}st"),
        published=f"{last} % attentive probe on ImageNet-1k, {best} % with the best layers (AIM, Table 7)",
    )


def _both(attentive: float, linear: float, table: str = "Table 3") -> str:
    return f"{attentive} % attentive, {linear} % linear probe on ImageNet-1k (AIM, {table})"


_AIM_RUNS = [
    Preset(
        *("aim-tiny", "small", "digits"),
        about="A few minutes on two CPU cores; same budget as xtra-tiny. This project's own.",
        changes=_TINY | _AIM_MODEL | _set("predictor_depth=4"),
    ),
    Preset(
        *("aim-600m-in1k", "recipe", "ImageNet-1k"),
        about="AIM-0.6B on ImageNet-1k with the values of the training code's example: 125,000 steps, 256 "
        "images a GPU on an unknown number of GPUs; the paper's batch of 4096 is assumed. The accuracies "
        "are of the paper's own ImageNet run; its length and use of colour jitter are not known.",
        base="aim-600m",
        changes=_AIM | _set("color_jitter=0.4,0.4,0.2,0.1 duration=125000st micro_batch_size=256"),
        published=_both(78.2, 70.0),
    ),
    _dfn("600m", 500_000, 78.5, 79.4),
    _dfn("1b", 1_200_000, 80.6, 82.3),
    _dfn("3b", 1_200_000, 82.2, 83.3),
    _dfn("7b", 1_200_000, 82.4, 84.0),
]

_CAUSAL = {"prefix": False, "feature_attention": "causal"}
_INFERRED = "Table 3, raster order; we infer that this row is the causal one"
_OUR_ORDER = "The order is ours; the official table differs."
_OUR_SHAPE = "We chose ViT-H's shape; the paper's is not known."
_aim = partial(_ablation, "aim-600m-in1k", "aim-600m-ablation")
_AIM_ABLATIONS = [
    _aim("causal", _both(77.4, 69.5, _INFERRED), **_CAUSAL),
    _aim("order-spiral", _both(76.3, 67.7), order="spiral", **_CAUSAL),
    _aim("order-checkerboard", _both(76.0, 68.2), order="checkerboard", **_CAUSAL),
    _aim("order-random", _both(75.7, 65.8), _OUR_ORDER, order="fixed_random", **_CAUSAL),
    *(
        _aim(f"order-{order.replace('_', '-')}", order=order, **_CAUSAL)
        for order in ("reverse", "column", "reverse_column")
    ),
    *(
        _aim(
            f"masked-{share}",
            f"{attentive} % attentive probe on ImageNet-1k (AIM, Table 5)",
            **{"mask_ratio": share / 100, "order": "per_image", "prefix": False},
        )
        for share, attentive in ((50, 70.3), (75, 77.8))
    ),
    _aim("crop-0.08", _both(77.7, 68.4), crop_scale=(0.08, 1.0)),
    _aim("crop-1.0", _both(63.5, 49.6), crop_scale=(1.0, 1.0)),
    _aim("head-none", _both(75.4, 64.0), predictor="linear"),
    _aim("head-transformer", _both(78.5, 70.5), predictor="transformer", predictor_extra_norm=False),
    _aim("head-width-512", _both(77.7, 69.4, "Table 4"), predictor_dim=512),
    _aim("head-width-1024", _both(78.1, 69.6, "Table 4"), predictor_dim=1024),
    _aim("head-depth-6", _both(76.2, 65.3, "Table 4"), predictor_depth=6),
    _aim("head-depth-8", _both(77.1, 68.1, "Table 4"), predictor_depth=8),
    _aim("target-raw", norm_pixels=False),
    _aim("target-kmeans", None, "The number of tokens is ours.", target="tokens", vocab_size=8192),
    _aim("deep", None, _OUR_SHAPE, embed_dim=1280, depth=32, num_heads=10),
]

# ----------------------------------------------------------------------------------------------- NEPA, D-iGPT

_NEPA_MODEL = _set("""
    block_size=1 positions=rope rope_rescale=2 class_token=true qk_norm=plain layer_scale=1e-5 norm_eps=1e-12
    weight_init=trunc_normal_all target=embedding predictor=identity feature_attention=full
""")
_NEPA = _set("""
    batch_size=4096 micro_batch_size=64 precision=bf16 duration=1600ep lr=4.8e-3 start_lr=0 end_lr=0
    warmup=2.5% mean=0.5,0.5,0.5 std=0.5,0.5,0.5 crop_scale=0.08,1
""")
_NEPA_SIZES = [
    _size("nepa-b14", "1 million", micro_batch_size=32, **_PATCH14, **_NEPA_MODEL),
    _size("nepa-l14", "1 million", "nepa-b14", embed_dim=1024, depth=24, num_heads=16, qk_norm="scale"),
]


def _nepa(size: str, tuned: float) -> Preset:
    return Preset(
        *(f"nepa-{size}14-in1k", "recipe", "ImageNet-1k"),
        about=f"NEPA ViT-{size.upper()}/14 on ImageNet-1k: the encoder itself predicts the embedding "
        "of the next patch from the patches so far. Values of the official scripts (lr 3e-4 for every 256 "
        "images); the ratio of crops and the start of the warm-up are defaults of the code they call. "
        "Departures: crops are resized by bicubic, not bilinear interpolation, and no average of the weights "
        "is kept (EMA 0.9999, which plays no part in the official loss). How validation images are resized "
        "is not published.",
        base=f"nepa-{size}14",
        changes={**_NEPA, "crop_ratio": (3 / 4, 4 / 3)},
        published=f"{tuned} % fine-tuned on ImageNet-1k (arXiv 2512.16922)",
    )


_OTHER_RUNS = [
    Preset(
        *("nepa-tiny", "small", "digits"),
        about="A few minutes on two CPU cores; same budget as xtra-tiny. This project's own.",
        changes=_TINY | _NEPA_MODEL,
    ),
    _nepa("b", 83.8),
    _nepa("l", 85.3),
    Preset(
        *("digpt-b16-in1k", "recipe", "ImageNet-1k"),
        about="After D-iGPT ViT-B/16 on ImageNet-1k: features of OpenCLIP-H in the next of four blocks, in a "
        "random order for each image, and those of the visible blocks. Epochs, batch, decay and rate (1.5e-4 "
        "for every 256 images) are the official ones. Departures: officially, decoders cross-attend from "
        "positions to features of layers 6, 8, 10 and 12, and predict CLIP's 1024 projected features and the "
        "class token too; here a self-attending predictor reads the last layer and predicts the teacher's "
        "1280 features of patches. Its sizes, warm-up, crops and the attention of features are ours.",
        base="xtra-b16",
        changes=_224
        | _set("""
            block_size=7 order=per_image class_token=true target=features predict_visible=true
            teacher=timm:vit_huge_patch14_clip_224.laion2b teacher_dim=1280
            target_positions=true feature_attention=full
            predictor_dim=512 predictor_depth=4 predictor_heads=8 block_mlp_dim=1024
            batch_size=4096 micro_batch_size=64 lr=2.4e-3 duration=300ep
        """),
        published="86.2 % fine-tuned on ImageNet-1k by the official code (arXiv 2312.02147)",
    ),
]

# ----------------------------------------------------------------------------------------------- the registry

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        *(*_XTRA_RUNS, *_XTRA_ABLATIONS, *_XTRA_SIZES),
        *(*_AIM_RUNS, *_AIM_ABLATIONS, *_AIM_SIZES),
        *(*_OTHER_RUNS, *_NEPA_SIZES),
    )
}


def list_presets() -> list[str]:
    """Names of all presets."""
    return list(PRESETS)


def get_preset(name: str) -> Preset:
    """Return the preset of this name; an unknown name raises `UsageError` with the nearest one."""
    if name not in PRESETS:
        meant = nearest_name(name, list(PRESETS))
        if (Path(name) / "config.yaml").is_file():
            meant = f"it is a run: --out {name} resumes it, --model.init {name} starts from its weights"
        elif Path(name).is_file():
            meant = "it is a file: --config takes settings, --model.init weights"
        raise UsageError(f"unknown preset {name!r}; {meant}")
    return PRESETS[name]


def heads_of_sizes(family: str) -> dict[tuple[int, int], int]:
    """Number of attention heads by (width, depth) of the sizes of a family ("xtra-", "aim-")."""
    sizes = [p.config.model for p in PRESETS.values() if p.group == "size" and p.name.startswith(family)]
    return {(size.embed_dim, size.depth): size.num_heads for size in sizes}


def model_config(name: str, **overrides: Any) -> ModelConfig:
    """The network settings of a size ("xtra-b16") or preset, with any field overridden."""
    return resolve(get_preset(name).config, {"model": overrides}).model
