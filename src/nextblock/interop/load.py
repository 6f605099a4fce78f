"""Models from anywhere: a file's format is told by its content, a directory's by what lies in it.

RUN, a checkpoint, a probe's head, MODEL.safetensors     what this package writes
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
from nextblock.interop.aim import hub_settings, is_aim, is_aim_head, read_aim, stores_positions
from nextblock.interop.files import (
    AIM_FILES,
    WEIGHT_SUFFIXES,
    LoadOptions,
    ProbeLayers,
    choose_weights,
    is_distributed,
    read_content,
    read_json,
    unwrapped,
)
from nextblock.interop.hub import fetch, is_hub_spec
from nextblock.interop.nepa import is_nepa, nepa_data, read_nepa
from nextblock.interop.timm import from_timm, is_timm_directory, is_timm_weights, read_timm
from nextblock.interop.timm_spec import (
    TIMM_SPEC,
    open_timm_encoder,
    parse_timm_spec,
    read_timm_data,
    timm_model,
)
from nextblock.interop.xtra import is_xtra, read_xtra
from nextblock.models import EncoderModel, NextBlockModel, TimmEncoder
from nextblock.models.heads import ImageClassifier
from nextblock.models.timm_encoder import TimmConfig
from nextblock.presets import PRESETS
from nextblock.settings import require

# The model in what DeepSpeed, and Lightning with it, save as a directory.
DEEPSPEED_FILES = ("mp_rank_00_model_states.pt", "checkpoint/mp_rank_00_model_states.pt")
# In every model and classifier that this package writes, but for those on an encoder of timm.
OWN_WEIGHTS = {f"{prefix}encoder.patch_embed.proj.weight" for prefix in ("", "encoder_model.")}
KNOWN = (
    "a run, a checkpoint, official XTRA, AIM and NEPA files, timm directories and ViTs, hf:USER/NAME, "
    "timm:NAME"
)


class Found(NamedTuple):
    """A model, and what is known of how it was found."""

    model: NextBlockModel | ImageClassifier
    format: str
    path: Path | None
    """The file or directory; None for a model that timm knows by name."""
    assumed: Mapping[str, str] = {}
    """Settings that neither the caller nor the file told, with the reason why they matter."""

    @property
    def encoder_model(self) -> EncoderModel:
        """The model itself, or that of a classifier."""
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
    """Build the model or classifier that a run, a file, `hf:USER/NAME[/FILE]` or `timm:NAME` holds.

    The result is on the CPU, in fp32 and evaluation mode. `head` is the second file of an AIM classifier; the
    other arguments say what a foreign file does not tell (see `LoadOptions`). Raises `CheckpointError` if a
    file is not understood, is damaged, or does not tell enough.
    """
    options = LoadOptions(
        head=head, num_heads=num_heads, probe_layers=probe_layers, image_size=image_size, norm_eps=norm_eps
    )
    return read(src, options).model


def load_model(src: str | Path, **settings: Any) -> NextBlockModel:
    """Load what can encode and perhaps predict: of a classifier, its encoder, timm's if it can be ours."""
    return as_model(read(src, LoadOptions(**settings)), str(src))


def load_classifier(src: str | Path, head: str | Path | None = None, **settings: Any) -> ImageClassifier:
    """Load as `load` does what must be a classifier; `CheckpointError` if it is a model without a head."""
    # Of timm only the encoder is taken, and not every one of them can be loaded as one of ours.
    is_timm = str(src).startswith(TIMM_SPEC) or is_timm_directory(Path(src))
    found = None if is_timm else read(src, LoadOptions(head=head, **settings))
    if found is None or isinstance(found.model, NextBlockModel):
        remedy = "`nextblock probe` and `nextblock finetune` write one; eval trains some if you give --train"
        if found is not None and found.format == "official AIM":
            remedy = "give AIM's head, which is a file of its own: --head FILE"
        raise CheckpointError(f"{src} holds no classification head; {remedy}")
    return found.model


def open_encoder(src: str | Path, *, num_heads: int | None = None) -> EncoderModel:
    """What can be evaluated: an encoder of ours, or any transformer of timm; of a classifier, its encoder.

    "timm:NAME" is taken as it is, with its class and register tokens; only `nextblock_vit`, which is
    our own encoder under timm's name, comes back as ours.
    """
    spec = str(src)
    if not spec.startswith(TIMM_SPEC) or parse_timm_spec(spec).name.startswith("nextblock_vit"):
        return read(src, LoadOptions(num_heads=num_heads)).encoder_model
    if num_heads is not None:
        raise UsageError(f"{spec} records its attention heads; leave num_heads out")
    return open_timm_encoder(spec)


def as_model(found: Found, origin: str, *, drop_prefix_tokens: bool = False) -> NextBlockModel:
    """Of a classifier its encoder; `CheckpointError` if that is timm's and of another kind than ours."""
    model = found.encoder_model
    if isinstance(model, TimmEncoder):
        return from_timm(model.encoder, origin, drop_prefix_tokens=drop_prefix_tokens)
    return model


def read(src: str | Path, options: LoadOptions) -> Found:
    """Build what `src` holds, on the CPU, in fp32 and evaluation mode; `CheckpointError` says why not."""
    require(
        str(src) not in PRESETS or Path(src).exists(),
        f"{src} is a preset, not a model; train it first: nextblock pretrain --preset {src} --data.train DIR "
        "--out RUN, and then give RUN",
    )
    if not str(src).startswith(TIMM_SPEC) and not is_hub_spec(str(src)):
        _check_exists(Path(src))
    named = str(src).startswith(TIMM_SPEC)  # an unknown name is the caller's mistake, not a damaged file
    # What fails while a file is read is the file's fault, unless the caller gave settings: a ValueError is
    # then about them.
    with blame(src, values_of_caller=named or bool(options.given)):
        found = _read(src, options)
    if found.format != "official AIM":
        options.refuse_aims(str(src))
    config = found.encoder_model.config
    heads = "its own" if isinstance(config, TimmConfig) else config.num_heads
    if options.num_heads not in (None, heads):
        raise UsageError(
            f"{src} records {heads} attention heads, not {options.num_heads}; leave num_heads out"
        )
    return found


def _check_exists(path: Path) -> None:
    if not path.exists():
        beside = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
        near = [str(path.with_name(one)) for one in difflib.get_close_matches(path.name, beside, 1)]
        near = near or difflib.get_close_matches(path.name, [*PRESETS], 1, 0.8)
        raise UsageError(
            f"{path} does not exist; " + (f"did you mean {near[0]}?" if near else f"known: {KNOWN}")
        )


def _read(src: str | Path, options: LoadOptions) -> Found:
    origin = str(src)
    # What is cheapest to tell comes first: a name, a directory's config.json, the metadata of our own file.
    # Only other people's files are read in full to learn what they are.
    if origin.startswith(TIMM_SPEC):
        options.refuse_aims(origin)
        model = from_timm(timm_model(origin), origin, drop_prefix_tokens=options.drop_prefix_tokens)
        return Found(model, "timm model", None)
    path = fetch(origin) if is_hub_spec(src) else Path(src)
    if is_timm_directory(path):
        return Found(read_timm(path, options), "timm directory", path)
    own = own_file(path)
    if own is not None:
        return Found(read_model(own), "nextblock", path)
    files = _weight_files(path, origin)
    if len(files) == len(AIM_FILES):
        options = replace(options, head=options.head or files[1])
    return _read_foreign(files[0], path, origin, options)


def _read_foreign(file: Path, path: Path, origin: str, options: LoadOptions) -> Found:
    """Read a file that this package did not write; its content is read once."""
    content = read_content(file)
    build: Callable[[LoadOptions], NextBlockModel | ImageClassifier]
    assumed: dict[str, str] = {}
    # By the names of the tensors alone. AIM and XTRA have prefixes that nobody else uses, so they come before
    # timm, whose bare names (blocks.0.attn ...) are many people's.
    if is_aim_head(content):
        why = (
            f"{origin} is an AIM classifier's head alone; give its backbone, and this file as head= (--head)"
        )
        raise UnknownFormatError(why, file, content)
    if is_aim(content):
        format_, head = "official AIM", options.head
        if head is not None:
            head = read_content(fetch(str(head)) if is_hub_spec(head) else Path(head))
        # A config.json from the hub knows heads and layers, which no weight tells; the caller's values win.
        beside = hub_settings(read_json(file.parent / "config.json"), content)
        options = replace(options, **{name: beside[name] for name in beside.keys() - set(options.given)})
        if options.image_size is None and not stores_positions(content):
            assumed["image_size"] = "Apple's; the file records none, and the encoder takes any (--image_size)"
        build = partial(read_aim, content, origin, head=head)
    elif is_xtra(content):
        format_, build = "official XTRA", partial(read_xtra, content, origin)
    elif is_nepa(content):
        settings = read_json(file.parent / "config.json")
        format_, build = "official NEPA", lambda _: read_nepa(content, settings, origin)
    elif is_timm_weights(unwrapped(content)):
        # The file's metadata and the config.json beside it say what the weights do not: mask, epsilon, heads.
        format_, build = "timm state dict", partial(read_timm, file, weights=unwrapped(content))
    else:
        held = list(content)[:5] if isinstance(content, Mapping) else [type(content).__name__]
        why = f"{origin} is in no known format (it holds: {', '.join(map(str, held))}); known: {KNOWN}"
        if isinstance(content, Mapping) and OWN_WEIGHTS & content.keys():
            why = f"{origin} has lost its settings (safetensors' metadata); use the file that nextblock wrote"
        raise UnknownFormatError(why, file, content)
    try:
        model = build(options)
    except MissingSettingError as error:
        if not error.reasons.keys() <= options.fallback.keys():
            raise
        # Who starts from these weights has values that will do. They are reported, as they are a guess.
        assumed |= error.reasons
        model = build(replace(options, **{name: options.fallback[name] for name in error.reasons}))
    return Found(model, format_, path, assumed)


def _weight_files(path: Path, origin: str) -> list[Path]:
    """A file itself; of a directory, the model's one or, for a backbone and its head, two."""
    if not path.is_dir() or is_distributed(path):
        return [path]
    for name in DEEPSPEED_FILES:
        if (path / name).is_file():
            return [path / name]
    files = [file.name for file in path.iterdir() if file.is_file()]
    chosen = choose_weights(files, origin, as_named=f"{path}/{{}}")
    if not chosen:
        found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise CheckpointError(
            f"{path} holds no model: looked for {MODEL_FILE}, checkpoints/step_*/{MODEL_FILE}, a timm "
            f"config.json and {', '.join('*' + suffix for suffix in WEIGHT_SUFFIXES)}, found {found}"
        )
    return [path / name for name in chosen]


def own_file(path: Path) -> Path | None:
    """The model file in this package's own format that a file, a checkpoint or a run means, if one does."""
    if not path.is_file():
        # A checkpoint holds a model, a run holds checkpoints: the latest undamaged one counts.
        latest = None if (path / MODEL_FILE).is_file() else latest_checkpoint(path / "checkpoints")
        path = (latest or path) / MODEL_FILE
    # A first look at nine bytes: other people's pickles of many gigabytes are not opened for this.
    is_own = path.is_file() and is_safetensors(path) and read_metadata(path).get("format") == "nextblock"
    return path if is_own else None


def recorded_data(src: str | Path) -> DataConfig | None:
    """How a source of weights says that its images are cut and normalised; None where it is silent.

    A run's own settings say more, and are read by whoever knows runs.
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
    """What official evaluation does: ImageNet's mean and deviation, and a resize by the image size."""
    size = max(pair(image_size))
    # By the size alone, as official files record nothing of it: the shorter side is 300 px for images of 256
    # (XTRA-B), else 8/7 of the image (256 px for 224, XTRA-H and AIM).
    resize_px = 300 if size == 256 else round(size * 8 / 7)
    if channels == 3:
        return DataConfig(val_resize_px=resize_px)
    half = (0.5,) * channels  # nobody has trained officially on other than colour
    return DataConfig(val_resize_px=resize_px, channels=channels, mean=half, std=half)
