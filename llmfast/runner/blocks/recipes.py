"""The recipes: how a block's norms, mixer and feed-forward follow each other.

A block takes the residual stream in two parts, ``x`` and ``residual``, whose sum the next norm adds
in the same launch. ``residual`` is None if there is only one part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ...model.trace import Norm
from ...weights.dense import ReferenceWeight
from ...weights.weight import Linear
from .run import FeedForward, Mixer, Run

Stream = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Block:
    """A decoder layer: a mixer, a feed-forward part, and norms in the order of their use."""

    recipe: str
    norms: tuple[Norm, ...]
    mixer: Mixer
    feed_forward: FeedForward
    residual_scale: float = 1.0  # factor of both parts' outputs before they are added

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (*self.mixer.linears, *self.feed_forward.linears)

    def with_reference_weights(self) -> Block:
        """Return the same block, whose linear layers run in plain PyTorch."""

        def reference(layer: Linear) -> Linear:
            return replace(layer, weight=ReferenceWeight(layer.weight))

        return replace(
            self,
            mixer=self.mixer.map_linears(reference),
            feed_forward=self.feed_forward.map_linears(reference),
        )

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None, run: Run, layer: int
    ) -> Stream:
        return RECIPES[self.recipe](self, x, residual, run, layer)


def pre_norm(
    block: Block, x: torch.Tensor, residual: torch.Tensor | None, run: Run, layer: int
) -> Stream:
    """Run a block with a norm before each part: Llama, Mistral, Qwen, Phi-3, SmolLM3."""
    h, residual = run.add_norm(x, residual, block.norms[0])
    h = block.mixer(h, run, layer)
    h, residual = run.add_norm(h, residual, block.norms[1])
    return block.feed_forward(h, run), residual


def scaled_pre_norm(
    block: Block, x: torch.Tensor, residual: torch.Tensor | None, run: Run, layer: int
) -> Stream:
    """Run a pre-norm block whose outputs are scaled before they are added: Granite."""
    h, residual = run.add_norm(x, residual, block.norms[0])
    h = block.mixer(h, run, layer).mul_(block.residual_scale)
    h, residual = run.add_norm(h, residual, block.norms[1])
    return block.feed_forward(h, run).mul_(block.residual_scale), residual


def post_norm(
    block: Block, x: torch.Tensor, residual: torch.Tensor | None, run: Run, layer: int
) -> Stream:
    """Run a block with a norm after each part: OLMo2."""
    x = x if residual is None else x + residual
    h = run.norm(block.mixer(x, run, layer), block.norms[0])
    x = x + h
    return run.norm(block.feed_forward(x, run), block.norms[1]), x


def sandwich(
    block: Block, x: torch.Tensor, residual: torch.Tensor | None, run: Run, layer: int
) -> Stream:
    """Run a block with a norm before and after each part: Gemma 2 and 3."""
    h, residual = run.add_norm(x, residual, block.norms[0])
    h = run.norm(block.mixer(h, run, layer), block.norms[1])
    h, residual = run.add_norm(h, residual, block.norms[2])
    return run.norm(block.feed_forward(h, run), block.norms[3]), residual


RECIPES: dict[str, Callable[[Block, torch.Tensor, torch.Tensor | None, Run, int], Stream]] = {
    "pre-norm": pre_norm,
    "pre-norm, scaled": scaled_pre_norm,
    "post-norm": post_norm,
    "sandwich": sandwich,
}
# recipes by the number of norms before the mixer, between it and the feed-forward, and after that
BY_NORMS: dict[tuple[int, int, int], tuple[str, ...]] = {
    (1, 1, 0): ("pre-norm", "pre-norm, scaled"),
    (0, 1, 1): ("post-norm",),
    (1, 2, 1): ("sandwich",),
}
