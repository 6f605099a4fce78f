"""Patch features as colours: their three first principal components as red, green and blue."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from sklearn.decomposition import PCA

QUANTILE = 0.01
"""This share of the patches at either end of a component has the end's colour."""


@dataclass(frozen=True)
class PatchColours:
    """A map from features to colours."""

    mean: Float[np.ndarray, " d"]
    components: Float[np.ndarray, "components d"]
    middle: Float[np.ndarray, " components"]
    """The value of each component that is 0.5."""
    span: float
    """From dark to bright, the same for all: a component that varies less stays nearer to grey."""
    explained: tuple[float, ...]
    """Shares of the features' variance that red, green and blue show."""

    @classmethod
    def fit(cls, features: Float[np.ndarray, "r d"]) -> PatchColours:
        """Fit the map on the features of patches of many images; the same ones give the same colours.

        A component's sign is arbitrary: here its largest weight is positive. The span is the widest range
        that a component has in the patches, without the hundredth at either end.
        """
        pca = PCA(min(3, *features.shape), svd_solver="covariance_eigh").fit(features)
        mean, components = np.asarray(pca.mean_), np.array(pca.components_)
        largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
        components[largest[:, 0] < 0] *= -1
        low, high = np.quantile((features - mean) @ components.T, (QUANTILE, 1 - QUANTILE), axis=0)
        explained = tuple(pca.explained_variance_ratio_.tolist())
        return cls(mean, components, (low + high) / 2, float((high - low).max()), explained)

    def colours(self, features: Float[np.ndarray, "*p d"]) -> Float[np.ndarray, "*p 3"]:
        """Colours of patches, in [0, 1]; a component that does not vary, or is not there, is 0.5."""
        colours = np.full((*features.shape[:-1], 3), 0.5)
        if self.span > 0:
            values = (features - self.mean) @ self.components.T
            colours[..., : len(self.middle)] += (values - self.middle) / self.span
        return colours.clip(0, 1)
