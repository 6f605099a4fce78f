"""The Hugging Face hub: `hf:USER/NAME[/FILE][@REVISION]` to read weights from, `hf:USER/NAME` to write to.

What is fetched lies in huggingface_hub's own cache, so `HF_HOME`, `HF_HUB_OFFLINE` and `HF_TOKEN` work as
everywhere. Whatever goes wrong is one line with its cause and what to do.
"""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, errors, snapshot_download

from nextblock.errors import UsageError
from nextblock.interop.files import WEIGHT_SUFFIXES, choose_weights
from nextblock.logs import muted

HUB_SPEC = "hf:"
# What is fetched with every weight file: its settings, and its card for the licence.
BESIDE = ("config.json", "README.md")
# The model of a checkpoint in a run's directory.
CHECKPOINT = re.compile(r"checkpoints/step_(\d+)/model\.safetensors")


class HubError(RuntimeError):
    """The hub did not give or take what was asked; the message says why and what to do."""


def is_hub_spec(src: str | Path) -> bool:
    """Whether this names a repository of the hub, or a file in one: "hf:USER/NAME[/FILE][@REVISION]"."""
    return str(src).startswith(HUB_SPEC)


def fetch(spec: str) -> Path:
    """Bring a model repository's weights, configuration and card into the cache; the folder they lie in.

    Of several weight files one has to be named ("hf:USER/NAME/FILE"): its path is returned. Files that are
    there already are not fetched again, and with `HF_HUB_OFFLINE=1` nothing is asked of the network.
    """
    repo, file, revision = _parts(spec)
    with hub_errors(spec):
        try:
            # The list of files comes first: of several weight files only the one that is meant is fetched.
            names = [file.rfilename for file in HfApi().model_info(repo, revision=revision).siblings or ()]
        except errors.HfHubHTTPError:
            raise
        except (errors.HTTPError, OSError):  # without a network: what lies in the cache
            cached = Path(snapshot_download(repo, revision=revision, local_files_only=True))
            names = [path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file()]
        if file is None:
            at = "" if revision is None else f"@{revision}"
            wanted = choose_weights(names, spec, as_named=f"{HUB_SPEC}{repo}/{{}}{at}")
            # By number and not by name: step_100000000 comes after step_99999999.
            steps = sorted((int(match[1]), match[0]) for match in map(CHECKPOINT.fullmatch, names) if match)
            wanted = wanted or tuple(name for _, name in steps[-1:])  # of a run, the latest checkpoint
        elif file in names:
            wanted = (file,)
        else:
            listed = ", ".join([name for name in names if name.endswith(WEIGHT_SUFFIXES)][:8]) or "none"
            raise HubError(f"{spec}: there is no file {file} in it; its weight files are: {listed}")
        # A file may have brackets in its name, which a pattern would read as a set of letters.
        patterns = [*map(glob.escape, wanted), *BESIDE]
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    return folder if file is None else folder / file


def push(folder: Path, spec: str) -> str:
    """Upload a folder as one commit to a model repository, made if need be; returns its address."""
    repo, file, revision = _parts(spec)
    if file is not None:
        raise UsageError(f"{spec} names a file; whole directories are pushed: hf:{repo}")
    if revision is not None:
        raise UsageError(f"{spec} names a revision; weights are pushed to the main branch: hf:{repo}")
    with hub_errors(spec, pushing=True):
        api = HfApi()
        address = api.create_repo(repo, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id, folder_path=folder, commit_message="Upload weights by nextblock"
        )
    return str(address)


@contextmanager
def hub_errors(spec: str, *, pushing: bool = False, instead: str = "the path of a copy") -> Iterator[None]:
    """Turn what the hub's client raises into one line: the cause, and the remedy.

    `instead` is what the user can give where there is no network.
    """
    log_in = "log in by `hf auth login`, or set HF_TOKEN"
    try:
        # Nobody needs a log line for every request.
        with muted(logging.WARNING, "httpx", "httpx2"):
            yield
    except errors.HFValidationError as error:
        raise UsageError(f"{spec} is no name of a repository; write hf:USER/NAME") from error
    except (errors.HfHubHTTPError, errors.HTTPError, OSError) as error:
        # The client's errors extend each other: a gated repository counts as not found, and being offline as
        # an OSError. So the special kinds come before the general ones.
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, errors.GatedRepoError):
            why = f"{spec} is gated: accept its terms on huggingface.co, then {log_in}"
        elif isinstance(error, errors.RepositoryNotFoundError):
            why = f"{spec} is not on the hub, or is private: check its name; if it is private, {log_in}"
        elif isinstance(error, errors.RevisionNotFoundError):
            why = f"{spec} has no such revision: check what follows the @"
        elif isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
            what = "is not in the cache, and the hub could not be asked for it"
            what = "cannot be pushed to without a network" if pushing else what
            why = f"{spec} {what}: connect to the network and unset HF_HUB_OFFLINE"
            why += "" if pushing else f", or give {instead}"
        elif status in (401, 403):
            why = f"the hub refuses {spec} (status {status}): {log_in}, with write access"
        else:
            reason = " ".join(str(error).split())[:200]
            why = f"the hub failed for {spec} ({type(error).__name__}: {reason}); try it again"
        raise HubError(why) from error


def _parts(spec: str) -> tuple[str, str | None, str | None]:
    """Repository, file and revision of "hf:USER/NAME[/FILE][@REVISION]"."""
    path, at, revision = spec.removeprefix(HUB_SPEC).partition("@")
    # The empty part makes the name of a lone USER empty, which is refused below.
    user, name, *inside = [*path.split("/"), ""] if "/" not in path else path.split("/")
    if not (user and name and all(inside)) or (at and not revision):
        raise UsageError(
            f"{spec} is no name of a repository; write hf:USER/NAME[/FILE], with @REVISION for an older one"
        )
    return f"{user}/{name}", "/".join(inside) or None, revision or None
