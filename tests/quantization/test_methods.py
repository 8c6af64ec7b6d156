"""Methods: rounding by its definition, GPTQ and AWQ by the output errors that they promise."""

import pytest
import torch

from llmfast.errors import UserError
from llmfast.quantization.methods import (
    AwqSettings,
    GptqSettings,
    Scheme,
    awq_round,
    awq_scales,
    gptq,
    round_to_nearest,
)
from llmfast.quantization.statistics import InputStatistics

N, K, TOKENS = 24, 256, 1024


def weight(n: int = N, k: int = K) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0))


def inputs(k: int = K, tokens: int = TOKENS) -> torch.Tensor:
    """Return correlated inputs of very different magnitudes, as a model's activations are."""
    g = torch.Generator().manual_seed(1)
    mixing = torch.randn(k, k, generator=g) / k**0.5 + torch.eye(k)
    return (torch.randn(tokens, k, generator=g) @ mixing) * torch.randn(k, generator=g).exp()


def statistics(x: torch.Tensor) -> InputStatistics:
    found = InputStatistics(x.shape[-1])
    for part in x.split(100):
        found.add(part)
    return found


def output_error(w: torch.Tensor, rounded: torch.Tensor, x: torch.Tensor) -> float:
    return float(((w - rounded).double() @ x.double().T).square().sum())


def test_statistics_are_means_over_tokens():
    x = inputs(32, 250)
    found = statistics(x)
    assert found.tokens == 250
    # sums of 250 products in float32, in another order than here
    exact = x.double().T @ x.double() / 250
    torch.testing.assert_close(found.gram.double(), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.magnitude, x.abs().mean(0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("group_size", [32, 64, 128, None])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_nearest_is_no_code_away_from_the_best(bits, group_size, symmetric):
    w = weight()
    q = round_to_nearest(w, Scheme(bits, group_size, symmetric))
    assert q.bits == bits and q.group_size == (group_size or K) and q.symmetric == symmetric
    assert q.scales.dtype == torch.float16
    scales = q.scales.double()[:, q.group_of_input()]
    middle = torch.full_like(scales, 2 ** (bits - 1))
    zeros = middle if q.zeros is None else q.zeros.double()[:, q.group_of_input()]
    every = torch.arange(2**bits).double().view(-1, 1, 1)
    least = ((every - zeros) * scales - w).abs().amin(0)
    error = (q.dequantize(torch.float64) - w).abs()
    # between two codes the choice may differ where float32 cannot tell which is nearer
    assert bool((error <= least + 1e-6 * scales).all())
    # half a step; at the ends another half of a zero point's rounding, and of the scale's
    assert bool((error <= scales * (0.51 + 0.5 * (not symmetric) + 2**bits * 2**-11)).all())


def test_nearest_scales_are_the_groups_extremes():
    w = torch.zeros(2, 64)
    w[0, :32] = torch.linspace(-7.5, 3, 32)
    w[0, 32:] = torch.linspace(-1, 2.75, 32)
    sym = round_to_nearest(w, Scheme(4, 32))
    assert sym.scales[0].tolist() == [1.0, torch.tensor(2.75 / 7.5).half().item()]
    asym = round_to_nearest(w, Scheme(4, 32, symmetric=False))
    assert asym.scales[0].tolist() == [torch.tensor(10.5 / 15).half().item(), 0.25]
    assert asym.zeros is not None and asym.zeros[0].tolist() == [11, 4]
    assert bool((asym.dequantize()[1] == 0).all())  # a group of zeros stays zero


def test_values_on_the_grid_stay():
    g = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 16, (4, 64), generator=g).float()
    codes[:, 0], codes[:, 1] = 0, 15
    q = round_to_nearest((codes - 5) * 0.25, Scheme(4, None, symmetric=False))
    assert torch.equal(q.codes.float(), codes)
    assert torch.equal(q.dequantize(), (codes - 5) * 0.25)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 128, None])
@pytest.mark.parametrize(
    "settings",
    [
        GptqSettings(act_order=False),
        GptqSettings(act_order=True, static_groups=False),
        GptqSettings(act_order=True, static_groups=True),
    ],
    ids=["columns", "act-order", "static"],
)
def test_gptq_has_less_output_error_than_nearest(settings, group_size, symmetric):
    w, x = weight(), inputs()
    scheme = Scheme(4, group_size, symmetric)
    q = gptq(w, statistics(x), scheme, settings)
    ours = output_error(w, q.dequantize(), x)
    theirs = output_error(w, round_to_nearest(w, scheme).dequantize(), x)
    assert ours < 0.6 * theirs  # 0.27 to 0.52 here; a wrong sign gives more than 1
    moved = settings.act_order and not settings.static_groups and group_size is not None
    assert (q.g_idx is not None) == moved


def one_by_one(w: torch.Tensor, hessian: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """GPTQ for one group an output as the paper derives it: no Cholesky factor, in float64.

    After each column the inverse Hessian of the remaining ones is computed again.
    """
    w = w.double().clone()
    scales = round_to_nearest(w, scheme).scales.double()[:, 0]
    rounded = torch.empty_like(w)
    for j in range(w.shape[1]):
        rounded[:, j] = ((w[:, j] / scales + 8).round().clamp(0, 15) - 8) * scales
        inverse = torch.linalg.inv(hessian[j:, j:])
        w[:, j:] -= torch.outer((w[:, j] - rounded[:, j]) / inverse[0, 0], inverse[0])
    return rounded


@pytest.mark.parametrize("block", [5, 32, 128])
def test_gptq_is_the_papers_update(block):
    w, x = weight(6, 32), inputs(32)
    found, scheme = statistics(x), Scheme(4, None)
    q = gptq(w, found, scheme, GptqSettings(act_order=False, block=block))
    hessian = found.gram.double()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    assert torch.equal(q.dequantize(torch.float64), one_by_one(w, hessian, scheme))


@pytest.mark.parametrize("act_order", [False, True])
def test_the_block_of_gptq_changes_no_code(act_order):
    """Also where a group goes over a block's end. The sums' order may flip a rounding or two."""
    w, found = weight(), statistics(inputs())
    for static in (False, True):
        codes = [
            gptq(w, found, Scheme(4, 64), GptqSettings(0.01, act_order, static, block)).codes
            for block in (256, 48)
        ]
        assert (codes[0] != codes[1]).sum() <= 0.002 * codes[0].numel()


def test_gptq_with_independent_inputs_is_nearest():
    """No error can be compensated for, so every code is the nearest."""
    found = InputStatistics(64)
    found.add(torch.eye(64) * 3)
    w = weight(8, 64)
    for settings in (GptqSettings(act_order=False), GptqSettings()):
        q = gptq(w, found, Scheme(4, 32), settings)
        assert torch.equal(q.dequantize(), round_to_nearest(w, Scheme(4, 32)).dequantize())


def test_gptq_rounds_inputs_that_were_never_seen_to_nearest():
    x = inputs()
    x[:, 64:128] = 0
    w, scheme = weight(), Scheme(4, 64)
    q, plain = gptq(w, statistics(x), scheme), round_to_nearest(w, scheme)
    assert torch.equal(q.codes[:, 64:128], plain.codes[:, 64:128])
    assert not torch.equal(q.codes[:, :64], plain.codes[:, :64])


def test_gptq_of_fewer_tokens_than_inputs_is_finite():
    x = inputs(tokens=16)
    w = weight()
    q = gptq(w, statistics(x), Scheme())
    assert output_error(w, q.dequantize(), x) < output_error(
        w, round_to_nearest(w, Scheme()).dequantize(), x
    )


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_has_less_output_error_than_nearest(symmetric):
    w, x = weight(), inputs()
    scheme = Scheme(4, 64, symmetric)
    s = awq_scales([w[:16], w[16:]], statistics(x), scheme)
    assert s.shape == (K,) and bool((s > 0).all())
    ours = output_error(w, round_to_nearest(w * s, scheme).dequantize() / s, x)
    assert ours < 0.8 * output_error(w, round_to_nearest(w, scheme).dequantize(), x)


def test_awq_never_takes_factors_that_are_worse():
    w = weight()
    found = statistics(torch.randn(TOKENS, K, generator=torch.Generator().manual_seed(3)))
    s = awq_scales([w], found, Scheme(), AwqSettings(alphas=(40.0,)))
    assert torch.equal(s, torch.ones(K))


def test_awq_factors_that_must_be_shared_are():
    shared = torch.arange(K) % 64
    s = awq_scales([weight()], statistics(inputs()), Scheme(), shared=shared)
    assert torch.equal(s, s[:64].repeat(4)) and s.unique().numel() > 10


@pytest.mark.parametrize("group_size", [32, 128, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_clips_where_that_is_better(symmetric, group_size):
    w, x = weight(), inputs()
    scheme, found = Scheme(4, group_size, symmetric), statistics(x)
    theirs = output_error(w, round_to_nearest(w, scheme).dequantize(), x)
    assert output_error(w, awq_round(w, found, scheme).dequantize(), x) < 0.8 * theirs
    s = awq_scales([w], found, scheme)
    both = awq_round(w * s, found, scheme, scales=s)
    assert output_error(w, both.dequantize() / s, x) < 0.8 * theirs


def test_awq_without_clips_is_nearest():
    w, scheme = weight(), Scheme(4, 64, symmetric=False)
    q = awq_round(w, statistics(inputs()), scheme, AwqSettings(clips=(1.0,)))
    assert torch.equal(q.dequantize(), round_to_nearest(w, scheme).dequantize())


def test_every_group_takes_the_clip_that_is_best_for_its_part_of_the_output():
    w, x, scheme = weight(4, 64), inputs(64), Scheme(4, 32)
    clips = (1.0, 0.9, 0.8, 0.6)
    s = torch.linspace(0.5, 2, 64)
    q = awq_round(w, statistics(x), scheme, AwqSettings(clips=clips), scales=s)
    taken = set()
    for row in range(4):
        for group in (slice(0, 32), slice(32, 64)):
            part, seen = w[row, group], (x / s)[:, group].double()
            errors = []
            for clip in clips:
                step = (part.abs().max() * clip / 7.5).half().float()
                rounded = (part / step).round().clamp(-8, 7) * step
                errors.append((seen @ (rounded - part).double()).square().sum().item())
            best = min(range(4), key=errors.__getitem__)
            taken.add(best)
            step = part.abs().max() * clips[best] / 7.5
            assert q.scales[row, group.start // 32] == step.half()
    assert len(taken) > 1  # else one clip for all would pass


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: Scheme(bits=3), ValueError, ["bits must be 4 or 8", "3"]),
        (lambda: Scheme(scale_dtype=torch.float64), ValueError, ["scale_dtype", "float64"]),
        (lambda: round_to_nearest(weight(), Scheme(4, 48)), ValueError, ["32, 64, 128", "48"]),
        (
            lambda: round_to_nearest(weight(2, 96), Scheme()),
            ValueError,
            ["64 does not divide the 96"],
        ),
        (lambda: round_to_nearest(weight()[0], Scheme()), ValueError, ["matrix", "(256,)"]),
        (lambda: round_to_nearest(weight() / 0, Scheme()), UserError, ["infinity or NaN"]),
        (lambda: round_to_nearest(weight() * 1e6, Scheme()), UserError, ["too large", "float16"]),
        (lambda: gptq(weight(), InputStatistics(K), Scheme()), UserError, ["no token"]),
        (lambda: gptq(weight(), statistics(inputs(64)), Scheme()), ValueError, ["256", "64"]),
        (lambda: gptq(weight(), statistics(inputs() / 0), Scheme()), UserError, ["activations"]),
        (lambda: GptqSettings(damping=0), ValueError, ["damping", "0"]),
        (lambda: GptqSettings(block=0), ValueError, ["block", "0"]),
        (lambda: awq_scales([weight()], InputStatistics(K), Scheme()), UserError, ["no token"]),
        (lambda: awq_round(weight(), InputStatistics(K), Scheme()), UserError, ["no token"]),
    ],
)
def test_weights_that_cannot_be_rounded_are_refused(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert [word for word in words if word not in str(caught.value)] == [], caught.value
