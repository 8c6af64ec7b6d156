"""The compile gate's variants of quantized_linear: every main loop, as plan chooses it."""

from __future__ import annotations

from variant import Variant, device

from llmfast_kernels.quantized_linear.kernels.dequantize import INT4_ROWS
from llmfast_kernels.quantized_linear.kernels.hopper.operands import WORDS_LAYOUT, X_LAYOUT
from llmfast_kernels.quantized_linear.launch import (
    CHUNK,
    HOPPER_ROWS,
    INT8_GROUP,
    Problem,
    plan,
)

KERNELS = "llmfast_kernels.quantized_linear.kernels"


def _int4(
    dtype: str, tokens: int, n: int, k: int, group: int, target: str, *, kind: str, act: str | None
) -> Variant:
    everywhere = target == "sm_80"
    minima = kind == "minima"
    # not as on Hopper, which has main loops of its own
    problem = Problem(4, n, k, tokens, group, minima, gated=act is not None, tma_loads=False)
    launch = plan(problem, device(target, everywhere=everywhere))
    pointer, groups = f"*{dtype}:16", -(-k // group)
    signature = {
        "x_ptr": pointer,
        "packed_ptr": "*i32:16",
        "scales_ptr": pointer,
        "y_ptr": pointer,
        "n": "i32",
        "k": "i32" if k % 16 else "i32:16",
        "groups": "i32" if groups % 16 else "i32:16",
    }
    constexprs: dict[str, object] = {
        "bias_ptr": None,
        "residual_ptr": None,
        "GROUP": group,
        "ACT": act,
        "BLOCK_N": launch.block_n,
    }
    if launch.tier == "gemv":
        constexprs |= {"BLOCK_W": launch.block_k // 8}
    else:
        signature |= {"n_tokens": "i32"}
        constexprs |= {"EVEN_K": k % CHUNK == 0, "BLOCK_M": launch.block_m}
    if launch.tier == "tiles":
        signature |= {"per_split": "i32"}
        constexprs |= {"SPLITS": launch.splits}
        for name, pointer in (("partial_ptr", "*fp32:16"), ("tickets_ptr", "*i32:16")):
            if launch.splits > 1:
                signature[name] = pointer
            else:
                constexprs[name] = None
    _kind(kind, dtype, signature, constexprs)
    return Variant(
        name=f"quantized_linear/int4-g{group} {kind} {act or 'dense'} {dtype} {tokens}x{k}x{n}",
        kernel=f"{KERNELS}.{launch.tier}:int4_{launch.tier}_kernel",
        signature=signature,
        constexprs=constexprs,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        targets=(target,),
        everywhere=everywhere,
    )


def _on_hopper(
    dtype: str,
    tokens: int,
    n: int,
    k: int,
    group: int,
    *,
    bits: int,
    kind: str,
    act: str | None,
    more: bool,
) -> Variant:
    """Return a variant of stream or gemm; ``more`` adds a bias, and a residual if not gated."""
    problem = Problem(bits, n, k, tokens, group, kind == "minima", gated=act is not None)
    launch = plan(problem, device("sm_90"))
    pointer, groups = f"*{dtype}:16", -(-k // group)
    wide = f"tensordesc<{dtype}[{launch.block_m}, {CHUNK // 2}],{X_LAYOUT!r}>"
    signature = {
        "x_desc": wide,
        "scales_ptr": pointer,
        "n_tokens": "i32",
        "n": "i32",
        "k": "i32" if k % 16 else "i32:16",
        "groups": "i32" if groups % 16 else "i32:16",
    }
    constexprs: dict[str, object] = {"BITS": bits, "GROUP": group, "ACT": act}
    options: dict[str, object] = {}
    residual = more and act is None
    if launch.tier == "gemm":
        rows = HOPPER_ROWS
        signature |= dict.fromkeys(("residual_desc", "y_desc"), wide)
        constexprs |= {"RESIDUAL": residual, "TOKENS": launch.block_m}
        constexprs["STAGES"] = launch.num_stages
        for scratch, pointer_to in (("partial_ptr", "*fp32:16"), ("tickets_ptr", "*i32:16")):
            if launch.splits > 1:
                signature[scratch] = pointer_to
            else:
                constexprs[scratch] = None
    else:
        rows = HOPPER_ROWS if act is None else HOPPER_ROWS // 2
        assert launch.stream is not None
        at_launch, consumer, producer = launch.stream.registers
        signature |= {"y_ptr": pointer, "partial_ptr": "*fp32:16", "tickets_ptr": "*i32:16"}
        constexprs |= {"TOKENS": launch.block_m, "STAGES": launch.num_stages}
        constexprs |= {"CONSUMER_REGISTERS": consumer, "PRODUCER_REGISTERS": producer}
        options["maxnreg"] = at_launch
        if residual:
            signature["residual_ptr"] = pointer
        else:
            constexprs["residual_ptr"] = None
    if more:
        signature["bias_ptr"] = pointer
    else:
        constexprs["bias_ptr"] = None
    signature["words_desc"] = f"tensordesc<i32[{rows}, 16],{WORDS_LAYOUT!r}>"
    _kind(kind, dtype, signature, constexprs)
    if launch.tier == "stream":
        del constexprs["minima_ptr"]
    return Variant(
        name=f"quantized_linear/{launch.tier} int{bits}-g{group} {kind} {act or 'dense'} {dtype}"
        f" {tokens}x{k}x{n}",
        kernel=f"{KERNELS}.hopper.{launch.tier}:{launch.tier}_kernel",
        signature=signature,
        constexprs=constexprs,
        num_warps=4,
        targets=("sm_90",),
        everywhere=False,
        options=options,
    )


def _dequantize(dtype: str, n: int, k: int, group: int, target: str, *, kind: str) -> Variant:
    pointer, groups = f"*{dtype}:16", -(-k // group)
    signature = {
        "packed_ptr": "*i32:16",
        "scales_ptr": pointer,
        "weight_ptr": pointer,
        "n": "i32",
        "k": "i32" if k % 16 else "i32:16",
        "groups": "i32" if groups % 16 else "i32:16",
    }
    constexprs: dict[str, object] = {"GROUP": group, "BLOCK_N": INT4_ROWS}
    _kind(kind, dtype, signature, constexprs)
    return Variant(
        name=f"quantized_linear/dequantize-g{group} {kind} {dtype} {k}x{n}",
        kernel=f"{KERNELS}.dequantize:int4_dequantize_kernel",
        signature=signature,
        constexprs=constexprs,
        num_warps=4,
        num_stages=1,
        targets=(target,),
    )


def _int8(
    dtype: str, tokens: int, n: int, k: int, group: int, target: str, *, kind: str
) -> Variant:
    """``group`` 0: one scale for all columns."""
    minima = kind == "minima"
    launch = plan(Problem(8, n, k, tokens, group, minima, tma_loads=False), device(target))
    pointer, groups = f"*{dtype}:16", k // group if group else 1
    signature = {
        "x_ptr": pointer,
        "codes_ptr": "*u8:16",
        "scales_ptr": pointer,
        "y_ptr": pointer,
        "n": "i32",
        "k": "i32" if k % 16 else "i32:16",
    }
    constexprs: dict[str, object] = {
        "bias_ptr": None,
        "residual_ptr": None,
        "ONE_GROUP": not group,
        "EVEN_K": k % launch.block_k == 0,
        "BLOCK_N": launch.block_n,
        "BLOCK_K": launch.block_k,
    }
    if group:
        signature["groups"] = "i32" if groups % 16 else "i32:16"
    else:
        constexprs["groups"] = 1
    if launch.tier == "gemv":
        constexprs["GROUP"] = group or INT8_GROUP
    else:
        signature["n_tokens"] = "i32"
        constexprs["BLOCK_M"] = launch.block_m
    _kind(kind, dtype, signature, constexprs)
    if launch.tier == "tiles":
        del constexprs["minima_ptr"]
    return Variant(
        name=f"quantized_linear/int8-{launch.tier}-{f'g{group}' if group else 'channel'} {kind}"
        f" {dtype} {tokens}x{k}x{n}",
        kernel=f"{KERNELS}.{launch.tier}:int8_{launch.tier}_kernel",
        signature=signature,
        constexprs=constexprs,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        targets=(target,),
    )


def _kind(kind: str, dtype: str, signature: dict[str, str], constexprs: dict[str, object]) -> None:
    for name, pointer in (("zeros", "*u8:16"), ("minima", f"*{dtype}:16")):
        if kind == name:
            signature[f"{name}_ptr"] = pointer
        else:
            constexprs[f"{name}_ptr"] = None


VARIANTS = [
    _int4("bf16", 1, 6144, 4096, 128, "sm_90", kind="symmetric", act=None),
    _int4("bf16", 1, 28672, 4096, 64, "sm_90", kind="zeros", act="silu"),
    _int4("fp16", 64, 1536, 576, 64, "sm_80", kind="minima", act="gelu_tanh"),
    _int4("bf16", 256, 28672, 4096, 64, "sm_90", kind="minima", act="silu"),
    _int4("fp16", 16, 4096, 14336, 128, "gfx942", kind="zeros", act=None),
    _on_hopper("bf16", 1024, 28672, 4096, 128, bits=4, kind="symmetric", act="silu", more=False),
    _on_hopper("fp16", 512, 4096, 14336, 32, bits=4, kind="minima", act=None, more=True),
    _on_hopper("bf16", 4096, 4096, 4096, 64, bits=8, kind="zeros", act=None, more=True),
    _on_hopper("bf16", 128, 4096, 14336, 128, bits=4, kind="symmetric", act=None, more=True),
    _on_hopper("bf16", 1, 28672, 4096, 128, bits=4, kind="symmetric", act="silu", more=False),
    _on_hopper("fp16", 32, 4096, 14336, 64, bits=4, kind="zeros", act=None, more=True),
    _on_hopper("bf16", 16, 6144, 4096, 128, bits=8, kind="symmetric", act=None, more=False),
    _on_hopper("fp16", 64, 6144, 4096, 128, bits=8, kind="zeros", act=None, more=True),
    _dequantize("bf16", 6144, 4096, 128, "sm_90", kind="zeros"),
    _int8("bf16", 1, 6144, 4096, 0, "sm_90", kind="symmetric"),
    _int8("fp16", 64, 1536, 576, 32, "sm_80", kind="zeros"),
]
