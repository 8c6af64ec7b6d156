"""Measured launch constants, looked up by GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, TypeVar

from .device import Device

T = TypeVar("T")


class GpuTable(Generic[T]):
    """Values that were measured, one for each kind of GPU.

    A GPU takes the row of its exact name; else the row of its architecture and SM count; else the
    row of its architecture with the nearest SM count; else the default.
    """

    def __init__(
        self,
        rows: Mapping[tuple[str, int], T],
        *,
        default: T,
        by_name: Mapping[str, T] | None = None,
    ) -> None:
        """
        Args:
            rows: values by (architecture, SM count), for example ``("sm_90", 132)``.
            default: the value for an architecture without a row.
            by_name: values of single GPUs, by the name that CUDA reports.
        """
        self._rows = dict(rows)
        self._default = default
        self._by_name = dict(by_name or {})

    def of(self, device: Device) -> T:
        """Return the row of a GPU."""
        if device.name in self._by_name:
            return self._by_name[device.name]
        counts = [count for arch, count in self._rows if arch == device.arch]
        if not counts:
            return self._default
        return self._rows[device.arch, min(counts, key=lambda n: abs(n - device.sm_count))]
