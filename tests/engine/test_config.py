"""EngineConfig: one declaration of the options that LLM and AsyncLLM take."""

import dataclasses
import subprocess
import sys
import typing

import pytest

import llmfast
from engines import model_of, options
from llmfast import LLM, AsyncLLM, EngineConfig
from llmfast.engine.config import EngineOptions


def test_options_are_the_attributes_of_the_config():
    fields = {field.name: field.type for field in dataclasses.fields(EngineConfig)}
    declared = {name: hint.__forward_arg__ for name, hint in EngineOptions.__annotations__.items()}
    assert declared == fields
    for kind in (LLM, AsyncLLM):
        hints = typing.get_type_hints(kind.__init__, localns={"PreTrainedModel": object})
        assert hints["options"] == typing.Unpack[EngineOptions]


def test_every_attribute_is_documented():
    documented = EngineConfig.__doc__.split("Attributes:")[1].split("Raises:")[0]
    for field in dataclasses.fields(EngineConfig):
        assert field.name in documented


def test_a_config_is_frozen_and_compares_by_value():
    config = EngineConfig(max_num_seqs=4)
    assert config == EngineConfig(max_num_seqs=4) != EngineConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.max_num_seqs = 5
    with pytest.raises(ValueError, match="max_num_seqs must be 1 or more; got 0"):
        dataclasses.replace(config, max_num_seqs=0)


def test_the_tokens_of_a_step():
    assert EngineConfig().step_tokens == 4096
    assert EngineConfig(max_num_seqs=5000).step_tokens == 5000
    assert EngineConfig(max_num_seqs=5000, max_num_batched_tokens=7).step_tokens == 7


@pytest.mark.parametrize("kind", [LLM, AsyncLLM])
def test_an_engine_takes_a_config_or_options(kind):
    config = EngineConfig(max_model_len=50, **options())
    made = kind(model_of(), config=config)
    assert made.max_model_len == 50
    made.close()
    with pytest.raises(ValueError, match="either config or options; got both: seed, num_blocks"):
        kind(model_of(), config=config, seed=1, num_blocks=9)
    with pytest.raises(TypeError, match="config must be an EngineConfig; got dict"):
        kind(model_of(), config={"seed": 1})
    with pytest.raises(TypeError, match="swap_space"):
        kind(model_of(), swap_space=4)
    with pytest.raises(ValueError, match="block_size must be 16, 32, 64, 128 or 256; got 24"):
        kind("/no/such/model", block_size=24)  # options are checked before anything is loaded


def test_it_is_public():
    assert llmfast.EngineConfig is EngineConfig and "EngineConfig" in llmfast.__all__


def test_importing_it_touches_no_device_and_no_triton():
    code = "import sys, llmfast; llmfast.EngineConfig(); assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
