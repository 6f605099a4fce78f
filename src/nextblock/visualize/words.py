"""What tables and pictures call the losses that a run is compared with; quick to import."""

from __future__ import annotations

BASELINE_WORDS = {
    "zero": "predicting zero",
    "copy_previous": "copying the previous block",
    "uniform": "predicting all tokens alike",
    "frequency": "predicting tokens by their frequency",
    "chance": "all classes equally likely",
}
"""None of them needs a model: the first two are for pixels, the next two for tokens, the last for classes."""
