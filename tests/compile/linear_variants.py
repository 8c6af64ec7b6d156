"""What the compile gate compiles of linear: both tiers, dense and gated, as the heuristic says."""

from __future__ import annotations

from variant import SHARED_LIMIT, SHARED_LIMIT_EVERYWHERE, Variant

from llmfast_kernels.linear.hopper_launch import ROWS, STREAM, TILE_STAGES, choose_hopper_launch
from llmfast_kernels.linear.hopper_parts import WORDS_LAYOUT, X_LAYOUT
from llmfast_kernels.linear.int4_kernel import DEQUANTIZED_ROWS
from llmfast_kernels.linear.int4_launch import GEMV_COLUMNS, choose_int4_launch
from llmfast_kernels.linear.int4_layout import CHUNK
from llmfast_kernels.linear.int8_kernel import WHOLE, choose_int8_launch
from llmfast_kernels.linear.launch import block_m, choose_launch, prefetched
from llmfast_kernels.linear.stream import REGISTERS


def _linear(
    dtype: str, tokens: int, n: int, k: int, target: str, *, act: str | None, bias: bool
) -> Variant:
    everywhere = target == "sm_80"
    launch = choose_launch(
        "dense_linear" if act is None else "gated_linear",
        n,
        k,
        tokens,
        shared_memory=SHARED_LIMIT_EVERYWHERE if everywhere else SHARED_LIMIT[target],
    )
    pointer = f"*{dtype}:16"
    signature = dict.fromkeys(("x_ptr", "weight_ptr", "y_ptr"), pointer) | {"n": "i32"}
    signature["k"] = "i32" if k % 16 else "i32:16"
    constexprs: dict[str, object] = {
        "ACT": act,
        "EVEN_K": k % launch.block_k == 0,
        "BLOCK_N": launch.block_n,
        "BLOCK_K": launch.block_k,
    }
    present = {"bias_ptr": bias, "residual_ptr": act is None}
    signature |= {name: pointer for name, there in present.items() if there}
    constexprs |= {name: None for name, there in present.items() if not there}
    if launch.tier == "tiles":
        signature["n_tokens"] = "i32"
        constexprs |= {"BLOCK_M": block_m(tokens), "PREFETCH": prefetched(tokens)}
    return Variant(
        name=f"linear/{launch.tier} {act or 'dense'} {dtype} {tokens}x{k}x{n}",
        kernel=f"llmfast_kernels.linear.kernel:_{launch.tier}_kernel",
        signature=signature,
        constexprs=constexprs,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        targets=(target,),
        everywhere=everywhere,
    )


def _int4(
    dtype: str, tokens: int, n: int, k: int, group: int, target: str, *, kind: str, act: str | None
) -> Variant:
    everywhere = target == "sm_80"
    shared_memory = SHARED_LIMIT_EVERYWHERE if everywhere else SHARED_LIMIT[target]
    launch = choose_int4_launch(n, k, tokens, shared_memory=shared_memory)
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
        constexprs |= {"BLOCK_W": GEMV_COLUMNS // 8}
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
        name=f"linear/int4-g{group} {kind} {act or 'dense'} {dtype} {tokens}x{k}x{n}",
        kernel=f"llmfast_kernels.linear.int4_kernel:_int4_{launch.tier}_kernel",
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
    """``more``: a bias, and without an activation a residual."""
    launch = choose_hopper_launch(
        n, k, tokens, bits, streams=kind != "minima", tiles=True, gated=act is not None
    )
    assert launch is not None
    pointer, groups = f"*{dtype}:16", -(-k // group)
    wide = f"tensordesc<{dtype}[{launch.tokens}, {CHUNK // 2}],{X_LAYOUT!r}>"
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
    if launch.tier == "tiles":
        module, name, rows = "hopper", "_hopper_kernel", ROWS
        signature |= dict.fromkeys(("residual_desc", "y_desc"), wide)
        constexprs |= {"RESIDUAL": residual, "TOKENS": launch.tokens}
        constexprs["STAGES"] = TILE_STAGES[bits][launch.tokens]
        for scratch, pointer_to in (("partial_ptr", "*fp32:16"), ("tickets_ptr", "*i32:16")):
            if launch.splits > 1:
                signature[scratch] = pointer_to
            else:
                constexprs[scratch] = None
    else:
        module, name = "stream", "_stream_kernel"
        stages, programs = STREAM[bits][launch.tokens]
        rows = ROWS if act is None else ROWS // 2
        at_first, multiplying, fetching = REGISTERS[programs]
        signature |= {"y_ptr": pointer, "partial_ptr": "*fp32:16", "tickets_ptr": "*i32:16"}
        constexprs |= {"TOKENS": launch.tokens, "STAGES": stages}
        constexprs |= {"OF_MULTIPLY": multiplying, "OF_FETCH": fetching}
        options["maxnreg"] = at_first
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
        name=f"linear/hopper int{bits}-g{group} {kind} {act or 'dense'} {dtype} {tokens}x{k}x{n}",
        kernel=f"llmfast_kernels.linear.{module}:{name}",
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
    constexprs: dict[str, object] = {"GROUP": group, "BLOCK_N": DEQUANTIZED_ROWS}
    _kind(kind, dtype, signature, constexprs)
    return Variant(
        name=f"linear/dequantize-g{group} {kind} {dtype} {k}x{n}",
        kernel="llmfast_kernels.linear.int4_kernel:_dequantize_kernel",
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
    launch = choose_int8_launch(k, group or WHOLE, tokens)
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
        constexprs["GROUP"] = group or WHOLE
    else:
        signature["n_tokens"] = "i32"
        constexprs["BLOCK_M"] = block_m(tokens)
    _kind(kind, dtype, signature, constexprs)
    if launch.tier == "tiles":
        del constexprs["minima_ptr"]
    return Variant(
        name=f"linear/int8-{launch.tier}-{f'g{group}' if group else 'channel'} {kind} {dtype}"
        f" {tokens}x{k}x{n}",
        kernel=f"llmfast_kernels.linear.int8_kernel:_int8_{launch.tier}_kernel",
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
    _on_hopper("bf16", 1024, 28672, 4096, 128, bits=4, kind="symmetric", act="silu", more=False),
    _on_hopper("fp16", 512, 4096, 14336, 32, bits=4, kind="minima", act=None, more=True),
    _on_hopper("bf16", 4096, 4096, 4096, 64, bits=8, kind="zeros", act=None, more=True),
    _on_hopper("bf16", 128, 4096, 14336, 128, bits=4, kind="symmetric", act=None, more=True),
    _on_hopper("bf16", 1, 28672, 4096, 128, bits=4, kind="symmetric", act="silu", more=False),
    _on_hopper("fp16", 32, 4096, 14336, 64, bits=4, kind="zeros", act=None, more=True),
    _on_hopper("bf16", 16, 6144, 4096, 128, bits=8, kind="symmetric", act=None, more=False),
    _dequantize("bf16", 6144, 4096, 128, "sm_90", kind="zeros"),
    _int8("bf16", 1, 6144, 4096, 0, "sm_90", kind="symmetric"),
    _int8("fp16", 64, 1536, 576, 32, "sm_80", kind="zeros"),
    _linear("bf16", 1, 6144, 4096, "sm_90", act=None, bias=True),
    _linear("fp16", 1, 1536, 576, "sm_80", act="silu", bias=False),
    _linear("bf16", 16, 4096, 14336, "sm_90", act=None, bias=False),
    _linear("fp16", 8, 14336, 4096, "sm_100", act="gelu_tanh", bias=True),
]
