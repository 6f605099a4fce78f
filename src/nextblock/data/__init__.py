"""Images from sources to batches: sources, decode, order, augment, loader."""

from nextblock.data.augment import normalize
from nextblock.data.decode import BadImageError, decode_image, jpeg_decoder
from nextblock.data.loader import (
    BadSample,
    Batch,
    QuarantineLog,
    Step,
    TooManyBadImages,
    TrainLoader,
    eval_batches,
)
from nextblock.data.order import MixtureOrder, VisitOrder
from nextblock.data.random import keyed_permutation, keyed_rng, keyed_seed
from nextblock.data.sources import ConcatSource, DataError, Source, open_source, open_sources
from nextblock.data.workers import resolve_workers

__all__ = [
    "BadImageError",
    "BadSample",
    "Batch",
    "ConcatSource",
    "DataError",
    "MixtureOrder",
    "QuarantineLog",
    "Source",
    "Step",
    "TooManyBadImages",
    "TrainLoader",
    "VisitOrder",
    "decode_image",
    "eval_batches",
    "jpeg_decoder",
    "keyed_permutation",
    "keyed_rng",
    "keyed_seed",
    "normalize",
    "open_source",
    "open_sources",
    "resolve_workers",
]
