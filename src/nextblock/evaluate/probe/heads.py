"""A grid of heads trained side by side on one encoder's features, each exactly as if alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, get_args

import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from jaxtyping import Float, Int64
from torch import Tensor, nn

from nextblock.config import Attention
from nextblock.data import keyed_seed
from nextblock.errors import UsageError
from nextblock.evaluate.features import layer_choices, seeded
from nextblock.evaluate.metrics import Measures
from nextblock.evaluate.probe.settings import HeadName, ProbeSettings, Schedule
from nextblock.interop.aim import BEST_LAYERS_OF_SIZE
from nextblock.models import EncoderModel, heads
from nextblock.models.heads import FeatureConfig, Head, HeadConfig, Tokens, fitting_heads
from nextblock.models.timm_encoder import TimmConfig
from nextblock.optim import lr_at, parameter_groups

log = logging.getLogger(__name__)

ATTENTION_HEADS, QUERIES = 16, 32
"""Attention heads of official XTRA's attentive head, and queries of the published ep head, at every width."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Settings of one head to train."""

    head: HeadName
    config: HeadConfig | None
    """None for a baseline without an encoder."""
    lr: float
    weight_decay: float

    @property
    def features(self) -> FeatureConfig | None:
        """The features of the encoder that the head sees."""
        return self.config and self.config.features

    def row(self) -> dict[str, Any]:
        """Settings as values of a table."""
        config = self.config
        return {
            "head": self.head,
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "layers": list(config.layers) if config else [],
            "attention": config and config.attention,
            "tokens": config and config.tokens,
        }

    def create(self, dim: int, num_classes: int, seed: int) -> Head:
        """Create a head for features of width `dim`; its weights depend on seed, kind and size."""
        with seeded(keyed_seed(seed, "probe head", get_args(heads.HeadName).index(self.head))):
            if self.config is not None:
                return heads.create_head(self.config, dim)
            return heads.LinearHead(dim, HeadConfig(kind="linear", num_classes=num_classes, layers=(0,)))


def encoder_candidates(config: ProbeSettings, model: EncoderModel, num_classes: int) -> tuple[Candidate, ...]:
    """List the heads to train on an encoder, kind by kind; `UsageError` if it lacks what they need."""
    recipe, encoder, candidates = config.resolved(), model.config, []
    # For timm's encoders, native and full attention are the same: keep the first of the two.
    attentions: list[Attention] = list(config.attention)
    if isinstance(encoder, TimmConfig) and {"native", "full"} <= set(attentions):
        attentions.remove(max("native", "full", key=attentions.index))
    best = BEST_LAYERS_OF_SIZE.get((encoder.embed_dim, encoder.depth))
    if best is None and config.layers is not None and "best" in config.layers:
        sizes = ", ".join(f"{width} x {layers}" for width, layers in BEST_LAYERS_OF_SIZE)
        raise UsageError(
            f"the best layers are known for AIM's sizes only (width x layers: {sizes}), not for "
            f"{encoder.embed_dim} x {encoder.depth}; use --layers each, or name them: 3+4+5"
        )
    for head in config.heads:
        # The recipe's "best" is skipped for sizes other than AIM's.
        words = [word for word in recipe.layers[head] if word != "best" or best is not None]
        layers = dict.fromkeys(chosen for w in words for chosen in layer_choices(w, encoder.depth, best))
        # A class token is one vector per image, so a query has nothing to choose among.
        tokens: list[Tokens] = [token for token in config.tokens if token != "class" or head == "linear"]
        num_heads = _attention_heads(config, model) if head == "attentive" else 1
        num_queries = fitting_heads(encoder.embed_dim, QUERIES) if head == "ep" else 1
        for attention, seen, chosen in product(attentions, tokens, layers):
            head_config = HeadConfig(
                kind=head,
                num_classes=num_classes,
                layers=chosen,
                attention=attention,
                tokens=seen,
                num_heads=num_heads,
                num_queries=num_queries,
                bias=recipe.bias,
            )
            head_config.check_encoder(encoder.depth, has_class_token=encoder.has_class_token)
            candidates += [
                Candidate(head=head, config=head_config, lr=lr, weight_decay=decay)
                for decay, lr in product(recipe.weight_decay[head], recipe.lr)
            ]
    return tuple(candidates)


def _attention_heads(config: ProbeSettings, model: EncoderModel) -> int:
    """Attention heads of an attentive head: as given, or the largest number that fits the width."""
    width, wanted = model.config.embed_dim, ATTENTION_HEADS
    if config.attentive_heads is not None:
        heads.check_attention_heads(width, config.attentive_heads)
        return config.attentive_heads
    if config.resolved().encoder_heads:
        numbers = (getattr(module, "num_heads", None) for module in model.encoder.modules())
        wanted = next((number for number in numbers if isinstance(number, int)), wanted)
    fitting = fitting_heads(width, wanted)
    if fitting != wanted:
        log.info("width %d is not divisible by %d: attentive heads use %d", width, wanted, fitting)
    return fitting


def baseline_candidates(config: ProbeSettings) -> tuple[Candidate, ...]:
    """List the linear heads to train on a baseline without an encoder."""
    recipe = config.resolved()
    grid = product(recipe.weight_decay["linear"], recipe.lr)
    return tuple(Candidate(head="linear", config=None, lr=lr, weight_decay=decay) for decay, lr in grid)


# ------------------------------------------------------------------------------------------------ the grid


class Grid(nn.Module):
    """Heads trained together, each bit for bit as if alone.

    `columns` contains, for each head, the index of the features that it sees.
    """

    def __init__(
        self,
        members: Sequence[Head],
        candidates: Sequence[Candidate],
        columns: Sequence[int],
        config: ProbeSettings,
        schedule: Schedule,
    ) -> None:
        super().__init__()
        self._candidates, self._columns = candidates, columns
        self._config, self._schedule = config, schedule
        # The batch norms have no weights, so heads that see the same features have equal norms. One norm runs
        # for all heads of a column, until `finish` gives the norms back.
        self.norms = nn.ModuleDict({str(k): head.norm for k, head in zip(columns, members, strict=True)})
        for head in members:
            head.norm = nn.Identity()
        self.members = nn.ModuleList(members)
        groups = [
            {**group, "head": number}
            for number, (head, candidate) in enumerate(zip(members, candidates, strict=True))
            for group in parameter_groups(head, candidate.weight_decay)
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=config.resolved().betas, fused=True)
        self.train()

    def learn(
        self, features: Sequence[Float[Tensor, "b ..."]], labels: Int64[Tensor, " b"], step: int
    ) -> None:
        """Train all heads for one step on a batch."""
        for group in self.optimizer.param_groups:
            peak = self._candidates[group["head"]].lr
            group["lr"] = lr_at(
                step,
                peak=peak,
                start=peak / 10,
                end=self._config.end_lr,
                warmup_steps=self._schedule.warmup_steps,
                total_steps=self._schedule.steps,
            )
        # Official training accumulates large batches from parts that are normalized separately.
        parts = max(1, len(labels) // (self._config.norm_batch_size or len(labels)))
        normed = {
            k: torch.cat([heads.normalized(part, norm) for part in features[int(k)].tensor_split(parts)])
            if parts > 1
            else heads.normalized(features[int(k)], norm)
            for k, norm in self.norms.items()
        }
        # Heads share no weights, so the sum's gradient with respect to a head is that head's own. A diverged
        # head makes the sum NaN, which is never read, and leaves the other gradients alone.
        losses = [
            F.cross_entropy(head(normed[str(k)]), labels)
            for head, k in zip(self.members, self._columns, strict=True)
        ]
        torch.stack(losses).sum().backward()
        if self._config.clip_grad is not None:
            for head in self.members:
                nn.utils.clip_grad_norm_(head.parameters(), self._config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def finish(self) -> None:
        """Give every head its norm back, and switch to evaluation mode."""
        for head, column in zip(self.members, self._columns, strict=True):
            head.norm = deepcopy(self.norms[str(column)])
        self.eval()


# -------------------------------------------------------------------------------------------- the best heads


@dataclass
class Trained:
    """A trained head; `score` is measured on the images to choose on, if there are any."""

    candidate: Candidate
    head: Head
    score: Measures | None = None

    def __post_init__(self) -> None:
        self.is_diverged = not all(tensor.isfinite().all() for tensor in self.head.state_dict().values())


def choose(encoder: str, trained: Sequence[Trained]) -> dict[HeadName, int]:
    """Choose the best head of each kind, as an index: highest top-1, then lowest loss, then the first.

    Raises `UsageError` if all heads of a kind diverged.
    """
    best: dict[HeadName, int] = {}
    kinds: list[HeadName] = [item.candidate.head for item in trained]
    for kind in dict.fromkeys(kinds):
        of_kind = [i for i in range(len(kinds)) if kinds[i] == kind]
        finite = {i: trained[i].score for i in of_kind if not trained[i].is_diverged}
        if not finite:
            raise UsageError(diverged(encoder, [trained[i].candidate for i in of_kind]))
        best[kind] = max(finite, key=lambda i: (s.top1, -s.loss) if (s := finite[i]) else (0.0, 0.0))
    return best


def diverged(encoder: str, candidates: Sequence[Candidate]) -> str:
    """Error message for candidates that all diverged."""
    rates = ", ".join(f"{lr:g}" for lr in dict.fromkeys(candidate.lr for candidate in candidates))
    return f"{encoder}: the {candidates[0].head} head diverged at learning rate {rates}; use a lower --lr"


def beyond(
    trained: Sequence[Trained], winners: dict[HeadName, int], config: ProbeSettings
) -> list[Candidate]:
    """Two more learning rates for each winner with the smallest or largest rate; none if `lr` is given."""
    further = []
    for kind, i in winners.items() if config.lr is None else ():
        best, score = trained[i].candidate, trained[i].score
        if score is None or score.top1 == 1:  # nothing to choose by, or nothing to improve
            continue
        # The grid is extended at one end by two rates at once, as heads train together at little more cost.
        rates = [item.candidate.lr for item in trained if item.candidate.head == kind]
        if best.lr == max(rates):
            further += [replace(best, lr=best.lr * factor) for factor in (2, 4)]
        elif best.lr == min(rates):
            further += [replace(best, lr=lr) for lr in (best.lr / 2, best.lr / 4) if lr > config.end_lr]
    return further


def rate_notes(grid: Sequence[Mapping[str, Any]], given: Sequence[float]) -> list[str]:
    """Sentences about learning rates: extended, best at the end of the grid, diverged.

    `grid` has one row per head, as in a probe's facts.
    """
    extended, at_end, lost = [], [], []
    for encoder, head in dict.fromkeys((row["encoder"], row["head"]) for row in grid):
        rows = [row for row in grid if (row["encoder"], row["head"]) == (encoder, head)]
        rates = sorted({row["lr"] for row in rows})
        best = next(row["lr"] for row in rows if row["is_winner"])
        diverged = sorted({row["lr"] for row in rows if row["is_diverged"]})
        if len(rates) > len(given):
            extended.append(f"{encoder} {head} {rates[0]:g} … {rates[-1]:g}")
        top1 = max(row["top1"] or 0 for row in rows)
        # A rate inside the grid that is as good shows that the end is no limit.
        is_inside = any(row["top1"] == top1 and rates[0] < row["lr"] < rates[-1] for row in rows)
        if len(rates) > 1 and best in (rates[0], rates[-1]) and not is_inside:
            at_end.append(f"{encoder} {head} {best:g}")
        if diverged:
            lost.append(f"{encoder} {head} at {', '.join(f'{lr:g}' for lr in diverged)}")
    sentences = {
        "The grid of learning rates was extended because the best was at its end: {}.": extended,
        "The best learning rate is at the end of those tried: {}. Try more with probe --lr.": at_end,
        "Diverged: {}.": lost,
    }
    return [sentence.format("; ".join(cases)) for sentence, cases in sentences.items() if cases]
