"""Chunks of a prompt that take equally long: later ones attend to more, so they are smaller."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

# a pass over weights against one over keys, in the same number of operations, on an H100: matrix
# products reach 650 TFLOP/s, attention over a paged cache 400
_FASTER = 1.6


@dataclass(frozen=True)
class Pace:
    """What a token of a prompt costs beside its layers.

    Args:
        parity: tokens of context that cost as much to attend to as the layers of one token;
            infinite where attention costs nothing, or nobody knows.
    """

    parity: float = math.inf

    def elsewhere(self, tokens: int, context: int, other: int) -> int:
        """How many tokens behind ``other`` take as long as ``tokens`` behind ``context``.

        A token behind c others takes 1 + c / parity; this is the sum over the tokens, solved.
        """
        if self.parity == math.inf or context == other:
            return tokens
        here, there = self.parity + context, self.parity + other
        return round(math.sqrt(there * there + tokens * (2 * here + tokens)) - there)


def pace_of(model: Any) -> Pace:
    """The pace of a model of transformers, from its sizes.

    Only its ``nn.Linear`` modules are counted, and of attention only layers without a window.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    layers = getattr(config, "num_hidden_layers", None)
    if not heads or not layers:
        return Pace()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        layers = sum(kind == "full_attention" for kind in kinds)
    elif getattr(config, "sliding_window", None):
        layers = 0
    head = model.get_output_embeddings()
    weights = sum(
        module.in_features * module.out_features
        for module in model.modules()
        if module is not head and hasattr(module, "in_features")
    )
    if not layers or not weights:
        return Pace()
    # 2 operations a weight; of a token of context 2 for each number of a key, and of a value
    return Pace(2 * weights / (4 * heads * head_dim * layers) / _FASTER)
