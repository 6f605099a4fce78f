"""The Hugging Face hub: read weights from `hf:USER/NAME[/FILE][@REVISION]`, write to `hf:USER/NAME`.

Downloads use huggingface_hub's cache, so `HF_HOME`, `HF_HUB_OFFLINE` and `HF_TOKEN` work as usual. Every
error is one line with a cause and a remedy.
"""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, errors, snapshot_download

from nextblock.errors import UsageError
from nextblock.interop.files import WEIGHT_SUFFIXES, choose_weights
from nextblock.logs import muted

HUB_SPEC = "hf:"
# Files fetched with every weight file: its settings, and its card for the licence.
BESIDE = ("config.json", "README.md")


class HubError(RuntimeError):
    """The hub refused or failed a request; the message has the cause and a remedy."""


def is_hub_spec(src: str | Path) -> bool:
    """Whether this names a repository on the hub or a file in one: "hf:USER/NAME[/FILE][@REVISION]"."""
    return str(src).startswith(HUB_SPEC)


def fetch(spec: str) -> Path:
    """Fetch a model repository's weights, configuration and card into the cache and return their folder.

    If there are several weight files, the spec must name one ("hf:USER/NAME/FILE"), and its path is returned.
    Cached files are not fetched again. With `HF_HUB_OFFLINE=1` the network is not used.
    """
    repo, file, revision = _parts(spec)
    with hub_errors(spec):
        try:
            # List the files first, so that only the needed weight file is fetched.
            names = [file.rfilename for file in HfApi().model_info(repo, revision=revision).siblings or ()]
        except errors.HfHubHTTPError:
            raise
        except (errors.HTTPError, OSError):  # without a network, use the cache
            cached = Path(snapshot_download(repo, revision=revision, local_files_only=True))
            names = [path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file()]
        if file is None:
            at = "" if revision is None else f"@{revision}"
            wanted = choose_weights(names, spec, as_named=f"{HUB_SPEC}{repo}/{{}}{at}")
        elif file in names:
            wanted = (file,)
        else:
            listed = ", ".join([name for name in names if name.endswith(WEIGHT_SUFFIXES)][:8]) or "none"
            raise HubError(f"{spec}: there is no file {file} in it; its weight files are: {listed}")
        # Escaped, as a pattern would read brackets in a name as a set of letters.
        patterns = [*map(glob.escape, wanted), *BESIDE]
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    return folder if file is None else folder / file


def push(folder: Path, spec: str) -> str:
    """Upload a folder as one commit to a model repository, created if necessary; return its address."""
    repo, file, revision = _parts(spec)
    if file is not None or revision is not None:
        raise UsageError(f"{spec}: whole directories are pushed, to the main branch: hf:{repo}")
    with hub_errors(spec, instead="a path to write to"):
        api = HfApi()
        address = api.create_repo(repo, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id, folder_path=folder, commit_message="Upload weights by nextblock"
        )
    return str(address)


@contextmanager
def hub_errors(spec: str, *, instead: str = "the path of a copy") -> Iterator[None]:
    """Turn errors of the hub's client into one line with a cause and a remedy.

    `instead` is what the user can give without a network.
    """
    log_in = "log in by `hf auth login`, or set HF_TOKEN"
    try:
        # Nobody needs a log line for every request.
        with muted(logging.WARNING, "httpx", "httpx2"):
            yield
    except errors.HFValidationError as error:
        raise UsageError(f"{spec} is not a repository name; write hf:USER/NAME") from error
    except (errors.HfHubHTTPError, errors.HTTPError, OSError) as error:
        # The client's error classes inherit from each other: a gated repository is also "not found", offline
        # mode also an OSError. So special classes come before general ones.
        offline = "could not be reached, and is not in the cache: connect to the network and unset "
        offline += f"HF_HUB_OFFLINE, or give {instead}"
        reasons: tuple[tuple[Any, str], ...] = (
            (errors.GatedRepoError, f"is gated: accept its terms on huggingface.co, then {log_in}"),
            (
                errors.RepositoryNotFoundError,
                f"is not on the hub, or is private: check its name; if it is private, {log_in}",
            ),
            (errors.RevisionNotFoundError, "has no such revision: check what follows the @"),
            ((errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled), offline),
        )
        status = getattr(getattr(error, "response", None), "status_code", None)
        why = f"failed ({type(error).__name__}: {' '.join(str(error).split())[:200]}); try it again"
        if status in (401, 403):
            why = f"is refused by the hub (status {status}): {log_in}, with write access"
        why = next((reason for kind, reason in reasons if isinstance(error, kind)), why)
        raise HubError(f"{spec} {why}") from error


def _parts(spec: str) -> tuple[str, str | None, str | None]:
    """Split "hf:USER/NAME[/FILE][@REVISION]" into repository, file and revision."""
    path, at, revision = spec.removeprefix(HUB_SPEC).partition("@")
    # If only USER is given, the name becomes empty, which is refused below.
    user, name, *inside = [*path.split("/"), ""] if "/" not in path else path.split("/")
    if not (user and name and all(inside)) or (at and not revision):
        raise UsageError(
            f"{spec} is not a repository name; write hf:USER/NAME[/FILE], with @REVISION for an older one"
        )
    return f"{user}/{name}", "/".join(inside) or None, revision or None
