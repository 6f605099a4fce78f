"""What all tests share: types checked in every call, one thread, the golden tensors, an order that suits."""

from __future__ import annotations

import functools
import gc
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any, get_type_hints

import jaxtyping
import pytest
from beartype import BeartypeConf, beartype

GOLDEN_DIR = Path(__file__).parent / "golden"
# The longest, which start first, so that no worker is left alone with one at the end.
LONGEST = """
    distributed readme docs compare finetune suite interop_timm data_fuzz train_faults train_exact probe
    interop_onnx monitors data_loader official_classifiers cli data_remote run_dir doctor
""".split()  # noqa: SIM905 - one per line would take a screen

# An int is a float here, as it is for pyright (PEP 484's numeric tower).
check_types = beartype(conf=BeartypeConf(is_pep484_tower=True, violation_type=TypeError))
check_all = jaxtyping.jaxtyped
one_call = check_all("context")


def checked(function: FunctionType) -> Callable[..., Any]:
    """Checks arguments and what is returned, once each; jaxtyping's decorator takes twice as long."""
    try:
        hints = get_type_hints(function, include_extras=True)
    except Exception:  # a name that is imported for pyright alone: jaxtyping checks the others
        return check_all(function, typechecker=check_types)
    if inspect.isgeneratorfunction(function):
        return check_all(function, typechecker=check_types)
    one = FunctionType(function.__code__, function.__globals__, closure=function.__closure__)
    functools.update_wrapper(one, function)
    one.__defaults__, one.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    one.__annotations__ = hints
    return check_types(one)


def at_first_call(function: Any = None, *, typechecker: Any) -> Any:
    """As jaxtyping's decorator, but only what is called is made ready to be checked, and no closure."""
    if function is None:
        return functools.partial(at_first_call, typechecker=typechecker)
    if not isinstance(function, FunctionType):
        return check_all(function, typechecker=typechecker)
    if "<locals>" in function.__qualname__:  # made anew at each call, which is too often
        return function
    made = None

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        __tracebackhide__ = True
        nonlocal made
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **options)
        if made is None:
            made = checked(function)
        with one_call:  # a dimension's name stands for one size in one call
            return made(*args, **options)

    return call


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput"):
        return  # this process only hands tests to others
    # Before the hook, as all that is first imported under it is compiled anew.
    import sklearn.linear_model  # noqa: F401
    import timm  # noqa: F401
    import torch._dynamo

    assert "nextblock" not in sys.modules, "imported too early to be checked"
    jaxtyping._decorator.jaxtyped = jaxtyping.jaxtyped = at_first_call
    jaxtyping.install_import_hook("nextblock", f"{__name__}.check_types")
    torch.set_num_threads(1)  # tiny models gain nothing from more, and test workers share the cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported is never garbage


@pytest.fixture(autouse=True, scope="session")
def _own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _same_default_dtype() -> Iterator[None]:
    import torch

    before = torch.get_default_dtype()
    yield
    after = torch.get_default_dtype()
    torch.set_default_dtype(before)
    assert after == before, f"the test left torch's default dtype at {after}; it was {before}"


@pytest.fixture
def coarse_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures at 40 dots an inch, where nobody looks at them."""
    from matplotlib.figure import Figure

    savefig = Figure.savefig
    coarse = {"dpi": 40}
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **how: savefig(self, file, **{**how, **coarse}))


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder of the reference weights and tensors."""
    return GOLDEN_DIR


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, Any]]:
    """`golden("xtra_k2")` -> the tensors of tests/golden/xtra_k2.safetensors, fresh at each call."""
    from safetensors.torch import load_file

    return lambda name: load_file(GOLDEN_DIR / f"{name}.safetensors")


@pytest.fixture(scope="session")
def golden_metadata() -> Callable[[str], dict[str, str]]:
    """`golden_metadata("xtra_k2")` -> what the same file says about its tensors, as text."""
    from safetensors import safe_open

    def read(name: str) -> dict[str, str]:
        with safe_open(GOLDEN_DIR / f"{name}.safetensors", framework="pt") as file:
            return file.metadata()

    return read
