"""Small, valid results that tests start from."""

import pytest

from llmfast.measure.results import Env, Row, Run

ENV = Env(
    gpu="NVIDIA H100 80GB HBM3",
    driver="580.1",
    torch="2.11.0+cu130",
    triton="3.6.0",
    transformers="5.17.0",
    llmfast="0.1.0",
    commit="1f2e3d4c5b6a",
    date="2026-11-21T22:51:01Z",
)


@pytest.fixture
def env():
    return ENV


@pytest.fixture
def make_row():
    def make(value=10.0, case="op=rms_norm tokens=1", impl="llmfast", metric="us", unit="us"):
        return Row(case, impl, metric, unit, value, value - 1, value + 1, 50)

    return make


@pytest.fixture
def make_run(env, make_row):
    def make(*rows, id="a", env=env):
        return Run(id, env, rows or (make_row(),))

    return make


@pytest.fixture
def copy_row(make_row):
    return make_row(3000.0, case="op=copy", impl="torch", metric="gb_per_s", unit="GB/s")
