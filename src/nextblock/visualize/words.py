"""What tables and pictures call the losses that a run is compared with; quick to import."""

from __future__ import annotations

BASELINE_WORDS = {
    "zero": "predicting zero",
    "copy_previous": "copying the previous block",
    "uniform": "predicting all tokens alike",
    "frequency": "predicting tokens by their frequency",
    "chance": "all classes equally likely",
    "mean": "predicting the mean vector",
    "initial_mean": "predicting the mean vector, before training",
    "initial_copy_previous": "copying the previous block, before training",
}
"""None of them needs a model. Pixels: the first two; tokens: the next two; classes: chance; vectors: mean and
copy_previous."""
