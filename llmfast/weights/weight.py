"""The interfaces of weights: as checkpoints store them, and as linear layers run them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch


class Weight(Protocol):
    """The weight ``[n, k]`` of a linear layer (n outputs, k inputs) as its kernel reads it."""

    @property
    def n(self) -> int: ...

    @property
    def k(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        ...

    @property
    def label(self) -> str:
        """The form as results name it: ``bf16``, ``int4-g64``."""
        ...

    @property
    def form(self) -> Hashable:
        """All that the choice of a kernel depends on, but sizes.

        Layers whose weights have equal forms share a verification.
        """
        ...

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return ``x @ weight.T + bias`` for ``x [..., k]``: ``[..., n]``."""
        ...

    def gated(self, x: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
        """Return ``activation(gate) * up`` for ``x [..., k]``: ``[..., n / 2]``.

        The weight's first n / 2 rows make ``gate``, the others ``up``. ``activation`` is ``silu``,
        ``gelu_tanh`` or ``gelu``.
        """
        ...

    def rows(self, start: int, stop: int) -> Weight:
        """Return the outputs from ``start`` to ``stop`` as a view, which takes no memory."""
        ...

    def dequantize(self) -> torch.Tensor:
        """Return the weight ``[n, k]`` in the dtype of the layer's inputs."""
        ...


class StoredWeight(Protocol):
    """The weight ``[n, k]`` of a linear layer as checkpoints and quantization methods give it."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def format(self) -> str:
        """The key of its packed form in :data:`.registry.FORMATS`."""
        ...

    @property
    def label(self) -> str:
        """As :attr:`Weight.label`."""
        ...

    def to(self, device: torch.device | str) -> StoredWeight: ...

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor: ...

    def concatenate(self, others: Sequence[Any]) -> StoredWeight:
        """Return one weight with the outputs of this one, then those of ``others``.

        Raises:
            ValueError: a weight of another form.
        """
        ...


class PackedWeight(Weight, Protocol):
    """A weight that is packed from a :class:`StoredWeight`."""

    format: ClassVar[str]  # its key in FORMATS
    description: ClassVar[str]  # for messages: "four bits"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the layer's inputs and outputs."""
        ...

    @property
    def device(self) -> torch.device: ...

    def rows(self, start: int, stop: int) -> PackedWeight: ...

    @classmethod
    def pack(cls, stored: Any, dtype: torch.dtype) -> PackedWeight:
        """Pack ``stored`` on its device, for inputs of ``dtype``.

        Raises:
            ValueError: the kernel cannot multiply with it there, or ``dtype`` cannot hold it.
        """
        ...

    @classmethod
    def packed_bytes(cls, n: int, k: int, group_size: int | None, symmetric: bool) -> int:
        """Return the bytes of a packed weight ``[n, k]``; ``group_size`` None: one scale a row."""
        ...

    @classmethod
    def prefill_note(cls, arch: str) -> str:
        """Return how fast a step of hundreds of tokens is on ``arch``: "slower than in 16 bits"."""
        ...


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear layer: ``x @ weight.T + bias``."""

    weight: Weight
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's outputs for ``x [..., k]``."""
        return self.weight.linear(x, self.bias)

    def gated(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """Return ``activation(gate) * up``; see :meth:`Weight.gated`."""
        return self.weight.gated(x, self.bias, activation)
