"""Sizes of prompt chunks: later chunks attend to more context, so they are smaller."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..model.costs import attention_flops, linear_flops
from ..model.sizes import ModelSizes

# speed of matrix products over that of paged attention on an H100: 650 against 400 TFLOP/s
_MATMUL_SPEEDUP = 1.6


@dataclass(frozen=True)
class ChunkSizer:
    """A cost model of prompt tokens: one unit for the layers, more for the context.

    Args:
        attention_parity: tokens of context that cost as much to attend to as the layers of one
            token; infinite if attention costs nothing or its cost is unknown.
    """

    attention_parity: float = math.inf

    def equal_cost_tokens(self, tokens: int, context: int, other: int) -> int:
        """Return how many tokens behind ``other`` tokens cost as much as ``tokens`` do.

        A token behind c others costs 1 + c / attention_parity. The result equates the two sums.

        Args:
            tokens: of a chunk.
            context: tokens before that chunk.
            other: tokens before the chunk whose size is wanted.
        """
        if self.attention_parity == math.inf or context == other:
            return tokens
        here, there = self.attention_parity + context, self.attention_parity + other
        return round(math.sqrt(there * there + tokens * (2 * here + tokens)) - there)


def chunk_sizer_of(model: Any) -> ChunkSizer:
    """Return the chunk sizer of a transformers model, from its sizes.

    Linear modules other than the head count, and attention layers without a window.
    """
    linear = linear_flops(model)
    attention = attention_flops(ModelSizes.from_config(model.config))
    if not attention or not linear:
        return ChunkSizer()
    return ChunkSizer(linear / attention / _MATMUL_SPEEDUP)
