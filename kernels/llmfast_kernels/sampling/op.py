"""sample_tokens: its contract, the argument checks and the choice of implementation."""

from __future__ import annotations

import torch

from ..common.checks import check_float, check_no_grad
from .reference import Sampled, sample_tokens_reference

MAX_VOCAB = 2**20  # the draw's sums of weights of up to 2**40 stay within int64
_FLOAT = (torch.float32,)
_INT = (torch.int32, torch.int64)


def sample_tokens(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor | None = None,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    repetition_penalty: torch.Tensor | None = None,
    presence_penalty: torch.Tensor | None = None,
    frequency_penalty: torch.Tensor | None = None,
    prompt_seen: torch.Tensor | None = None,
    output_counts: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    logprobs: int | None = None,
) -> Sampled:
    """Choose a token for each row of raw logits: penalties, bias, temperature, filters, the draw.

    In transformers' order, in float32:

        s = l > 0 ? l / repetition : l * repetition        for tokens of the prompt or the output
        s = s - presence * (count > 0) - frequency * count            for tokens of the output
        s = (s + bias) / temperature
        top-k keeps every s that is no less than the k-th largest
        top-p keeps the most likely while those above them sum to less than p; of equal s the
              later index ranks higher
        min-p keeps the tokens with at least min_p times the largest probability

    One token is drawn from those that are kept. The draw inverts the cumulative distribution in
    index order at a random number that depends on the row's seed and position alone
    (Philox-4x32-10). Probabilities are counted in whole steps of 2**-40 of the largest, so sums are
    exact: the same seed, position and logits give the same token, whatever else is in the batch.
    A row with temperature 0 is greedy: it takes the largest ``s``, of equal ones the lowest index.

    **Rows are independent**, so a sequence may have several: to verify ``n`` drafted tokens of a
    sequence, pass its ``n + 1`` rows of logits. Each row has its own entry in every argument. The
    rows of one sequence share a seed and take consecutive positions, and ``output_counts`` of each
    row counts the drafts before it. Each row then gets the token that a call with this row alone
    gives. ``prompt_seen`` may be expanded over the rows (row stride 0).

    The host reads no value on the device: nothing here waits for the GPU.

    Args:
        logits: ``(B, V)``, last stride 1, V at most ``MAX_VOCAB``; float32, float16 or bfloat16,
            and float64 off CUDA. B counts rows, not sequences.
        temperature: float32 ``(B,)``; 0 or less is greedy. None: all rows are greedy, and
            top_k, top_p, min_p, seeds and positions have no effect.
        top_k: int32 or int64 ``(B,)``; 0 or less, or V or more, keeps all. None: keeps all.
        top_p: float32 ``(B,)``; 1 or more keeps all; 0 or less, or NaN, keeps one token.
        min_p: float32 ``(B,)``; 0 or less keeps all; more than 1, or NaN, is taken as 1.
        repetition_penalty: float32 ``(B,)``, more than 0; 1 changes nothing.
        presence_penalty, frequency_penalty: float32 ``(B,)``; 0 changes nothing.
        prompt_seen: bool ``(B, V)``, last stride 1: the tokens of each row's prompt.
        output_counts: int32 ``(B, V)``, last stride 1: how often each row's output has each token.
        bias: float32 ``(B, V)`` or ``(V,)``, last stride 1; -inf bans a token.
        seeds, positions: int32 or int64 ``(B,)``; required with a temperature. All draws of one
            seed must have different positions, such as the index of the token in its sequence.
        logprobs: None: none; 0: those of the chosen tokens; n: those of the n most likely too.

    Returns:
        ``Sampled(tokens, status, logprobs, top_tokens, top_logprobs)``. Log-probabilities are of
        the raw logits, float32 (float64 for float64), equal ones by the lowest index first.
        A row whose scores hold NaN or +inf has status ``NOT_FINITE``, one with every token at -inf
        ``ALL_MASKED``: its token is 0, in range but without meaning, its log-probabilities NaN
        and its top tokens 0. Every other row has status ``OK`` (0).

    Raises:
        TypeError: a dtype that is not listed above.
        ValueError: a shape, device or memory layout that breaks the contract; seeds or positions
            missing; logprobs negative or more than V.
        RuntimeError: logits or bias requires grad in grad mode; there is no backward.
        NotImplementedError: V is more than ``MAX_VOCAB``.
    """
    _check_logits(logits)
    rows = (logits.shape[0],)
    for name, value, dtypes in (
        ("temperature", temperature, _FLOAT),
        ("top_k", top_k, _INT),
        ("top_p", top_p, _FLOAT),
        ("min_p", min_p, _FLOAT),
        ("repetition_penalty", repetition_penalty, _FLOAT),
        ("presence_penalty", presence_penalty, _FLOAT),
        ("frequency_penalty", frequency_penalty, _FLOAT),
        ("seeds", seeds, _INT),
        ("positions", positions, _INT),
    ):
        if value is not None:
            _check(name, value, dtypes, rows, logits)
    if bias is not None and bias.ndim == 1:
        _check("bias", bias, _FLOAT, logits.shape[1:], logits)
        bias = bias.expand(logits.shape)
    for name, value, dtypes in (
        ("prompt_seen", prompt_seen, (torch.bool,)),
        ("output_counts", output_counts, (torch.int32,)),
        ("bias", bias, _FLOAT),
    ):
        if value is not None:
            _check(name, value, dtypes, tuple(logits.shape), logits)
    if temperature is not None and (seeds is None or positions is None):
        missing = "seeds" if seeds is None else "positions"
        raise ValueError(f"sample_tokens: {missing} must be given with temperature, got None")
    if logprobs is not None and not 0 <= logprobs <= logits.shape[1]:
        raise ValueError(
            f"sample_tokens: logprobs must be None or 0 to {logits.shape[1]}, the size of the "
            f"vocabulary; got {logprobs}"
        )
    check_no_grad("sample_tokens", logits, bias)
    if logits.is_cuda:
        # imports Triton, which a machine without CUDA may lack
        from .kernel import launch_sample_tokens as implementation
    else:
        implementation = sample_tokens_reference
    return implementation(
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        prompt_seen=prompt_seen,
        output_counts=output_counts,
        bias=bias,
        seeds=seeds,
        positions=positions,
        logprobs=logprobs,
    )


def _check_logits(logits: torch.Tensor) -> None:
    check_float("sample_tokens", "logits", logits)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(
            f"sample_tokens: logits must be (rows, vocabulary) with at least 1 token, "
            f"got {tuple(logits.shape)}"
        )
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(
            f"sample_tokens: logits must have last stride 1, got strides {logits.stride()}; "
            f"call .contiguous() where the tensor is made"
        )
    if logits.shape[1] > MAX_VOCAB:
        raise NotImplementedError(
            f"sample_tokens: a vocabulary of at most {MAX_VOCAB}, got {logits.shape[1]}"
        )


def _check(
    name: str,
    value: torch.Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    logits: torch.Tensor,
) -> None:
    if value.dtype not in dtypes:
        wanted = " or ".join(map(str, dtypes))
        raise TypeError(f"sample_tokens: {name} must be {wanted}, got {value.dtype}")
    if value.shape != shape:
        raise ValueError(
            f"sample_tokens: {name} must have shape {tuple(shape)}, got {tuple(value.shape)}"
        )
    if value.device != logits.device:
        raise ValueError(
            f"sample_tokens: {name} must be on {logits.device} as logits is, got {value.device}"
        )
    if value.stride(-1) != 1 and value.shape[-1] > 1:
        raise ValueError(
            f"sample_tokens: {name} must have last stride 1, got strides {value.stride()}"
        )
