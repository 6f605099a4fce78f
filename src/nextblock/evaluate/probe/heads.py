"""A grid of heads that learn side by side from one encoder's features, each as if it were alone."""

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

from nextblock.config import Attention, ModelConfig
from nextblock.data import keyed_seed
from nextblock.errors import UsageError
from nextblock.evaluate.features import seeded
from nextblock.evaluate.layers import layer_choices
from nextblock.evaluate.metrics import Measures
from nextblock.evaluate.probe.settings import HeadName, ProbeSettings, Schedule
from nextblock.interop.aim import BEST_LAYERS_OF_SIZE
from nextblock.models import EncoderModel, heads
from nextblock.models.heads import FeatureConfig, Head, HeadConfig, Tokens, fitting_heads
from nextblock.models.timm_encoder import TimmConfig
from nextblock.optim import lr_at, parameter_groups

log = logging.getLogger(__name__)

ATTENTION_HEADS, QUERIES = 16, 32
"""Of official XTRA's attentive heads, and of the published ep head, at every width."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A head to train."""

    head: HeadName
    config: HeadConfig | None
    """None on a baseline that is no encoder."""
    lr: float
    weight_decay: float

    @property
    def features(self) -> FeatureConfig | None:
        """What it sees of the encoder."""
        return self.config and self.config.features

    def row(self) -> dict[str, Any]:
        """Its settings as values of a table."""
        one = self.config
        return {
            "head": self.head,
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "layers": list(one.layers) if one else [],
            "attention": one and one.attention,
            "tokens": one and one.tokens,
        }

    def create(self, dim: int, num_classes: int, seed: int) -> Head:
        """A fresh head for features `dim` wide; its weights depend on seed, kind and size."""
        with seeded(keyed_seed(seed, "probe head", get_args(heads.HeadName).index(self.head))):
            if self.config is None:
                return heads.LinearHead(dim, num_classes)
            return heads.create_head(self.config, dim)


def encoder_candidates(config: ProbeSettings, model: EncoderModel, num_classes: int) -> tuple[Candidate, ...]:
    """All heads to train on an encoder, kind after kind; `UsageError` if it lacks what they need."""
    recipe, encoder, found = config.resolved(), model.config, []
    # For timm's encoders native and full are the same: of both the first competes.
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
        # A recipe may offer "best", which other sizes go without.
        words = [word for word in recipe.layers[head] if word != "best" or best is not None]
        layers = dict.fromkeys(chosen for one in words for chosen in layer_choices(one, encoder.depth, best))
        # A class token is one vector an image: there is nothing for a query to choose among.
        tokens: list[Tokens] = [one for one in config.tokens if one != "class" or head == "linear"]
        num_heads = _attention_heads(config, model) if head == "attentive" else 1
        num_queries = fitting_heads(encoder.embed_dim, QUERIES) if head == "ep" else 1
        for attention, seen, chosen in product(attentions, tokens, layers):
            made = HeadConfig(
                kind=head,
                num_classes=num_classes,
                layers=chosen,
                attention=attention,
                tokens=seen,
                num_heads=num_heads,
                num_queries=num_queries,
                bias=recipe.bias,
            )
            made.check_encoder(encoder.depth, has_class_token=encoder.has_class_token)
            found += [
                Candidate(head=head, config=made, lr=lr, weight_decay=decay)
                for decay, lr in product(recipe.weight_decay[head], recipe.lr)
            ]
    return tuple(found)


def _attention_heads(config: ProbeSettings, model: EncoderModel) -> int:
    """Attention heads of an attentive head: as given, or the most that the width can be divided among."""
    width, wanted = model.config.embed_dim, ATTENTION_HEADS
    if config.attentive_heads is not None:
        heads.check_attention_heads(width, config.attentive_heads)
        return config.attentive_heads
    if config.resolved().encoder_heads:
        if isinstance(model.config, ModelConfig):
            wanted = model.config.num_heads
        else:
            numbers = (getattr(module, "num_heads", None) for module in model.encoder.modules())
            wanted = next((number for number in numbers if isinstance(number, int)), wanted)
    fitting = fitting_heads(width, wanted)
    if fitting != wanted:
        log.info("%d channels do not divide by %d: attentive heads have %d", width, wanted, fitting)
    return fitting


def baseline_candidates(config: ProbeSettings) -> tuple[Candidate, ...]:
    """The linear heads to train on vectors that no encoder made."""
    recipe = config.resolved()
    grid = product(recipe.weight_decay["linear"], recipe.lr)
    return tuple(Candidate(head="linear", config=None, lr=lr, weight_decay=decay) for decay, lr in grid)


# ------------------------------------------------------------------------------------------------ the grid


class Grid(nn.Module):
    """Heads in training; what each learns is, bit for bit, what it would learn alone.

    `columns` says for each head which of a batch's features it sees. `state_dict` holds what was learned.
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
        # The batch norms have no weights, so those of the heads that see the same features are equal: they
        # leave the heads until the end, and run once for all of them.
        self.norms = nn.ModuleDict({str(k): head.norm for k, head in zip(columns, members, strict=True)})
        for head in members:
            head.norm = nn.Identity()
        self.members = nn.ModuleList(members)
        groups = [
            {**group, "head": number}
            for number, (head, one) in enumerate(zip(members, candidates, strict=True))
            for group in parameter_groups(head, one.weight_decay)
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=config.resolved().betas, fused=True)
        self.train()

    def learn(
        self, features: Sequence[Float[Tensor, "b ..."]], labels: Int64[Tensor, " b"], step: int
    ) -> None:
        """Take one step of all heads on a batch."""
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
        # Official training accumulates large batches from parts, each normalized by itself.
        parts = max(1, len(labels) // (self._config.norm_batch_size or len(labels)))
        normed = {
            k: torch.cat([heads.normalized(part, norm) for part in features[int(k)].tensor_split(parts)])
            if parts > 1
            else heads.normalized(features[int(k)], norm)
            for k, norm in self.norms.items()
        }
        # No head sees another's weights, so the gradient of the sum is each head's own. One that diverges
        # adds NaN to the sum, which nobody reads, and to no other head's gradient.
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
        """Give every head its norm back, and set it to evaluation."""
        for head, column in zip(self.members, self._columns, strict=True):
            head.norm = deepcopy(self.norms[str(column)])
        self.eval()


# -------------------------------------------------------------------------------------------- the best heads

STEP_OUT = 2.0
"""Learning rates beyond the ends of a grid."""


@dataclass
class Trained:
    """A trained head; its score is on the images to choose on, None if there was nothing to choose."""

    candidate: Candidate
    head: Head
    is_diverged: bool
    score: Measures | None = None


def choose(encoder: str, trained: Sequence[Trained]) -> dict[HeadName, int]:
    """The best of each kind, by its number: highest top-1, then lowest loss, then the first.

    Raises `UsageError` if all heads of a kind diverged.
    """
    found: dict[HeadName, int] = {}
    kinds: list[HeadName] = list(dict.fromkeys(one.candidate.head for one in trained))
    for kind in kinds:
        of_kind = [i for i, one in enumerate(trained) if one.candidate.head == kind]
        alive = {i: trained[i].score for i in of_kind if not trained[i].is_diverged}
        if not alive:
            raise UsageError(diverged(encoder, [trained[i].candidate for i in of_kind]))
        found[kind] = max(alive, key=lambda i: (s.top1, -s.loss) if (s := alive[i]) else (0.0, 0.0))
    return found


def diverged(encoder: str, candidates: Sequence[Candidate]) -> str:
    """What to say if all of these diverged."""
    rates = ", ".join(f"{lr:g}" for lr in dict.fromkeys(one.lr for one in candidates))
    return f"{encoder}: the {candidates[0].head} head diverged at learning rate {rates}; use a lower --lr"


def beyond(
    trained: Sequence[Trained], winners: dict[HeadName, int], config: ProbeSettings
) -> list[Candidate]:
    """Two more learning rates for each winner whose rate is the smallest or largest tried; none if given."""
    further = []
    for kind, i in winners.items() if config.lr is None else ():
        best, score = trained[i].candidate, trained[i].score
        rates = sorted({one.candidate.lr for one in trained if one.candidate.head == kind})
        if score is None or score.top1 == 1:  # it cannot get better
            continue
        if best.lr == rates[-1]:
            further += [replace(best, lr=best.lr * factor) for factor in (STEP_OUT, STEP_OUT**2)]
        elif best.lr == rates[0]:
            lower = [best.lr / factor for factor in (STEP_OUT, STEP_OUT**2)]
            further += [replace(best, lr=lr) for lr in lower if lr > config.end_lr]
    return further


def rate_notes(grid: Sequence[Mapping[str, Any]], given: Sequence[float]) -> list[str]:
    """What to know about learning rates: extended beyond those given, best at an end, diverged.

    `grid` has a row for each head, as in a probe's facts.
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
        is_inside = any(row["top1"] == top1 and rates[0] < row["lr"] < rates[-1] for row in rows)
        if len(rates) > 1 and best in (rates[0], rates[-1]) and not is_inside:
            at_end.append(f"{encoder} {head} {best:g}")
        if diverged:
            lost.append(f"{encoder} {head} at {', '.join(f'{lr:g}' for lr in diverged)}")
    sentences = {
        "The grid of learning rates was extended, as the best was at its end: {}.": extended,
        "The best learning rate is at the end of those tried: {}. Try more with probe --lr.": at_end,
        "Diverged: {}.": lost,
    }
    return [sentence.format("; ".join(found)) for sentence, found in sentences.items() if found]
