"""Images: where they are (sources, mixture), to pixels (decode), crops (augment), batches (order, loader)."""

from nextblock.data.augment import (
    color_jitter,
    eval_crop,
    normalize,
    random_resized_crop_box,
    train_crop,
    val_crop,
)
from nextblock.data.decode import BadImageError, decode_image, jpeg_decoder
from nextblock.data.keyed import keyed_permutation, keyed_rng, keyed_seed
from nextblock.data.loader import (
    BadSample,
    Batch,
    Step,
    TrainLoader,
    eval_batches,
    resolve_workers,
)
from nextblock.data.mixture import ConcatSource, open_sources, parts_of, sample_order
from nextblock.data.order import MixtureOrder, SampleOrder, VisitOrder, step_samples
from nextblock.data.quarantine import QuarantineLog, TooManyBadImages
from nextblock.data.sources import Source, open_source

__all__ = [
    "BadImageError",
    "BadSample",
    "Batch",
    "ConcatSource",
    "MixtureOrder",
    "QuarantineLog",
    "SampleOrder",
    "Source",
    "Step",
    "TooManyBadImages",
    "TrainLoader",
    "VisitOrder",
    "color_jitter",
    "decode_image",
    "eval_batches",
    "eval_crop",
    "jpeg_decoder",
    "keyed_permutation",
    "keyed_rng",
    "keyed_seed",
    "normalize",
    "open_source",
    "open_sources",
    "parts_of",
    "random_resized_crop_box",
    "resolve_workers",
    "sample_order",
    "step_samples",
    "train_crop",
    "val_crop",
]
