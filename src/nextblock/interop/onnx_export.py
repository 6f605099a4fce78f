"""ONNX out: an encoder, or a classifier, as one graph that onnxruntime runs.

The batch is free, the image size fixed. Under causal attention the block mask is part of the graph. What was
written is run by onnxruntime and compared with torch before it takes its place.
"""

from __future__ import annotations

import importlib
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nextblock.atomic import write_aside
from nextblock.checkpoint import CheckpointError
from nextblock.config import Attention, DataConfig, Size, pair
from nextblock.interop.cards import Provenance
from nextblock.interop.files import make_parent, refuse_directory
from nextblock.interop.timm_format import data_at, encoder_at
from nextblock.models import NextBlockModel
from nextblock.models.classifier import ImageClassifier
from nextblock.models.features import pool_features
from nextblock.settings import to_dict

__all__ = ["OPSET", "OnnxError", "write_onnx"]

OPSET = 18
"""Version of the ONNX operators; onnxruntime 1.14 and later have it."""
TOLERANCE = 1e-4
"""Largest difference from torch, over the largest output."""
CHECKED_BATCHES = (1, 3)
EXAMPLE_BATCH = 2
LARGEST_SINGLE_FILE = 1_900_000_000
"""Bytes of weights beyond which they lie in a file of their own: a graph's file holds less than 2 GiB."""
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class OnnxError(RuntimeError):
    """A graph could not be made, or does not compute what the model does."""


class _Outputs(nn.Module):
    """What the graph computes: tokens, the chosen layers, and a classifier's logits."""

    def __init__(
        self, encoder_model: NextBlockModel, layers: Sequence[int], head: ImageClassifier | None
    ) -> None:
        super().__init__()
        self.encoder_model = encoder_model
        self.layers = tuple(layers)
        self.classifier_head = None if head is None else head.head
        self.head_config = None if head is None else head.head_config

    @property
    def names(self) -> list[str]:
        """The outputs' names in order."""
        logits = [] if self.classifier_head is None else ["logits"]
        return ["tokens", *(f"layer_{layer}" for layer in self.layers), *logits]

    def forward(self, images: Float[Tensor, "b c h w"]) -> tuple[Tensor, ...]:
        """The outputs, in the order of `names`."""
        encoded = self.encoder_model.encode(images)
        outputs = [encoded.tokens, *(encoded.layers[layer] for layer in self.layers)]
        if self.classifier_head is not None and self.head_config is not None:
            features = pool_features(encoded, self.head_config.features, self.encoder_model.final_norm)
            outputs.append(self.classifier_head(features))
        return tuple(outputs)


def write_onnx(
    model: NextBlockModel | ImageClassifier,
    path: Path,
    *,
    data: DataConfig,
    provenance: Provenance,
    layers: Sequence[int] | None = None,
    attention: Attention = "native",
    image_size: Size | None = None,
) -> float:
    """Write `path` and return the largest difference from torch, over the largest output.

    Outputs are `tokens`, one for each of `layers` (`layer_3`, counted from 0) and a classifier's `logits`.
    How images are normalised, and all settings, stand in the file's metadata. Weights of 1.9 GB and more lie
    beside the file in `NAME.onnx.data`. Raises `OnnxError` where a package is missing or the outputs differ.
    """
    refuse_directory(path)
    _require_packages()
    outputs = _outputs(model, tuple(layers or ()), attention, image_size).eval()
    config = outputs.encoder_model.config
    example = torch.randn(EXAMPLE_BATCH, config.in_chans, *pair(config.image_size), generator=_generator())
    program = _exported(outputs, example)
    own = model.encoder_model.config if isinstance(model, ImageClassifier) else model.config
    program.model.metadata_props.update(_metadata(outputs, data_at(data, own, config), provenance))
    make_parent(path)
    try:
        return _saved(program, outputs, path)
    except OSError as error:
        raise CheckpointError(
            f"could not write {path}: {error}. Make room on the disk, or choose another place, and run the "
            "same command again"
        ) from error


def _saved(program: Any, outputs: _Outputs, path: Path) -> float:
    """Write the graph aside, compare it with torch, and move it into place; the difference."""
    bytes_of_weights = sum(tensor.nbytes for tensor in outputs.state_dict().values())
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as aside:
        with _quiet():
            program.save(Path(aside) / path.name, external_data=bytes_of_weights > LARGEST_SINGLE_FILE)
        difference = _difference(outputs, Path(aside) / path.name)
        if not difference <= TOLERANCE:
            raise OnnxError(
                f"onnxruntime differs from torch by {difference:.1e} of the largest output, more than "
                f"{TOLERANCE:.0e}; nothing was written. Another version of torch or onnxruntime may help"
            )
        for file in sorted(Path(aside).iterdir(), reverse=True):  # the weights before the graph
            with write_aside(path.with_name(file.name)) as target:
                file.replace(target)
    return difference


def _require_packages() -> None:
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            remedy = f"pip install {' '.join(PACKAGES)}"
            raise OnnxError(f"writing ONNX needs {error.name}: {remedy}") from error


def _outputs(
    model: NextBlockModel | ImageClassifier,
    layers: tuple[int, ...],
    attention: Attention,
    image_size: Size | None,
) -> _Outputs:
    classifier = model if isinstance(model, ImageClassifier) else None
    encoder_model = model.encoder_model if isinstance(model, ImageClassifier) else model
    if classifier is not None and attention not in ("native", classifier.head_config.attention):
        raise ValueError(
            f"attention {attention}: this classifier's head is made for "
            f"{classifier.head_config.attention!r}; leave it"
        )
    depth = encoder_model.config.depth
    if layers and not (min(layers) >= 0 and max(layers) < depth and len(set(layers)) == len(layers)):
        raise ValueError(f"layers {list(layers)}: name layers from 0 to {depth - 1}, each once")
    chosen = classifier.head_config.attention if classifier is not None else attention
    return _Outputs(encoder_at(encoder_model, image_size, chosen), layers, classifier)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _exported(outputs: _Outputs, example: Float[Tensor, "b c h w"]) -> Any:
    """The graph, as torch's exporter gives it; its own failures become one line."""
    try:
        with _quiet(), torch.no_grad():
            return torch.onnx.export(
                outputs,
                (example,),
                dynamo=True,
                input_names=["images"],
                output_names=outputs.names,
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                opset_version=OPSET,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise OnnxError(f"torch cannot export this model as ONNX: {reason}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's warnings and notes, which no user can act on, from the screen; not its errors."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _metadata(outputs: _Outputs, data: DataConfig, provenance: Provenance) -> Mapping[str, str]:
    config = outputs.encoder_model.config
    return {
        "producer": "nextblock",
        "mean": json.dumps(list(data.mean)),
        "std": json.dumps(list(data.std)),
        "resize_px": str(data.val_resize_px),
        "crop": data.val_crop,
        "image_size": json.dumps(list(pair(config.image_size))),
        "attention": config.feature_attention,
        "config": json.dumps(to_dict(config)),
        "origin": provenance.origin,
        "license": provenance.license,
    }


def _difference(outputs: _Outputs, path: Path) -> float:
    """The largest difference between onnxruntime and torch, over each output's largest value."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    config, generator = outputs.encoder_model.config, _generator()
    worst = 0.0
    for batch in CHECKED_BATCHES:
        images = torch.randn(batch, config.in_chans, *pair(config.image_size), generator=generator)
        with torch.no_grad():
            expected = outputs(images)
        found = session.run(outputs.names, {"images": images.numpy()})
        for ours, theirs in zip(expected, found, strict=True):
            difference = (ours - torch.from_numpy(theirs)).abs().max() / ours.abs().max()
            worst = max(worst, float(difference.nan_to_num(nan=torch.inf)))
    return worst
