"""Loading models: the format of a file or directory is detected from its content.

RUN, a checkpoint, a probe's head, MODEL.safetensors     written by this package
*.ckpt, mp_rank_00_model_states.pt                       official XTRA: models and classifiers
backbone.pth and head.pth, AIM's training layout         official AIM, also as a distributed checkpoint
DIR with NEPA's config.json and weights                  official NEPA: models and classifiers
DIR with a timm config.json, a ViT's state dict          timm
hf:USER/NAME, hf:USER/NAME/FILE, timm:NAME               any of these from the hub, or by timm's name
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from nextblock.checkpoint import (
    MODEL_FILE,
    CheckpointError,
    MissingSettingError,
    UnknownFormatError,
    blame,
    is_safetensors,
    latest_checkpoint,
    read_data,
    read_metadata,
    read_model,
)
from nextblock.config import DataConfig, Size, pair
from nextblock.errors import UsageError
from nextblock.interop.aim import IMAGE_SIZE_PX, is_aim, is_aim_head, read_aim
from nextblock.interop.files import (
    WEIGHT_SUFFIXES,
    LoadOptions,
    ProbeLayers,
    beside_weights,
    choose_weights,
    is_distributed,
    only_tensors,
    read_content,
    read_json,
    unwrapped,
)
from nextblock.interop.hub import fetch, is_hub_spec
from nextblock.interop.nepa import is_nepa, nepa_data, read_nepa
from nextblock.interop.timm import from_timm, is_timm_directory, is_timm_weights, read_timm
from nextblock.interop.timm_spec import TIMM_SPEC, open_timm_encoder, read_timm_data, timm_model
from nextblock.interop.xtra import is_xtra, read_xtra
from nextblock.models import EncoderModel, NextBlockModel, TimmEncoder
from nextblock.models.heads import ImageClassifier
from nextblock.models.timm_encoder import TimmConfig
from nextblock.presets import PRESETS
from nextblock.settings import require

# Model files in directories written by DeepSpeed, and by Lightning with DeepSpeed.
DEEPSPEED_FILES = ("mp_rank_00_model_states.pt", "checkpoint/mp_rank_00_model_states.pt")
# In every model and classifier that this package writes, except on timm encoders.
OWN_WEIGHTS = {f"{prefix}encoder.patch_embed.proj.weight" for prefix in ("", "encoder_model.")}
KNOWN = (
    "a run, a checkpoint, official XTRA, AIM and NEPA files, timm directories and ViTs, hf:USER/NAME, "
    "timm:NAME"
)


XTRA = "official XTRA"
# Official formats, recognised by names of tensors. Their prefixes are unique, so they come before timm, whose
# bare names (blocks.0.attn ...) are widely used.
OFFICIAL = (
    ("official AIM", is_aim, read_aim),
    (XTRA, is_xtra, read_xtra),
    ("official NEPA", is_nepa, read_nepa),
)


class Found(NamedTuple):
    """A loaded model and its source."""

    model: NextBlockModel | ImageClassifier
    format: str
    path: Path | None
    """File or directory; None for a timm model given by name."""
    assumed: Mapping[str, str] = {}
    """Settings that neither the caller nor the file gave, with the reason why they matter."""

    @property
    def encoder_model(self) -> EncoderModel:
        """The model, or the encoder model of a classifier."""
        return self.model if isinstance(self.model, NextBlockModel) else self.model.encoder_model


def load(
    src: str | Path,
    head: str | Path | None = None,
    *,
    num_heads: int | None = None,
    probe_layers: ProbeLayers | None = None,
    image_size: Size | None = None,
    norm_eps: float | None = None,
) -> NextBlockModel | ImageClassifier:
    """Load a model or classifier from a run, a file, `hf:USER/NAME[/FILE]` or `timm:NAME`.

    The result is on the CPU, in fp32 and evaluation mode. `head` is the second file of an AIM classifier. The
    other arguments are settings that a foreign file does not record (see `LoadOptions`). Raises
    `CheckpointError` if a file has an unknown format, is damaged, or lacks settings.
    """
    options = LoadOptions(
        head=head, num_heads=num_heads, probe_layers=probe_layers, image_size=image_size, norm_eps=norm_eps
    )
    return read(src, options).model


def load_model(src: str | Path, **settings: Any) -> NextBlockModel:
    """Load a `NextBlockModel`; from a classifier, its encoder, converted from timm if possible."""
    return as_model(read(src, LoadOptions(**settings)), str(src))


def load_classifier(src: str | Path, head: str | Path | None = None, **settings: Any) -> ImageClassifier:
    """Load a classifier as `load` does; `CheckpointError` if the model has no head."""
    # timm models are loaded without their head, so skip reading them: not all can be converted to ours.
    is_timm = str(src).startswith(TIMM_SPEC) or is_timm_directory(Path(src))
    found = None if is_timm else read(src, LoadOptions(head=head, **settings))
    if found is None or isinstance(found.model, NextBlockModel):
        remedy = "`nextblock probe` and `nextblock finetune` write one; eval trains some if you give --train"
        if found is not None and found.format == "official AIM":
            remedy = "give AIM's head, which is a separate file: --head FILE"
        raise CheckpointError(f"{src} holds no classification head; {remedy}")
    return found.model


def open_encoder(src: str | Path, *, num_heads: int | None = None) -> EncoderModel:
    """Load an encoder for evaluation: ours, or any timm transformer; from a classifier, its encoder.

    "timm:NAME" keeps its class and register tokens.
    """
    spec = str(src)
    if not spec.startswith(TIMM_SPEC):
        return read(src, LoadOptions(num_heads=num_heads)).encoder_model
    if num_heads is not None:
        raise UsageError(f"{spec} records its attention heads; leave num_heads out")
    return open_timm_encoder(spec)


def as_model(found: Found, origin: str, *, drop_prefix_tokens: bool = False) -> NextBlockModel:
    """The model, or a classifier's encoder; `CheckpointError` for a timm encoder unlike ours."""
    model = found.encoder_model
    if isinstance(model, TimmEncoder):
        return from_timm(model.encoder, origin, drop_prefix_tokens=drop_prefix_tokens)
    return model


def read(src: str | Path, options: LoadOptions) -> Found:
    """Load `src` on the CPU, in fp32 and evaluation mode; `CheckpointError` if it cannot be loaded."""
    origin, path = str(src), Path(src)
    is_named = origin.startswith(TIMM_SPEC)
    if not is_named and not is_hub_spec(origin) and not path.exists():
        require(
            origin not in PRESETS,
            f"{src} is a preset, not a model; train it first: nextblock pretrain --preset {src} --data.train "
            "DIR --out RUN, and then give RUN",
        )
        beside = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
        near = [str(path.with_name(one)) for one in difflib.get_close_matches(path.name, beside, 1)]
        near = near or difflib.get_close_matches(path.name, [*PRESETS], 1, 0.8)
        hint = f"did you mean {near[0]}?" if near else f"known: {KNOWN}"
        raise UsageError(f"{path} does not exist; {hint}")
    # Errors in reading are blamed on the file. But if the caller gave a name or settings, a ValueError is
    # about them.
    with blame(src, values_of_caller=is_named or bool(options.given)):
        found = _read(origin, options)
    config = found.encoder_model.config
    heads = "its own" if isinstance(config, TimmConfig) else config.num_heads
    for name, value in options.given.items():
        if name == "num_heads":
            message = f"{src} records {heads} attention heads, not {value}; leave num_heads out"
            require(value == heads, message)
        else:
            # Every format but AIM's records these.
            message = f"{src} does not use {name}={value!r}; leave it out"
            require(found.format == "official AIM", message)
    return found


def _read(origin: str, options: LoadOptions) -> Found:
    # Cheap checks come first: a name, a directory's config.json, the metadata of our own file. Only foreign
    # files are read in full to detect their format.
    if origin.startswith(TIMM_SPEC):
        model = from_timm(timm_model(origin), origin, drop_prefix_tokens=options.drop_prefix_tokens)
        return Found(model, "timm model", None)
    path = fetch(origin) if is_hub_spec(origin) else Path(origin)
    if is_timm_directory(path):
        return Found(read_timm(path, options), "timm directory", path)
    own = own_file(path)
    if own is not None:
        return Found(read_model(own), "nextblock", path)
    file, *head = _weight_files(path, origin)
    if head and options.head is None:
        options = replace(options, head=head[0])
    content = read_content(file)
    weights = unwrapped(content)
    format_, official = next(((name, read) for name, is_it, read in OFFICIAL if is_it(weights)), ("", None))
    build: Callable[[LoadOptions], NextBlockModel | ImageClassifier]
    if official is not None:
        settings = (
            read_json(file.parent / "config.json")
            if format_ != XTRA
            else beside_weights(content, "hyper_parameters")
        )
        build = partial(official, only_tensors(weights, origin), settings, origin)
    elif is_timm_weights(weights):
        # The file's metadata and config.json provide what the tensors do not show: mask, epsilon, heads.
        format_, build = "timm state dict", partial(read_timm, file, weights=weights)
    else:
        held = list(content)[:5] if isinstance(content, Mapping) else [type(content).__name__]
        why = f"is in no known format (it holds: {', '.join(map(str, held))}); known: {KNOWN}"
        if is_aim_head(weights):
            why = "is an AIM classifier's head alone; give its backbone, and this file as head= (--head)"
        elif OWN_WEIGHTS & weights.keys():
            why = "has lost its settings (safetensors' metadata); use the file that nextblock wrote"
        raise UnknownFormatError(f"{origin} {why}", file, content)
    # Settings that neither the caller nor the file gives have a fallback, which is reported, or are refused.
    fallback, assumed = {"image_size": IMAGE_SIZE_PX, **options.fallback}, {}
    while True:
        try:
            return Found(build(options), format_, path, assumed)
        except MissingSettingError as error:
            if not error.reasons.keys() <= fallback.keys():
                raise
            assumed |= error.reasons
            options = replace(options, **{name: fallback[name] for name in error.reasons})


def _weight_files(path: Path, origin: str) -> list[Path]:
    """The file itself; from a directory, the model's file, or a backbone and its head."""
    if not path.is_dir() or is_distributed(path):
        return [path]
    for name in DEEPSPEED_FILES:
        if (path / name).is_file():
            return [path / name]
    files = [file.name for file in path.iterdir() if file.is_file()]
    chosen = choose_weights(files, origin, as_named=f"{path}/{{}}")
    if not chosen:
        suffixes = ", ".join(f"*{suffix}" for suffix in WEIGHT_SUFFIXES)
        raise CheckpointError(
            f"{path} holds no model: looked for {MODEL_FILE}, checkpoints/step_*/{MODEL_FILE}, a timm "
            f"config.json and {suffixes}, found {', '.join(sorted(files)[:8]) or 'nothing'}"
        )
    return [path / name for name in chosen]


def own_file(path: Path) -> Path | None:
    """Find this package's model file in a file, checkpoint or run; None if there is none."""
    if not path.is_file():
        # A checkpoint contains a model. A run contains checkpoints: use the latest undamaged one.
        latest = None if (path / MODEL_FILE).is_file() else latest_checkpoint(path / "checkpoints")
        path = (latest or path) / MODEL_FILE
    # `is_safetensors` reads nine bytes only, so large foreign pickles are not opened here.
    is_own = path.is_file() and is_safetensors(path) and read_metadata(path).get("format") == "nextblock"
    return path if is_own else None


def recorded_data(src: str | Path) -> DataConfig | None:
    """Crop and normalisation that a source of weights records; None if it records none.

    A run's settings contain more; callers that know runs read those instead.
    """
    place = fetch(str(src)) if is_hub_spec(src) else src
    path, is_timm = Path(place), str(place).startswith(TIMM_SPEC)
    own = None if is_timm or is_timm_directory(path) else own_file(path)
    if own is not None:
        return read_data(own)
    folder = path if path.is_dir() else path.parent
    nepa = None if is_timm else nepa_data(read_json(folder / "config.json"))
    if nepa is not None:
        return nepa
    return read_timm_data(place) if is_timm or path.exists() else None


def official_data(image_size: Size, channels: int) -> DataConfig:
    """Settings of official evaluation: ImageNet's mean and deviation, and a resize by image size."""
    size = max(pair(image_size))
    # Official files do not record the resize. The shorter side is 300 px for images of 256 px (XTRA-B), else
    # 8/7 of the image size (256 px for 224, XTRA-H and AIM).
    resize_px = 300 if size == 256 else round(size * 8 / 7)
    if channels == 3:
        return DataConfig(val_resize_px=resize_px)
    half = (0.5,) * channels  # there are no official numbers for other than three channels
    return DataConfig(val_resize_px=resize_px, channels=channels, mean=half, std=half)
