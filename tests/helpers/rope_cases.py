"""Tables and skips that the tests of apply_rope and rope_write_kv share."""

from functools import partial

import pytest
import torch

MAX_POSITIONS = 50
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
needs_cuda = partial(pytest.mark.skipif, not torch.cuda.is_available())


def make_tables(rotary_dim, dtype, device="cpu", max_positions=MAX_POSITIONS):
    frequencies = 10000.0 ** (-torch.arange(0, rotary_dim, 2).double() / rotary_dim)
    angles = torch.arange(max_positions)[:, None].double() * frequencies
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def skip_what_the_interpreter_cannot_round(device, dtype):
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates float32 to bfloat16; a GPU rounds to nearest")
