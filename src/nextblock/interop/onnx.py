"""ONNX export of an encoder or classifier, verified with onnxruntime before it is kept."""

from __future__ import annotations

import importlib
import json
import logging
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nextblock.atomic import write_aside
from nextblock.checkpoint import CheckpointError
from nextblock.config import Attention, DataConfig, Size, pair
from nextblock.interop.cards import Provenance
from nextblock.interop.timm import data_at, encoder_at
from nextblock.logs import muted
from nextblock.models import NextBlockModel
from nextblock.models.heads import ImageClassifier, pool_features
from nextblock.settings import require, to_dict

# Version of the ONNX operators; onnxruntime 1.14 and later have it.
OPSET = 18
# Largest allowed difference from torch, relative to the largest output.
TOLERANCE = 1e-4
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
TALKATIVE = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


class OnnxError(RuntimeError):
    """A graph could not be exported, or its outputs differ from the model's."""


class _Graph(nn.Module):
    """The exported module: returns tokens, the chosen layers, and a classifier's logits."""

    def __init__(
        self, encoder: NextBlockModel, layers: Sequence[int], classifier: ImageClassifier | None
    ) -> None:
        super().__init__()
        self.encoder, self.layers, self.classifier = encoder, layers, classifier
        self.names = ["tokens", *(f"layer_{layer}" for layer in layers), *(["logits"] if classifier else [])]

    def forward(self, images: Float[Tensor, "b c h w"]) -> tuple[Tensor, ...]:
        # One encoder pass serves all outputs. The encoder already has the mask that the head was trained on.
        encoded = self.encoder.encode(images)
        outputs = [encoded.tokens, *(encoded.layers[layer] for layer in self.layers)]
        if self.classifier is not None:
            features = self.classifier.head_config.features
            outputs.append(self.classifier.head(pool_features(encoded, features, self.encoder.final_norm)))
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
    """Write `path`; return the largest difference from torch, relative to the largest output.

    The batch size is free, the image size fixed. A block mask is part of the graph. Outputs are `tokens`, one
    for each of `layers` (`layer_3`, counted from 0) and a classifier's `logits`. The metadata contains the
    settings and the normalisation. Above torch's limit for one file, weights are in `NAME.onnx.data`. Raises
    `OnnxError` if a package is missing or the outputs differ.
    """
    try:
        for package in PACKAGES:
            importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise OnnxError(f"writing ONNX needs {error.name}: pip install {' '.join(PACKAGES)}") from error
    classifier, source = None, model
    if isinstance(model, ImageClassifier):
        classifier, source, own = model, model.encoder_model, model.head_config.attention
        require(
            attention in ("native", own),
            f"attention {attention}: this classifier's head is made for {own!r}; leave it out",
        )
        attention = own
    assert isinstance(source, NextBlockModel)
    layers, depth = tuple(layers or ()), source.config.depth
    require(
        len(set(layers)) == len(layers) and all(0 <= layer < depth for layer in layers),
        f"layers {list(layers)}: name layers from 0 to {depth - 1}, each once",
    )
    # The image size is fixed, so positions and mask are computed for it and become constants.
    graph = _Graph(encoder_at(source, image_size, attention), layers, classifier).eval()
    config = graph.encoder.config
    # Three batch sizes: the first is traced, the others verify that the batch size is really free.
    generator, shape = torch.Generator().manual_seed(0), (config.in_chans, *pair(config.image_size))
    batches = [torch.randn(b, *shape, generator=generator) for b in (2, 1, 3)]
    # Users cannot act on the exporter's notes and warnings; its errors are raised.
    with muted(logging.ERROR, *TALKATIVE), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                graph,
                (batches[0],),
                dynamo=True,
                input_names=["images"],
                output_names=graph.names,
                # Only the batch size is free. In the example it must not be 1: that would become a constant.
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                opset_version=OPSET,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = " ".join(str(error.__cause__ or error).split())[:300]
            raise OnnxError(f"torch cannot export this model as ONNX: {reason}") from error
        assert program is not None
        # Users of the graph may have only this file, so it records crop, normalisation, origin and licence.
        data = data_at(data, source.config, config)
        program.model.metadata_props.update(
            producer="nextblock",
            mean=json.dumps(list(data.mean)),
            std=json.dumps(list(data.std)),
            resize_px=str(data.resize_px(config.image_size)),
            crop=data.val_crop,
            image_size=json.dumps(list(pair(config.image_size))),
            attention=config.feature_attention,
            config=json.dumps(to_dict(config)),
            origin=provenance.origin,
            license=provenance.license,
        )
        try:
            # Written to a temporary directory, verified with onnxruntime, and only then moved: a wrong graph
            # never gets the final name.
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as aside:
                program.save(Path(aside) / path.name)
                # The exporter has not seen two of these batch sizes.
                difference = _difference(graph, Path(aside) / path.name, batches)
                if not difference <= TOLERANCE:
                    raise OnnxError(
                        f"onnxruntime differs from torch by {difference:.1e} of the largest output, more "
                        f"than {TOLERANCE:.0e}; nothing was written. Try other versions of both"
                    )
                # Weights are moved first, so a graph that exists is complete.
                for file in sorted(Path(aside).iterdir(), reverse=True):
                    with write_aside(path.with_name(file.name)) as target:
                        file.replace(target)
        except OSError as error:
            raise CheckpointError(
                f"could not write {path}: {error}. Make room on the disk, or choose another place, and run "
                "the same command again"
            ) from error
    return difference


def _difference(graph: _Graph, path: Path, batches: Sequence[Tensor]) -> float:
    """Largest difference between onnxruntime and torch, relative to each output's largest value."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = 0.0
    for images in batches:
        actual = session.run(graph.names, {"images": images.numpy()})
        for expected, output in zip(graph(images), actual, strict=True):
            difference = (expected - torch.from_numpy(output)).abs().max() / expected.abs().max()
            worst = max(worst, float(difference.nan_to_num(nan=torch.inf)))  # `max` would skip a NaN
    return worst
