"""Run the Triton kernels on the GPU if there is one, else in Triton's interpreter on the CPU."""

import os
from collections.abc import Callable

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when @triton.jit runs, so set before any import


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if HAS_CUDA else "cpu")


@pytest.fixture(scope="session")
def embedded():  # type: ignore[no-untyped-def]
    """Load the embedded model in float32 on the CPU, once.

    A test that changes the model must undo the change, or work on a deepcopy.
    """
    import llmfast
    from llmfast.loading.embedded import INSTALL, embedded_model_path

    if embedded_model_path() is None:
        pytest.skip(f"the embedded model is not installed: {INSTALL}")
    return llmfast.load(device="cpu", dtype=torch.float32)


@pytest.fixture
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new float memory with NaN, so that an unwritten element is seen."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make_nan(*args: object, **kwargs: object) -> torch.Tensor:
        out = make(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    return make_nan


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` on a machine without one."""
    if HAS_CUDA:
        return
    skip = pytest.mark.skip(reason="wants a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
