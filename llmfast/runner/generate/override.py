"""``model.generate`` overridden: transformers prepares and checks a call, the executor decodes it.

transformers lets a call bring its own decoding loop (``custom_generate``). So defaults, checks,
expansion of the batch and errors stay its own, and calls that the executor cannot run take
transformers' own loop.
"""

from __future__ import annotations

import copy
import inspect
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from ...model.trace import NotTraced
from ..make_model import make_step_model
from ..step_model import StepModel
from .batch import StaticBatch
from .loop import decode

logger = logging.getLogger("llmfast")

# arguments of a call beside the parameters of a generation config
_ARGUMENTS = {
    "inputs",
    "input_ids",
    "attention_mask",
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "streamer",
    "tokenizer",
    "return_dict",
}
# parameters of a generation config that are left to transformers
_UNSUPPORTED = (
    "output_attentions",
    "output_hidden_states",
    "cache_implementation",
    "stop_strings",  # a loop that a call brings gets no tokenizer
    "token_healing",
)
_PLAIN_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


class GenerateOverride:
    """The state of a model whose ``generate`` is overridden; empty on a copy of the model."""

    def __init__(self, model: PreTrainedModel, step_model: StepModel) -> None:
        self.step_model: StepModel | None = step_model
        self.batch: StaticBatch | None = None
        self.unsupported: str | None = None  # why the model as it is now cannot be run
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._logged: set[str] = set()
        self._addresses = _addresses(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> GenerateOverride:
        return GenerateOverride._empty()

    def __reduce__(self) -> tuple[Any, ...]:
        return GenerateOverride._empty, ()

    @staticmethod
    def _empty() -> GenerateOverride:
        override = object.__new__(GenerateOverride)
        override.step_model = override.batch = override.unsupported = override._owner = None
        override._lock = threading.Lock()
        override._logged = set()
        override._addresses = ()
        return override

    @contextmanager
    def entered(self) -> Iterator[bool]:
        """Hold the batch. Yields False to a call from within a call, which cannot have it."""
        me = threading.get_ident()
        if self._owner == me:
            yield False
            return
        with self._lock:
            self._owner = me
            try:
                yield True
            finally:
                self._owner = None

    def log_once(self, reason: str) -> None:
        """Log why calls run transformers' own loop, each reason once."""
        if reason not in self._logged:
            self._logged.add(reason)
            logger.warning("llmfast: generate goes to transformers' own: %s", reason)

    def forget_reasons(self) -> None:
        """Log reasons again that were logged before."""
        self._logged.clear()

    def refresh(self, model: PreTrainedModel) -> str | None:
        """Rebuild the step model if the model's tensors or modules have changed.

        Returns:
            Why the model can no longer be run, or None.
        """
        if _addresses(model) != self._addresses:
            self.release()
            self.unsupported = None
            try:
                self.step_model = make_step_model(model)
            except NotTraced as error:
                self.unsupported = str(error)
            self._addresses = _addresses(model)
        return self.unsupported

    def batch_for(self, rows: int, length: int, blocks: int) -> StaticBatch:
        """Return the batch, larger than before where the call needs more room."""
        assert self.step_model is not None
        old = self.batch
        if old is None or not old.has_room(rows, length, blocks):
            self.batch = None
            if old is not None:
                rows, length = max(rows, old.max_rows), max(length, old.max_length)
                blocks = max(blocks, old.num_blocks)
                old.close()
                del old
            self.batch = StaticBatch(
                self.step_model, max_rows=rows, max_length=length, num_blocks=blocks
            )
        assert self.batch is not None
        return self.batch

    def release(self) -> None:
        """Free all memory, and restore the model's own tensors."""
        if self.batch is not None:
            self.batch.close()
        if self.step_model is not None:
            self.step_model.restore()
        self.batch = self.step_model = None


def _addresses(model: PreTrainedModel) -> tuple[int, ...]:
    """Return the addresses of a model's tensors and modules, which a step model depends on."""
    modules = list(model.modules())
    return (
        *(id(module) for module in modules),
        *(id(vars(module).get("forward")) for module in modules),
        *(tensor.data_ptr() for tensor in model.parameters()),
    )


def install(model: PreTrainedModel, step_model: StepModel) -> GenerateOverride:
    """Run ``model.generate`` on ``step_model``. A partial survives deepcopy and pickling."""
    override = GenerateOverride(model, step_model)
    model.generate = partial(generate, model, override)
    return override


def override_of(model: PreTrainedModel) -> GenerateOverride | None:
    """Return what :func:`install` put on a model; None if its ``generate`` is not ours."""
    own = vars(model).get("generate")
    if isinstance(own, partial) and own.func is generate:
        override: GenerateOverride = own.args[1]
        return override
    return None


def uninstall(model: PreTrainedModel) -> None:
    """Undo :func:`install`, if the model's ``generate`` is ours."""
    override = override_of(model)
    if override is not None:
        del model.generate
        with override.entered():  # not in the middle of another thread's call
            override.release()


def generate(model: PreTrainedModel, override: GenerateOverride, *args: Any, **kwargs: Any) -> Any:
    """Generate with transformers' own arguments and results."""
    original = partial(type(model).generate, model)
    named = inspect.signature(original).bind(*args, **kwargs).arguments
    kwargs = named.pop("kwargs", {}) | named
    reason = _why_not(model, kwargs)
    if reason is not None:
        override.log_once(reason)
        return original(**kwargs)
    # tensors made here outlive the call, and a later one may be in another mode
    with override.entered() as free, torch.inference_mode(False), torch.no_grad():
        if not free:
            override.log_once("it is called from within another call of the same model")
            return original(**kwargs)
        reason = override.refresh(model)
        if reason is not None:
            override.log_once(reason)
            return original(**kwargs)
        streamer = kwargs.get("streamer")
        loop = partial(decode, override=override, streamer=streamer)
        return original(**kwargs, custom_generate=loop)


def _why_not(model: PreTrainedModel, kwargs: dict[str, Any]) -> str | None:
    """Return why a call goes to the original; None if it is supported."""
    given = {name: value for name, value in kwargs.items() if value is not None}
    config: GenerationConfig = given.get("generation_config") or model.generation_config
    known = set(vars(GenerationConfig())) | _ARGUMENTS
    for name in given:
        if name not in known:
            return f"the argument {name}"
    merged = copy.copy(model.generation_config)
    options = {k: v for k, v in vars(config).items() if v is not None}
    options |= {k: v for k, v in given.items() if k not in _ARGUMENTS}
    for name, value in options.items():
        setattr(merged, name, value)
    mode = merged.get_generation_mode(None)
    if mode not in _PLAIN_MODES:
        return str(mode.value).replace("_", " ")
    for name in _UNSUPPORTED:
        if getattr(merged, name, None):
            return name
    if merged.use_cache is False:
        return "use_cache=False"
    if merged.guidance_scale not in (None, 1):
        return "guidance_scale"
    ids = given.get("input_ids", given.get("inputs"))
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or 0 in ids.shape:
        return "input that is not a batch of token ids"
    mask = given.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        return "an attention mask of another shape than the input"
    if model.training:
        return "the model is in training mode"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast is on"
    if any(map(_is_hooked, model.modules())):
        return "a module has forward hooks"
    if ids.device != model.device:
        return f"input on {ids.device}, the model on {model.device}"
    return None


def _is_hooked(module: nn.Module) -> bool:
    """Return whether there are hooks other than those that output_hidden_states leaves behind."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    own = "transformers.utils.output_capturing"
    return any(getattr(hook, "__module__", None) != own for hook in hooks)
