"""Oracles of the attention tests: the formula in float64, and plain PyTorch."""

import itertools
import math

import pytest
import torch


def make(batch=2, n_queries=18, n_keys=37, heads=4, kv_heads=2, dim=24, dtype=torch.float32):
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(batch, n_queries, heads, dim, generator=gen)
    k, v = (torch.randn(batch, n_keys, kv_heads, dim, generator=gen) for _ in range(2))
    return tuple(x.to(dtype) for x in (q, k, v))


def to(device, x):
    """Move a tensor, or a container of tensors, to the device."""
    if isinstance(x, torch.Tensor):
        return x.to(device)
    if isinstance(x, dict):
        return {name: to(device, value) for name, value in x.items()}
    return tuple(to(device, value) for value in x) if isinstance(x, tuple) else x


def skip_bf16_in_the_interpreter(dtype, device):
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cannot compute in bfloat16; a GPU can")


def attended(
    q,
    k,
    *,
    query_offset=None,
    key_start=None,
    key_end=None,
    causal=True,
    window=None,
    tree=None,  # tree[i, j]: whether query i attends the j-th key from the offset on
    **_,
):
    """Return which keys each query attends, bool [B, Lq, Lk], found one by one."""
    (batch, n_queries), n_keys = q.shape[:2], k.shape[1]
    result = torch.zeros(batch, n_queries, n_keys, dtype=torch.bool)
    offset = n_keys - n_queries if query_offset is None else query_offset
    offsets = torch.as_tensor(offset).reshape(-1).expand(batch).tolist()
    for b, i in itertools.product(range(batch), range(n_queries)):
        pos = offsets[b] + i
        first = 0 if key_start is None else int(key_start[b])
        last = n_keys if key_end is None else int(key_end[b])
        if window is not None:
            first = max(first, pos - window + 1)
        if causal and tree is None:
            last = min(last, pos + 1)
        for j in range(max(first, 0), min(last, n_keys)):
            result[b, i, j] = tree is None or j < offsets[b] or tree[i, j - offsets[b]]
    return result


def oracle(q, k, v, *, scale=None, softcap=None, sinks=None, **features):
    """Compute attention in float64: for each query the softmax over the keys that it attends."""
    keys = attended(q, k, **features)
    q, k, v = (x.double() for x in (q, k, v))
    (batch, n_queries, heads, dim), kv_heads = q.shape, k.shape[2]
    out = torch.zeros_like(q)
    lse = torch.full((batch, heads, n_queries), -math.inf, dtype=torch.float64)
    for b, i, h in itertools.product(range(batch), range(n_queries), range(heads)):
        g = h // (heads // kv_heads)
        s = k[b, keys[b, i], g] @ q[b, i, h] * (scale or dim**-0.5)
        if softcap is not None:
            s = softcap * (s / softcap).tanh()
        weights = s.exp()
        total = weights.sum() + (0 if sinks is None else sinks[h].double().exp())
        if total > 0:
            out[b, i, h] = weights / total @ v[b, keys[b, i], g]
            lse[b, h, i] = total.log()
    return out, lse


def plain(q, k, v, *, scale=None, softcap=None, sinks=None, **features):
    """Compute attention as eager PyTorch does, each step rounded to the input's dtype."""
    group, dim = q.shape[2] // k.shape[2], q.shape[-1]
    keep = attended(q, k, **features)[:, None]
    k, v = (x.repeat_interleave(group, dim=2).transpose(1, 2) for x in (k, v))
    s = q.transpose(1, 2) @ k.transpose(2, 3) * (scale or dim**-0.5)
    if softcap is not None:
        s = softcap * (s / softcap).tanh()
    s = s.masked_fill(~keep, -math.inf)
    if sinks is not None:
        column = sinks.to(s.dtype)[None, :, None, None].expand(*s.shape[:-1], 1)
        s = torch.cat([s, column], dim=-1)
    weights = s.softmax(-1, dtype=torch.float32).to(q.dtype)[..., : v.shape[2]]
    return (weights.nan_to_num(0) @ v).transpose(1, 2)


def assert_close(out, lse, q, k, v, **features):
    """Assert the relative rule: at most twice plain PyTorch's error, or four machine epsilons.

    The log-sum-exp is float32 for every dtype, of scores that are sums of products of inputs.
    """
    expected, expected_lse = oracle(q, k, v, **features)
    out, lse = out.cpu(), lse.cpu()
    assert out.shape == q.shape and out.dtype == q.dtype and lse.dtype == torch.float32
    empty = expected_lse == -math.inf
    assert torch.equal(lse == -math.inf, empty)
    assert not out.transpose(1, 2)[empty].any()

    def rms(x):
        return x.square().mean().sqrt()

    error, unit = rms(out - expected), torch.finfo(q.dtype).eps * rms(expected)
    error_of_plain = rms(plain(q, k, v, **features) - expected)
    assert error <= max(2 * error_of_plain, 4 * unit), (error, error_of_plain, unit)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=4e-6)
