"""Fixtures that tell if a call ran on the executor, and why not."""

import logging

import pytest

from llmfast.runner.generate.batch import StaticBatch


@pytest.fixture
def started(monkeypatch):
    """How batches were started, a dictionary for each: whether the host samples, and keywords."""
    calls = []
    start = StaticBatch.start

    def count(self, input_ids, lengths, new_tokens, sampling, *args, **kwargs):
        calls.append(kwargs | {"host_samples": sampling is None})
        return start(self, input_ids, lengths, new_tokens, sampling, *args, **kwargs)

    monkeypatch.setattr(StaticBatch, "start", count)
    return calls


@pytest.fixture
def reasons(caplog):
    """A function: why calls went to the original, as far as it was logged."""
    caplog.set_level(logging.WARNING, "llmfast")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "llmfast"]
