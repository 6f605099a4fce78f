"""Images: where they are (sources), to pixels (decode), crops (augment), and batches in order (loader)."""

from nextblock.data.augment import eval_crop, normalize, random_resized_crop_box, train_crop
from nextblock.data.decode import BadImageError, decode_image, jpeg_decoder
from nextblock.data.keyed import keyed_permutation, keyed_rng, keyed_seed
from nextblock.data.loader import (
    BadSample,
    Batch,
    Step,
    TrainLoader,
    eval_batches,
    resolve_workers,
    step_samples,
)
from nextblock.data.quarantine import QuarantineLog, TooManyBadImages
from nextblock.data.sources import Source, open_source

__all__ = [
    "BadImageError",
    "BadSample",
    "Batch",
    "QuarantineLog",
    "Source",
    "Step",
    "TooManyBadImages",
    "TrainLoader",
    "decode_image",
    "eval_batches",
    "eval_crop",
    "jpeg_decoder",
    "keyed_permutation",
    "keyed_rng",
    "keyed_seed",
    "normalize",
    "open_source",
    "random_resized_crop_box",
    "resolve_workers",
    "step_samples",
    "train_crop",
]
