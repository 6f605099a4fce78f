"""Names of the reference losses in tables and pictures; quick to import."""

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
"""For pixels (zero, copy_previous), tokens (uniform, frequency), classes (chance), vectors (the others)."""
