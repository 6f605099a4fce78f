"""What all tests share: shapes checked in every call, one thread, the golden tensors.

The import hook must be there before any test imports nextblock, or the annotations go unchecked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch
from beartype import BeartypeConf, beartype
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

GOLDEN_DIR = Path(__file__).parent / "golden"

# An int is a float here, as it is for pyright (PEP 484's numeric tower).
check_types = beartype(conf=BeartypeConf(is_pep484_tower=True))

assert "nextblock" not in sys.modules, "imported too early to be checked"
jaxtyping.install_import_hook("nextblock", f"{__name__}.check_types")

torch.set_num_threads(1)  # tiny models gain nothing from more, and test workers share the cores


@pytest.fixture(autouse=True, scope="session")
def _own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _same_default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    after = torch.get_default_dtype()
    torch.set_default_dtype(before)
    assert after == before, f"the test left torch's default dtype at {after}; it was {before}"


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder of the reference weights and tensors."""
    return GOLDEN_DIR


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Tensor]]:
    """`golden("xtra_k2")` -> the tensors of tests/golden/xtra_k2.safetensors, fresh at each call."""
    return lambda name: load_file(GOLDEN_DIR / f"{name}.safetensors")


@pytest.fixture(scope="session")
def golden_metadata() -> Callable[[str], dict[str, str]]:
    """`golden_metadata("xtra_k2")` -> what the same file says about its tensors, as text."""

    def read(name: str) -> dict[str, str]:
        with safe_open(GOLDEN_DIR / f"{name}.safetensors", framework="pt") as file:
            return file.metadata()

    return read
