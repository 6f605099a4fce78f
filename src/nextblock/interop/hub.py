"""The Hugging Face hub: `hf:USER/NAME` as a place to read weights from and to write them to.

What is fetched lies in huggingface_hub's own cache, so `HF_HOME`, `HF_HUB_OFFLINE` and `HF_TOKEN` work as
everywhere. Whatever goes wrong is one line with its cause and what to do.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, errors, snapshot_download

__all__ = ["HUB_SPEC", "HubError", "fetch", "hub_errors", "is_hub_spec", "push"]

HUB_SPEC = "hf:"
FETCHED = ("config.json", "*.safetensors", "*.bin", "*.pth", "*.ckpt", "README.md")


class HubError(RuntimeError):
    """The hub did not give or take what was asked; the message says why and what to do."""


def is_hub_spec(src: str | Path) -> bool:
    """Whether this names a repository of the hub: "hf:USER/NAME", or "hf:USER/NAME@REVISION"."""
    return str(src).startswith(HUB_SPEC)


def fetch(spec: str) -> Path:
    """Bring a model repository's configuration, weights and card into the cache; the folder they lie in.

    Files that are there already are not fetched again, and with `HF_HUB_OFFLINE=1` nothing is asked of the
    network.
    """
    repo, revision = _parts(spec)
    with hub_errors(spec):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(FETCHED)))


def push(folder: Path, spec: str) -> str:
    """Upload a folder as one commit to a model repository, made if need be; returns its address."""
    repo, revision = _parts(spec)
    if revision is not None:
        raise ValueError(f"{spec} names a revision; weights are pushed to the main branch: hf:{repo}")
    with hub_errors(spec):
        api = HfApi()
        address = api.create_repo(repo, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id, folder_path=folder, commit_message="Upload weights by nextblock"
        )
    return str(address)


@contextmanager
def hub_errors(spec: str) -> Iterator[None]:
    """Turn what the hub's client raises into one line: the cause, and the remedy.

    A line in the log for every request is of use to nobody here, and kept back.
    """
    log_in = "log in by `hf auth login`, or set HF_TOKEN"
    try:
        with _without_requests_log():
            yield
    except errors.HFValidationError as error:
        raise ValueError(f"{spec} is no name of a repository; write hf:USER/NAME") from error
    except errors.GatedRepoError as error:
        raise HubError(f"{spec} is gated: accept its terms on huggingface.co, then {log_in}") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{spec} is not on the hub, or is private: check its name; if it is private, {log_in}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{spec} has no such revision: check what follows the @") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise HubError(
            f"{spec} is not in the cache, and the hub could not be asked for it: connect to the network and "
            "unset HF_HUB_OFFLINE, or give the path of a copy"
        ) from error
    except (errors.HfHubHTTPError, errors.HTTPError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise HubError(
                f"the hub refuses {spec} (status {status}): {log_in}, with write access"
            ) from error
        reason = " ".join(str(error).split())[:200]
        raise HubError(
            f"the hub failed for {spec} ({type(error).__name__}: {reason}); try it again"
        ) from error


@contextmanager
def _without_requests_log() -> Iterator[None]:
    clients = [logging.getLogger(name) for name in ("httpx", "httpx2")]
    before = [client.level for client in clients]
    for client in clients:
        client.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for client, level in zip(clients, before, strict=True):
            client.setLevel(level)


def _parts(spec: str) -> tuple[str, str | None]:
    """Repository and revision of "hf:USER/NAME[@REVISION]"."""
    repo, at, revision = spec.removeprefix(HUB_SPEC).partition("@")
    if repo.count("/") != 1 or not all(repo.split("/")) or (at and not revision):
        raise ValueError(f"{spec} is no name of a repository; write hf:USER/NAME or hf:USER/NAME@REVISION")
    return repo, revision or None
