"""Whether a runner took a call, and why not."""

import logging

import pytest

from llmfast.runner.runner import Runner


@pytest.fixture
def started(monkeypatch):
    """What runners were started with, a dictionary for each batch."""
    calls = []
    start = Runner.start

    def count(self, *args, **kwargs):
        calls.append(kwargs)
        return start(self, *args, **kwargs)

    monkeypatch.setattr(Runner, "start", count)
    return calls


@pytest.fixture
def reasons(caplog):
    """A function: why calls went to the original, as far as it was logged."""
    caplog.set_level(logging.WARNING, "llmfast")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "llmfast"]
