"""Errors carry what a caller needs: nobody has to parse their text."""

import pickle

import pytest

import llmfast
from llmfast.errors import ArgumentError


def test_an_argument_error_says_which_argument_and_why():
    with pytest.raises(ArgumentError) as caught:
        llmfast.SamplingParams(top_p=2)
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.operation, error.argument) == ("SamplingParams", "top_p")
    assert error.reason == "must be a number, more than 0 and at most 1; got 2"
    assert str(error) == f"SamplingParams: top_p {error.reason}"
    assert isinstance(error, ValueError)
