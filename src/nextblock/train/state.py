"""Checkpoints of a run: full weights, and the state to resume on any number of processes.

`step_00001234/` contains `model.safetensors` (full encoder and predictor), AdamW's state by parameter
(`optimizer.safetensors`), `state.json` (step, gradient scaler, metrics since the last line) and
`checksums.json`. For a sharded model every rank writes its part of AdamW's state to `optimizer/` with
torch.distributed.checkpoint.
"""

from __future__ import annotations

import json
import logging
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from nextblock.atomic import remove, write_aside, writing
from nextblock.checkpoint import (
    CHECKSUMS_FILE,
    MODEL_FILE,
    CheckpointError,
    checkpoints,
    checksum,
    find_damage,
    save_model,
    write_safetensors,
)
from nextblock.config import DataConfig
from nextblock.interop.files import distributed_reader
from nextblock.models import NextBlockModel
from nextblock.models.heads import ImageClassifier
from nextblock.settings import require
from nextblock.train.distributed import ALONE, Group
from nextblock.train.parallel import full_weights

log = logging.getLogger(__name__)

OPTIMIZER_FILE = "optimizer.safetensors"
OPTIMIZER_DIR = "optimizer"
STATE_FILE = "state.json"
KINDS = ("exp_avg", "exp_avg_sq", "step")
"""AdamW's state of a parameter."""


class Snapshot(NamedTuple):
    """Content of a checkpoint, taken by all ranks; for a sharded model, `moments` are this rank's part."""

    model: NextBlockModel | ImageClassifier
    """Used for its settings."""
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    """AdamW's state by parameter and kind ("encoder.norm.weight/exp_avg"), and `Learner.kept`."""
    state: Mapping[str, Any]
    """Serialisable as JSON."""


def take_snapshot(
    model: Any,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    kept: Mapping[str, Tensor],
    *,
    copied: bool = False,
) -> Snapshot:
    """Take the tensors of a model and its optimizer, or CPU copies of them. All ranks must call this."""
    weights, moments = full_weights(model), dict(kept)
    # By parameter name, not by parameter order, so that a checkpoint fits any strategy.
    for name, parameter in model.named_parameters():
        moments |= {f"{name}/{key}": value for key, value in optimizer.state.get(parameter, {}).items()}
    if copied:
        weights, moments = (
            {name: tensor.detach().clone().cpu() for name, tensor in tensors.items()}
            for tensors in (weights, moments)
        )
    return Snapshot(model, weights, moments, state)


class Saver:
    """Writes checkpoints in sequence, optionally in a thread while training continues."""

    def __init__(self, group: Group, *, in_background: bool) -> None:
        self.in_background = in_background
        # The thread's messages must not mix with those of training, so it has its own process group.
        self._group = group.twin() if in_background else group
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, write: Callable[[Group], None]) -> None:
        """Call `write` with its group, now or in the background; call `wait` before."""
        if not self.in_background:
            write(self._group)
            return

        def run() -> None:
            try:
                write(self._group)
            except BaseException as error:
                self._error = error  # raised by `wait`, in the thread that trains

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written, and raise its error if it failed."""
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error


def write_snapshot(
    directory: Path, snapshot: Snapshot, step: int, group: Group, *, data: DataConfig | None = None
) -> Path:
    """Write `directory/step_XXXXXXXX` atomically. All ranks must call this and see the same disk."""
    model, weights, moments, state = snapshot
    target = directory / f"step_{step:08d}"
    # Rank 0 keeps the temporary directory open while all ranks write into it. Closing the stack moves it into
    # place; an error on any rank leaves the block instead, and removes it.
    with ExitStack() as stack:
        aside = None
        with group.together():
            if group.is_main:
                directory.mkdir(parents=True, exist_ok=True)
                aside = stack.enter_context(write_aside(target))
                aside.mkdir()
        aside = group.broadcast(aside)
        with group.together():
            if not aside.is_dir():
                raise CheckpointError(
                    f"{group.name(group.rank)} does not see {aside}, which rank 0 made; --out must be on a "
                    "disk that all hosts share"
                )
        # Each rank reads its files back for checksums: a full or failing disk can leave a file of the right
        # size with wrong bytes.
        sums: dict[str, Any] = {}
        if isinstance(model, FSDPModule):
            # Each rank writes its own shards, and rank 0 also their index, ".metadata".
            with writing(target), _one_failure(group):
                writer = dcp.FileSystemWriter(aside / OPTIMIZER_DIR)
                dcp.save(dict(moments), storage_writer=writer, process_group=group.processes)
            with group.together():
                own = sorted((aside / OPTIMIZER_DIR).glob(f"__{group.rank}_*"))
                sums = {f"{OPTIMIZER_DIR}/{path.name}": checksum(path) for path in own}
        all_sums = {name: one for of_rank in group.gather(sums) for name, one in of_rank.items()}
        with group.together():
            if group.is_main:
                with writing(target):
                    save_model(aside / MODEL_FILE, model, data=data, weights=weights)
                    if not isinstance(model, FSDPModule):
                        write_safetensors(aside / OPTIMIZER_FILE, moments, {"format": "nextblock optimizer"})
                    (aside / STATE_FILE).write_text(json.dumps(dict(state)), encoding="utf-8")
                    for name in (MODEL_FILE, STATE_FILE, OPTIMIZER_FILE, f"{OPTIMIZER_DIR}/.metadata"):
                        if (aside / name).is_file():
                            all_sums[name] = checksum(aside / name)
                    (aside / CHECKSUMS_FILE).write_text(json.dumps(all_sums, indent=1))
                stack.close()  # moves it into place
    return target


def load_state(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, group: Group = ALONE
) -> dict[str, Any]:
    """Load the optimizer's state and return the rest. All ranks must call this; their number may differ."""
    if not (checkpoint / STATE_FILE).is_file():
        raise CheckpointError(
            f"{checkpoint} was written by an earlier version of nextblock, whose runs this version cannot "
            f"resume; train on from its weights: --model.init {checkpoint} with another --out"
        )
    directory, whole_file = checkpoint / OPTIMIZER_DIR, checkpoint / OPTIMIZER_FILE
    with group.together():
        try:
            state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
            require(isinstance(state, dict) and "step" in state, f"{STATE_FILE} is no training state")
            # Of a sharded state only the index is read here; `dcp.load` below reads the tensors.
            reader = distributed_reader(directory) if directory.is_dir() else None
            stored = load_file(whole_file) if reader is None else reader.read_metadata().state_dict_metadata
        except (OSError, ValueError, LookupError, SafetensorError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"cannot resume from {checkpoint} ({' '.join(str(error).split())}); remove it to resume from "
                "the one before"
            ) from error
    loaded: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for kind in KINDS:
            key = f"{name}/{kind}"
            if key not in stored:  # not trained, or no step was made
                continue
            # Sharded like its parameter: `dcp.load` fills these tensors in place with this rank's parts.
            like = parameter.detach() if kind != "step" else torch.zeros((), device=parameter.device)
            if reader is not None:
                loaded[key] = torch.zeros_like(like)
            elif isinstance(like, DTensor):
                # Every rank has read the whole file, so each takes its part without asking another.
                loaded[key] = distribute_tensor(
                    stored[key].to(like.device), like.device_mesh, like.placements, src_data_rank=None
                )
            else:
                loaded[key] = stored[key].to(like.device)
    if reader is not None:
        with _one_failure(group):
            dcp.load(loaded, storage_reader=reader, no_dist=group.size == 1)  # type: ignore[arg-type]
    # Not `optimizer.load_state_dict`, which matches parameters by their position instead of their name.
    for name, parameter in model.named_parameters():
        own = {kind: loaded[f"{name}/{kind}"] for kind in KINDS if f"{name}/{kind}" in loaded}
        if own:
            optimizer.state[parameter] = own
    return state


def find_intact(directory: Path, group: Group = ALONE) -> Path | None:
    """Find the latest undamaged checkpoint to resume from, and rename later ones.

    Raises `CheckpointError` if all are damaged. All ranks must call this, as they share the reading.
    """
    # Latest first, stopping at an undamaged one, as each check reads the whole checkpoint.
    damaged: list[tuple[Path, str]] = []
    intact = None
    for path in reversed(group.broadcast(checkpoints(directory)).values()):
        reports = group.gather(find_damage(path, rank=group.rank, world_size=group.size))
        damage = next((one for one in reports if one is not None), None)
        if damage is None:
            intact = path
            break
        damaged.append((path, damage))
    if damaged and intact is None:
        raise CheckpointError(
            f"all checkpoints in {directory} are damaged: {damaged[0][1]}; restore one, or start over with "
            "--overwrite"
        )
    for path, damage in damaged if group.is_main else ():
        aside = path.with_name(f"damaged_{path.name}")
        log.warning("%s; resuming from the checkpoint before it; renamed to %s", damage, aside.name)
        # Kept, as its weights may still be useful. Its new name is not a checkpoint's, so it is never pruned.
        remove(aside)
        path.rename(aside)
    return intact


@contextmanager
def _one_failure(group: Group) -> Iterator[None]:
    """Turn torch's `CheckpointException` of several ranks, which is not an `Exception`, into one error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            if isinstance(cause, OSError):
                raise cause from error
            raise CheckpointError(f"{group.name(rank)}: {cause}") from error
