"""begin_step and end_step: the reference row by row in Python, the kernels against it, exactly."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmfast_kernels.decode_step import NO_TOKEN, begin_step, end_step
from llmfast_kernels.decode_step.kernel import BLOCK, launch_begin_step, launch_end_step
from llmfast_kernels.decode_step.reference import begin_step_reference, end_step_reference

BLOCK_SIZE, VOCABULARY = 16, 11
PADS = [5, -1, VOCABULARY, -3, 2**40]  # one of the vocabulary, and what models without one have
ROWS = [1, 2, 7, BLOCK, BLOCK + 1, 3 * BLOCK - 1]

each_rows = pytest.mark.parametrize("rows", ROWS)


def make_state(rows, device, seed=0, max_blocks=5):
    gen = torch.Generator().manual_seed(seed)

    def randint(low, high, *shape, dtype=torch.int64):
        return torch.randint(low, high, shape, generator=gen, dtype=dtype).to(device)

    live = torch.rand(rows, generator=gen).to(device) < 0.8
    context = randint(1, max_blocks * BLOCK_SIZE - 1, rows, dtype=torch.int32) * live
    table = randint(0, 1000, rows, max_blocks, dtype=torch.int32)
    table[~live] = -1
    return context, randint(0, 50, rows), table


def make_end(rows, device, seed=0, seen=True, stops=(3, -1, 8), pad=5):
    gen = torch.Generator().manual_seed(seed)

    def randint(low, high, *shape, dtype=torch.int64):
        return torch.randint(low, high, shape, generator=gen, dtype=dtype).to(device)

    args = (
        randint(0, VOCABULARY, rows),
        randint(-3, 3, rows, dtype=torch.int32).clamp(min=0),
        randint(-2, 40, rows, dtype=torch.int32).clamp(min=0),
        torch.tensor(stops, device=device, dtype=torch.int64),
        torch.tensor(pad, device=device),
    )
    written = {
        "tokens": randint(100, 200, rows),
        "host_tokens": randint(100, 200, rows),
        "context": randint(100, 200, rows, dtype=torch.int32),
        "generated": randint(0, 9, rows, dtype=torch.int32),
    }
    if seen:
        written["seen"] = randint(0, 2, rows, VOCABULARY).bool()
    return args, written


@each_rows
def test_begin_step_row_by_row(rows):
    context, first_row, table = make_state(rows, "cpu")
    positions, slots, context_len = begin_step_reference(
        context, first_row, table, block_size=BLOCK_SIZE
    )
    for row in range(rows):
        n = int(context[row])
        assert positions[row] == first_row[row] + n
        block = int(table[row, n // BLOCK_SIZE])
        assert slots[row] == (block * BLOCK_SIZE + n % BLOCK_SIZE if n else -1)
        assert context_len[row] == (n + 1 if n else 0)


@each_rows
@pytest.mark.parametrize("pad", PADS)
def test_end_step_row_by_row(rows, pad):
    args, written = make_end(rows, "cpu", pad=pad)
    sampled, status, context_len = args[:3]
    before = {name: tensor.clone() for name, tensor in written.items()}
    end_step_reference(*args, **written)
    for row in range(rows):
        live = int(context_len[row]) > 0
        token = int(sampled[row]) if live else 0
        assert written["tokens"][row] == token
        for_host = token if status[row] == 0 else -(2**32) - int(status[row])
        assert written["host_tokens"][row] == (for_host if live else pad)
        done = token in (3, 8)
        assert written["context"][row] == (0 if done else int(context_len[row]))
        assert written["generated"][row] == before["generated"][row] + 1
        if live:
            before["seen"][row, token] = True
        assert torch.equal(written["seen"][row], before["seen"][row])


@each_rows
def test_begin_kernel_equals_the_reference(rows, device):
    state = make_state(rows, device)
    before = [tensor.clone() for tensor in state]
    got = launch_begin_step(*state, block_size=BLOCK_SIZE)
    wanted = begin_step_reference(*state, block_size=BLOCK_SIZE)
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


@each_rows
@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("seen", [False, True], ids=["plain", "seen"])
def test_end_kernel_equals_the_reference(rows, seen, pad, device):
    args, ours = make_end(rows, device, seen=seen, pad=pad)
    _, theirs = make_end(rows, device, seen=seen, pad=pad)
    launch_end_step(*args, **ours)
    end_step_reference(*args, **theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # no example changes a fixture
)
@given(
    rows=st.integers(1, 140),
    seed=st.integers(0, 99),
    stops=st.lists(st.integers(-1, 11), max_size=9),
    seen=st.booleans(),
)
def test_a_step_s_kernels_equal_the_references(device, rows, seed, stops, seen):
    state = make_state(rows, device, seed)
    begun = launch_begin_step(*state, block_size=BLOCK_SIZE)
    wanted = begin_step_reference(*state, block_size=BLOCK_SIZE)
    assert all(torch.equal(a, b) for a, b in zip(begun, wanted, strict=True))
    args, ours = make_end(rows, device, seed, seen, stops)
    _, theirs = make_end(rows, device, seed, seen, stops)
    launch_end_step(*args, **ours)
    end_step_reference(*args, **theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("run", [launch_end_step, end_step_reference], ids=["kernel", "reference"])
@pytest.mark.parametrize("pad", PADS)
def test_idle_rows_leave_seen_and_the_embedding_alone(run, pad, device):
    """Their pad is for the host; ``seen`` is a window of a tensor whose other bytes must stay."""
    args, written = make_end(6, device, pad=pad)
    args[2][:] = torch.tensor([0, 4, 0, 9, 2, 0], dtype=torch.int32)
    around = torch.zeros(8, VOCABULARY, dtype=torch.bool, device=device)
    written["seen"] = around[1:7]
    run(*args, **written)
    assert written["tokens"][[0, 2, 5]].tolist() == [0, 0, 0]
    assert written["host_tokens"][[0, 2, 5]].tolist() == [pad] * 3
    expected = torch.zeros_like(around)
    expected[[2, 4, 5], args[0][[1, 3, 4]]] = True
    assert torch.equal(around, expected)


def test_a_failed_row_is_told_from_every_pad(device):
    args, written = make_end(4, device, pad=-1)
    args[1][:] = torch.tensor([0, 1, 2, 1], dtype=torch.int32)
    args[2][:] = torch.tensor([7, 7, 7, 0], dtype=torch.int32)
    end_step(*args, **written)
    failed = written["host_tokens"] < NO_TOKEN
    assert failed.tolist() == [False, True, True, False]
    assert (NO_TOKEN - written["host_tokens"][failed]).tolist() == [1, 2]


def test_the_context_may_be_what_is_written(device):
    (sampled, status, _, stops, pad), ours = make_end(9, device)
    context = torch.tensor([4, 0, 9, 1, 1, 0, 2, 3, 5], device=device, dtype=torch.int32)
    _, theirs = make_end(9, device)
    end_step_reference(sampled, status, context, stops, pad, **theirs)
    ours["context"] = context
    end_step(sampled, status, context, stops, pad, **ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_slots_and_rows_pass_2_to_the_31(device):
    """A block's number times its size passes 2**31 in a cache of a few tokens more."""
    context = torch.tensor([20], device=device, dtype=torch.int32)
    first_row = torch.tensor([2**33], device=device)
    table = torch.tensor([[7, 2**30]], device=device, dtype=torch.int32)
    positions, slots, _ = launch_begin_step(context, first_row, table, block_size=BLOCK_SIZE)
    assert slots.tolist() == [2**30 * BLOCK_SIZE + 4] and positions.tolist() == [2**33 + 20]


def test_ops_run_their_implementations(device):
    state = make_state(5, device)
    got = begin_step(*state, block_size=BLOCK_SIZE)
    wanted = begin_step_reference(*state, block_size=BLOCK_SIZE)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    args, ours = make_end(5, device)
    _, theirs = make_end(5, device)
    assert end_step(*args, **ours) is None
    end_step_reference(*args, **theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"context": torch.ones(3)}, TypeError, "context must be torch.int32"),
        ({"first_row": torch.ones(2).long()}, ValueError, r"first_row must be \(3,\)"),
        ({"block_table": torch.ones(3).int()}, ValueError, r"block_table must be \(3, 1\)"),
        ({"block_table": torch.ones(2, 3).int().t()}, ValueError, r"strides \(1, 3\)"),
    ],
)
def test_bad_arguments_of_begin_step_are_named(change, error, says):
    names = ("context", "first_row", "block_table")
    args = dict(zip(names, make_state(3, "cpu"), strict=True)) | change
    with pytest.raises(error, match=f"^begin_step: .*{says}"):
        begin_step(**args, block_size=BLOCK_SIZE)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"status": torch.ones(3).long()}, TypeError, "status must be torch.int32"),
        ({"tokens": torch.ones(4).long()}, ValueError, r"tokens must be \(3,\).*got \(4,\)"),
        ({"pad": torch.ones(1).long()}, ValueError, r"pad must be \(\)"),
        ({"seen": torch.ones(3, 11)}, TypeError, "seen must be torch.bool"),
        ({"generated": torch.ones(3, device="meta").int()}, ValueError, "on cpu; .* on meta"),
    ],
)
def test_bad_arguments_of_end_step_are_named(change, error, says):
    args, written = make_end(3, "cpu")
    names = ("sampled", "status", "context_len", "stop_tokens", "pad")
    with pytest.raises(error, match=f"^end_step: .*{says}"):
        end_step(**dict(zip(names, args, strict=True)) | written | change)
