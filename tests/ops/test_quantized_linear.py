"""Linear layers with quantized weights: formats, contracts, the choice of launches, scratch memory.

The kernels are tested in test_quantized_linear_int4, _int8, _stream and _gemm.
"""

import gc
import threading
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linear_cases import REFERENCE, assert_as_good, each_bits, in_float64, make
from llmfast_kernels import int4_linear, int8_linear, pack_int4, pack_int8
from llmfast_kernels.common.device import INTERPRETER, Device
from llmfast_kernels.quantized_linear import free_workspaces, workspace_bytes
from llmfast_kernels.quantized_linear.formats import CHUNK, FORMATS, INT4
from llmfast_kernels.quantized_linear.kernel import launch_quantized_linear
from llmfast_kernels.quantized_linear.launch import (
    GEMV_COLUMNS,
    Problem,
    max_tokens,
    plan,
    stage_bytes,
)
from llmfast_kernels.quantized_linear.workspace import MAX_TICKETS, Scratch, workspace

MAX_TOKENS = {bits: max_tokens(bits, False, INTERPRETER) for bits in FORMATS}
OPERATION = {4: int4_linear, 8: int8_linear}
H100 = Device("NVIDIA H100 80GB HBM3", "sm_90", 132, 227 * 1024, 50 * 2**20)
SMALL_GPU = Device("NVIDIA L4", "sm_89", 58, 99 * 1024, 48 * 2**20)

# --------------------------------------------------------------------------------------- formats


def test_where_a_four_bit_code_is():
    """Column 32 p + 2 c + h is in word c, from bit 16 h + 4 p on, as the module says."""
    for column in (0, 1, 2, 31, 32, 33, 63, 96, 127, 128, 200):
        codes = torch.zeros(2, 256, dtype=torch.uint8)
        codes[1, column] = 15
        packed = pack_int4(codes)
        assert packed.dtype == torch.int32 and packed.shape == (2, 32)
        chunk, rest = divmod(column, CHUNK)
        pair, rest = divmod(rest, 32)
        word, half = divmod(rest, 2)
        wanted = torch.zeros(2, 32, dtype=torch.int64)
        bits = 15 << (16 * half + 4 * pair)
        wanted[1, 16 * chunk + word] = bits - 2**32 if bits >= 2**31 else bits
        assert torch.equal(packed.long(), wanted)


def test_where_an_eight_bit_code_is():
    """Columns 2 c, 2 c + 1, 2 c + 8 and 2 c + 9 are in word c, as the module says."""
    codes = torch.arange(32, dtype=torch.uint8)[None]
    words = pack_int8(codes).view(8, 4).tolist()
    for start in (0, 16):
        for c in range(4):
            wanted = [start + column for column in (2 * c, 2 * c + 1, 2 * c + 8, 2 * c + 9)]
            assert words[start // 4 + c] == wanted


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    bits=st.sampled_from([4, 8]),
    n=st.integers(1, 9),
    k=st.integers(1, 300),
    seed=st.integers(0, 99),
)
def test_pack_and_unpack_are_inverse(bits, n, k, seed):
    fmt, gen = FORMATS[bits], torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (n, k), generator=gen, dtype=torch.uint8)
    packed = fmt.pack(codes)
    assert packed.is_contiguous() and packed.dtype == fmt.packed_dtype
    assert packed.shape == (n, fmt.packed_columns(k))
    assert torch.equal(fmt.unpack(packed, k), codes)


def test_bad_codes_are_named():
    with pytest.raises(TypeError, match=r"^pack_int4: codes must be torch.uint8, got torch.int32"):
        pack_int4(torch.zeros(2, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"^pack_int4: .*below 16; .*\(2, 3\) with a 16"):
        pack_int4(torch.full((2, 3), 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"^pack_int4: .*\(3,\)"):
        pack_int4(torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"^pack_int8: codes must be torch.uint8, got torch.int32"):
        pack_int8(torch.zeros(2, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"^pack_int8: .*\(3,\)"):
        pack_int8(torch.zeros(3, dtype=torch.uint8))


# ------------------------------------------------------------------------------------- contracts


@each_bits
def test_op_runs_its_implementation(bits, device):
    op, launch = OPERATION[bits], partial(launch_quantized_linear, fmt=FORMATS[bits])
    args = make((3, 128, 40, 64), torch.float16, device, bits=bits)
    run = launch if device.type == "cuda" else REFERENCE[bits]
    assert torch.equal(op(**args), run(**args))
    args = make((6, 128, 40, 64), torch.float16, device, more=False, bits=bits)
    args["x"] = args["x"].view(2, 3, 128)
    assert op(**args).shape == (2, 3, 40)
    args["x"] = args["x"][:, :0]
    assert launch(**args).shape == (2, 0, 40)


WRONG = [
    ({"x": torch.ones(3, 128).int()}, TypeError, "x must be float16 or bfloat16"),
    ({"x": torch.ones(128, 3).half().t()}, ValueError, r"x must be contiguous.*\(1, 3\)"),
    ({"group_size": 48}, ValueError, "group_size must be 32, 64, 128 or k = 128; got 48"),
    ({"scales": torch.ones(40, 3).half()}, ValueError, r"scales must be \(40, 2\).*\(40, 3\)"),
    ({"scales": torch.ones(40, 2)}, TypeError, "scales must have x's dtype torch.float16"),
    ({"zeros": torch.ones(40, 2)}, TypeError, "zeros must be torch.uint8"),
    ({"minima": torch.ones(40, 2).half()}, ValueError, "zeros and minima exclude each other"),
    ({"zeros": None, "minima": torch.ones(40, 3).half()}, ValueError, r"minima must be \(40, 2\)"),
    ({"zeros": None, "minima": torch.ones(40, 2)}, TypeError, "minima must have x's dtype"),
    ({"bias": torch.ones(39).half()}, ValueError, r"bias must be \(40,\)"),
    ({"residual": torch.ones(40).half()}, ValueError, r"residual must be \(3, 40\)"),
    (
        {"scales": torch.ones(40, 2, dtype=torch.half, requires_grad=True)},
        RuntimeError,
        "no backward",
    ),
]


@each_bits
@pytest.mark.parametrize(("change", "error", "says"), WRONG)
def test_bad_arguments_are_named(bits, change, error, says):
    args = make((3, 128, 40, 64), torch.float16, bits=bits) | change
    with pytest.raises(error, match=f"^int{bits}_linear: .*{says}"):
        OPERATION[bits](**args)


@pytest.mark.parametrize(
    ("bits", "change", "error", "says"),
    [
        (4, {"x": torch.ones(3, 130).half()}, ValueError, r"packed must be \(40, 32\)"),
        (4, {"packed": torch.ones(40, 16)}, TypeError, "packed must be torch.int32"),
        (4, {"packed": torch.ones(40).int()}, ValueError, r"packed must be \(n, words\)"),
        (4, {"activation": "relu"}, ValueError, "activation must be silu, .*; got 'relu'"),
        (4, {"activation": "silu"}, ValueError, "residual and activation exclude each other"),
        (8, {"x": torch.ones(3, 130).half()}, ValueError, r"packed must be \(40, 144\)"),
        (8, {"packed": torch.ones(40, 128)}, TypeError, "packed must be torch.uint8"),
        (8, {"packed": torch.ones(40).byte()}, ValueError, r"packed must be \(n, places\)"),
    ],
)
def test_bad_arguments_of_one_format_are_named(bits, change, error, says):
    test_bad_arguments_are_named(bits, change, error, says)


def test_an_activation_wants_gate_and_up():
    args = make((3, 128, 39, 64), torch.float16, more=False)
    with pytest.raises(ValueError, match=r"the gate's rows and up's must be as many, got 39"):
        int4_linear(**args, activation="silu")


# -------------------------------------------------------------------------------------- launches


def problem(n, k, tokens, bits=4, **more):
    return Problem(bits, n, k, tokens, group=128, **more)


@pytest.mark.parametrize("gpu", [SMALL_GPU, H100, INTERPRETER], ids=["L4", "H100", "interpreter"])
@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 33, 64, 65, 100, 128, 256])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (63, 384), (4096, 14336), (28672, 4096), (10**6, 64)])
def test_int4_launches_fit_the_gpu(gpu, n, k, tokens):
    launch = plan(problem(n, k, tokens, tma_loads=False), gpu)
    if launch.tier == "gemv":
        assert tokens == 1 and k % GEMV_COLUMNS == 0 and n >= 16384
        return
    assert stage_bytes(launch.block_m, launch.block_n) * launch.num_stages <= gpu.shared_memory
    assert launch.block_m >= min(tokens, 128)
    assert launch.splits == 1 or k // CHUNK // launch.splits >= 3


@pytest.mark.parametrize("tokens", [1, 16, 33, MAX_TOKENS[8]])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("k", [1, 576, 4096, 14336])
def test_int8_launches_fit_every_gpu(k, group, tokens):
    launch = plan(Problem(8, 4096, k, tokens, group, tma_loads=False), H100)
    if launch.tier == "gemv":
        assert launch.block_k % group == 0
        return
    assert launch.block_k == group and launch.block_m >= tokens
    stage = launch.block_n * launch.block_k + launch.block_m * launch.block_k * 2
    assert stage * launch.num_stages <= 99 * 1024


def test_the_tiers_of_every_gpu():
    def choose(n, k, tokens, **more):
        launch = plan(problem(n, k, tokens, **more), INTERPRETER)
        return launch.tier, launch.block_m, launch.block_n, launch.splits

    assert choose(28672, 4096, 1) == ("gemv", 1, 8, 1)
    assert choose(28672, 4096, 1, pairs=False) == ("tiles", 8, 64, 1)
    assert choose(4096, 14336, 1) == ("tiles", 8, 64, 8)
    assert choose(6144, 4096, 16) == ("tiles", 16, 64, 4)
    assert choose(28672, 4096, 64) == ("tiles", 64, 128, 1)
    assert choose(28672, 4096, 65) == ("scaled_tiles", 128, 128, 1)
    assert choose(6144, 4096, 256) == ("scaled_tiles", 128, 64, 1)
    assert choose(4096, 4096, 256) == ("scaled_tiles", 128, 64, 1)
    assert choose(4096, 4096, 128) == ("tiles", 128, 128, 4)  # too few programs
    assert choose(4096, 14336, 256) == ("tiles", 128, 128, 2)  # too many columns
    assert choose(4096, 4096, 256, same_dtype=False) == ("tiles", 128, 128, 2)
    assert choose(4096, 4096, 257)[0] == "workspace"
    for tokens, tier in ((1, "gemv"), (2, "tiles"), (128, "tiles"), (129, "workspace")):
        assert choose(4096, 4096, tokens, bits=8)[0] == tier
    assert choose(4096, 4096, 2, bits=8, minima=True)[0] == "workspace"


def test_the_tiers_of_hopper():
    def choose(n, k, tokens, bits=4, **more):
        launch = plan(problem(n, k, tokens, bits, **more), H100)
        return launch.tier, launch.block_m, launch.splits

    gemm = partial(choose, minima=True)  # which streams do not take
    assert gemm(28672, 4096, 64)[0] == "tiles"
    for bits in (4, 8):
        assert choose(6144, 4096, 65, bits) == ("gemm", 128, 2)  # else too few tiles
        assert choose(6144, 4096, 65, bits, gated=True) == ("gemm", 128, 1)
        assert choose(4096, 14336, 128, bits) == ("gemm", 128, 4)
        assert choose(4096, 14336, 129, bits) == ("gemm", 128, 2)
    assert gemm(4096, 640, 128) == ("gemm", 128, 1)  # few columns
    assert gemm(28672, 4096, 129) == gemm(28672, 4096, 256) == ("gemm", 256, 1)
    assert gemm(6144, 4096, 256) == ("gemm", 128, 1)
    assert gemm(4096, 14336, 512) == ("gemm", 128, 1)
    assert gemm(6144, 4096, 1024) == ("gemm", 128, 1)  # fewer waves of programs
    assert gemm(4096, 4096, 1024) == gemm(6144, 4096, 4096) == ("gemm", 256, 1)
    assert gemm(1024, 2048, 512)[0] == "workspace"  # few programs, little to dequantize
    assert choose(4096, 4096, 1024, tma_stores=False)[0] == "workspace"
    assert choose(4096, 512, 1024)[0] == "workspace"  # fewer columns than stages
    assert choose(28672, 4096, 1) == ("stream", 8, 1)
    assert choose(28672, 4096, 1, 8)[0] == "gemv"
    assert choose(28672, 4096, 1, tma_loads=False)[0] == "gemv"
    for bits in (4, 8):
        assert choose(28672, 4096, 2, bits) == choose(64, 64, 8, bits) == ("stream", 8, 1)
        assert choose(4096, 14336, 9, bits) == ("stream", 16, 1)
        assert choose(4096, 4096, 33, bits) == ("stream", 64, 1)
        assert choose(128256, 4096, 2, bits)[0] == "tiles"  # more tiles than tickets
        assert plan(Problem(bits, 4096, 4096, 16, group=32), H100).tier == "tiles"


def test_a_gpu_with_the_sms_of_an_h100_launches_alike_and_fewer_sms_split_less():
    h200 = replace(H100, name="NVIDIA H200")
    h20 = replace(H100, name="NVIDIA H20", sm_count=78)
    for tokens in (1, 16, 65, 128, 300, 4096):
        for n, k in ((6144, 4096), (4096, 14336), (28672, 4096)):
            assert plan(problem(n, k, tokens), h200) == plan(problem(n, k, tokens), H100)
    few = problem(4096, 14336, 128)
    assert plan(few, h20).splits < plan(few, H100).splits


def test_amd_runs_no_kernels_of_hopper():
    mi250 = Device("AMD Instinct MI250X", "gfx90a", 104, 64 * 1024, 8 * 2**20)
    assert plan(problem(4096, 4096, 16), mi250).tier == "tiles"


def test_a_launch_says_why():
    for tokens in (1, 16, 100, 300, 4096):
        for gpu in (H100, SMALL_GPU):
            for bits in (4, 8):
                assert plan(problem(4096, 4096, tokens, bits), gpu).reason


def test_an_input_at_an_odd_address_takes_another_tier(device):
    """The lanes of gemv read two inputs at once."""
    args = make((1, GEMV_COLUMNS, 16385, 128), torch.float16, device, more=False)
    odd = torch.empty(GEMV_COLUMNS + 1, dtype=torch.float16, device=device)[1:].view(1, -1)
    args["x"] = odd.copy_(args["x"])
    got = launch_quantized_linear(**args, fmt=INT4)
    assert_as_good(got, REFERENCE[4](**args), in_float64(**args))


# --------------------------------------------------------------------------------- scratch memory


def test_the_workspace_is_as_large_as_the_largest_layer(device, no_workspaces):
    launch = partial(launch_quantized_linear, fmt=INT4)
    many = MAX_TOKENS[4] + 1
    for n, k in ((8, 64), (40, 128), (8, 64)):
        launch(**make((many, k, n, 64), torch.float16, device))
    assert workspace_bytes() == workspace_bytes(device_of(device)) == 2 * 40 * 128
    launch(**make((many - 1, 256, 40, 64), torch.float16, device))
    assert workspace_bytes() == 2 * 40 * 128  # few tokens need none
    assert workspace_bytes(torch.device("meta")) == 0
    free_workspaces()
    assert workspace_bytes() == 0


def device_of(device):
    return torch.empty(0, device=device).device  # with its index


CPU = torch.device("cpu")


class Where:
    """A current stream and capture that a test sets."""

    def __init__(self):
        self.now = (0, None)

    def __call__(self, device):
        return self.now


@pytest.fixture
def where():
    return Where()


@pytest.fixture
def scratch(where):
    return Scratch(where)


def test_layers_of_a_stream_share_scratch_memory_and_streams_do_not(scratch, where):
    weight, drawn = scratch.workspace(CPU, torch.half, 64), scratch.tickets(CPU, 3)
    assert not drawn.any() and len(drawn) == MAX_TICKETS
    assert scratch.workspace(CPU, torch.half, 32).data_ptr() == weight.data_ptr()
    assert scratch.tickets(CPU, 1) is drawn
    assert scratch.workspace(CPU, torch.bfloat16, 8).data_ptr() != weight.data_ptr()
    where.now = (1, None)
    assert scratch.workspace(CPU, torch.half, 32).data_ptr() != weight.data_ptr()
    assert scratch.tickets(CPU, 1) is not drawn
    where.now = (0, None)
    assert scratch.workspace(CPU, torch.half, 64).data_ptr() == weight.data_ptr()
    assert scratch.workspace_bytes(CPU) == 2 * (64 + 8 + 32)


def test_a_larger_layer_gets_a_larger_workspace(scratch):
    scratch.workspace(CPU, torch.half, 8)
    assert len(scratch.workspace(CPU, torch.half, 16)) == 16
    assert scratch.workspace_bytes() == 32
    with pytest.raises(ValueError, match=f"{MAX_TICKETS + 1} tickets, more than {MAX_TICKETS}"):
        scratch.tickets(CPU, MAX_TICKETS + 1)


def test_captures_share_with_no_other_capture_and_no_stream(scratch, where):
    eager = scratch.tickets(CPU, 1)
    found = {}
    for capture, stream in ((7, 0), (7, 1), (8, 0)):
        where.now = (stream, capture)
        found[where.now] = scratch.tickets(CPU, 1)
        assert scratch.tickets(CPU, 1) is found[where.now]
        scratch.workspace(CPU, torch.half, 99)
    assert len({t.data_ptr() for t in (eager, *found.values())}) == 4
    assert scratch.workspace_bytes() == 0  # graphs' memory is in their pools


def test_the_memory_of_a_capture_that_ended_is_not_held(scratch, where):
    where.now = (0, 7)
    drawn = weakref.ref(scratch.tickets(CPU, 1))
    where.now = (0, 8)
    scratch.tickets(CPU, 1)
    assert drawn() is None  # another capture on the stream
    drawn = weakref.ref(scratch.tickets(CPU, 1))
    where.now = (0, None)
    scratch.tickets(CPU, 1)
    assert drawn() is None  # a call on the stream that is not captured


def test_threads_do_not_share_and_leave_nothing(no_workspaces):
    def run():
        found.append(workspace(CPU, torch.half, 16).data_ptr())
        sizes.append(workspace_bytes(CPU))

    found, sizes = [workspace(CPU, torch.half, 16).data_ptr()], []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found[0] != found[1] and sizes == [64]
    gc.collect()
    assert workspace_bytes(CPU) == 32


@pytest.mark.gpu
def test_a_graph_keeps_the_workspace_that_it_was_captured_with(no_workspaces):
    many = MAX_TOKENS[4] + 1
    args = make((many, 128, 40, 64), torch.float16, "cuda")
    wanted = int4_linear(**args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = int4_linear(**args)
    int4_linear(**make((many, 256, 80, 64), torch.float16, "cuda"))
    assert workspace_bytes() == 2 * 80 * 256
    free_workspaces()
    taken = [torch.full((40 * 128,), 7.0, device="cuda", dtype=torch.half) for _ in range(9)]
    graph.replay()
    assert torch.equal(got, wanted)
    assert all(bool((t == 7.0).all()) for t in taken)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "n", "group_size"),
    # on Hopper tiles that split columns, stream, gemm that splits columns, and the workspace
    [(8, 4096, 32), (8, 4096, 128), (100, 4096, 128), (300, 4104, 128)],
)
def test_two_streams_may_run_layers_at_the_same_time(tokens, n, group_size):
    """Eager calls, and graphs that were captured on one stream and are replayed on two."""
    shape = (tokens, 4096, n, group_size)
    layers = [make(shape, torch.half, "cuda", seed=seed) for seed in range(2)]
    wanted = [int4_linear(**layer) for layer in layers]
    streams = [torch.cuda.Stream() for _ in layers]
    graphs, replayed = [torch.cuda.CUDAGraph() for _ in layers], []
    for layer, graph in zip(layers, graphs, strict=True):
        with torch.cuda.graph(graph):
            replayed.append(int4_linear(**layer))
    torch.cuda.synchronize()
    for _ in range(20):
        got = []
        for layer, stream, graph in zip(layers, streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                got += [int4_linear(**layer) for _ in range(5)]
                graph.replay()
        torch.cuda.synchronize()
        for i, one in enumerate(wanted):
            assert torch.equal(replayed[i], one)
            assert all(torch.equal(y, one) for y in got[5 * i : 5 * i + 5])
