"""Tensors between bands of a known number, which reveal stray reads and writes."""

import torch

BAND = 4096  # elements on each side of a tensor; more than any program's overhang
UNWRITTEN = 7.0  # value of the bands of results


def guarded(values, band):
    """Return a copy of ``values`` between two bands of ``band``, and the whole buffer."""
    size = values.numel() + 2 * BAND
    buffer = torch.full((size,), band, dtype=values.dtype, device=values.device)
    inner = buffer[BAND:-BAND].view(values.shape)
    inner.copy_(values)
    return inner, buffer


def guard_all(arguments, band):
    """Put every tensor of an operation's arguments between bands.

    A stray read gives NaN, or numbers that are far off. ``band`` is the value for integers.
    """

    def guard(value):
        if not isinstance(value, torch.Tensor):
            return value
        return guarded(value, float("nan") if value.is_floating_point() else band)[0]

    return {name: guard(value) for name, value in arguments.items()}


class GuardedEmpty:
    """A stand-in for torch.empty: NaN between bands."""

    def __init__(self):
        self.buffers = []

    def __call__(self, shape, *, dtype, device):
        nans = torch.full(shape, float("nan"), dtype=dtype, device=device)
        inner, buffer = guarded(nans, UNWRITTEN)
        self.buffers.append(buffer)
        return inner

    def assert_bands_are_whole(self, *sizes):
        """Assert that results have ``sizes`` elements and that nothing was written beside them."""
        assert [len(buffer) - 2 * BAND for buffer in self.buffers] == list(sizes)
        for buffer in self.buffers:
            assert (buffer[:BAND] == UNWRITTEN).all() and (buffer[-BAND:] == UNWRITTEN).all()
