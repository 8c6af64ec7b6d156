"""``model.generate`` taken over: transformers prepares and checks a call, the runner decodes it.

transformers lets a call bring its own decoding loop (``custom_generate``). So defaults, checks,
expansion of the batch and errors stay its own, and what the runner cannot do goes the usual way.
"""

from __future__ import annotations

import copy
import inspect
import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.configuration_utils import GenerationMode

from llmfast_kernels.decode_step import NO_TOKEN

from ..errors import UserError
from ..model.trace import NotTraced
from .cache import BLOCK_SIZE
from .model import StepModel, make_step_model
from .runner import MAX_STOP_TOKENS, Runner, Sampling

logger = logging.getLogger("llmfast")

# what a call may hold beside the parameters of a generation config
_TAKEN = {
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
# parameters of a generation config that the runner leaves to transformers
_LEFT = (
    "output_attentions",
    "output_hidden_states",
    "cache_implementation",
    "stop_strings",  # it gives a loop that is brought no tokenizer
    "token_healing",
)
_PLAIN_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_AHEAD = 2  # steps that the host lets a GPU be ahead of what it has read


class Takeover:
    """What a model carries whose ``generate`` runs here. A copy of the model gets an empty one."""

    def __init__(self, model: PreTrainedModel, blocks: StepModel) -> None:
        self.blocks: StepModel | None = blocks
        self.runner: Runner | None = None
        self.why_not: str | None = None
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._logged: set[str] = set()
        self._parameters = _addresses(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> Takeover:
        return Takeover._empty()

    def __reduce__(self) -> tuple[Any, ...]:
        return Takeover._empty, ()

    @staticmethod
    def _empty() -> Takeover:
        takeover = object.__new__(Takeover)
        takeover.blocks = takeover.runner = takeover.why_not = takeover._owner = None
        takeover._lock = threading.Lock()
        takeover._logged = set()
        takeover._parameters = ()
        return takeover

    @contextmanager
    def entered(self) -> Iterator[bool]:
        """Hold the runner; yields False to a call from within a call, which cannot have it."""
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
        if reason not in self._logged:
            self._logged.add(reason)
            logger.warning("llmfast: generate goes to transformers' own: %s", reason)

    def follow(self, model: PreTrainedModel) -> str | None:
        """Look at the model anew if its tensors or modules are others; why it cannot be run."""
        if _addresses(model) != self._parameters:
            self.release()
            self.why_not = None
            try:
                self.blocks = make_step_model(model)
            except NotTraced as error:
                self.why_not = str(error)
            self._parameters = _addresses(model)
        return self.why_not

    def runner_for(self, rows: int, length: int, blocks: int) -> Runner:
        """The runner, grown where the call wants more room."""
        assert self.blocks is not None
        old = self.runner
        if old is None or not old.has_room(rows, length, blocks):
            self.runner = None
            if old is not None:
                rows, length = max(rows, old.max_rows), max(length, old.max_length)
                blocks = max(blocks, old.cache.num_blocks)
                old.close()
                del old
            self.runner = Runner(self.blocks, max_rows=rows, max_length=length, num_blocks=blocks)
        assert self.runner is not None
        return self.runner

    def release(self) -> None:
        """Give back all memory, and to the model tensors of its own."""
        if self.runner is not None:
            self.runner.close()
        if self.blocks is not None:
            self.blocks.restore()
        self.runner = self.blocks = None


def _addresses(model: PreTrainedModel) -> tuple[int, ...]:
    """Where every tensor of a model is, and which modules hold them: what a runner depends on."""
    modules = list(model.modules())
    return (
        *(id(module) for module in modules),
        *(id(vars(module).get("forward")) for module in modules),
        *(tensor.data_ptr() for tensor in model.parameters()),
    )


def take_over(model: PreTrainedModel, blocks: StepModel) -> Takeover:
    """Let ``model.generate`` run on ``blocks``. A partial survives deepcopy and pickling."""
    takeover = Takeover(model, blocks)
    model.generate = partial(generate, model, takeover)
    return takeover


def takeover_of(model: PreTrainedModel) -> Takeover | None:
    """What :func:`take_over` left on a model; None if its ``generate`` is not from here."""
    taken = vars(model).get("generate")
    if isinstance(taken, partial) and taken.func is generate:
        takeover: Takeover = taken.args[1]
        return takeover
    return None


def give_back(model: PreTrainedModel) -> None:
    """Undo :func:`take_over`, if that is what the model's ``generate`` is from."""
    takeover = takeover_of(model)
    if takeover is not None:
        del model.generate
        with takeover.entered():  # not in the middle of another thread's call
            takeover.release()


def generate(model: PreTrainedModel, takeover: Takeover, *args: Any, **kwargs: Any) -> Any:
    """``model.generate`` with transformers' own arguments and results."""
    original = partial(type(model).generate, model)
    named = inspect.signature(original).bind(*args, **kwargs).arguments
    kwargs = named.pop("kwargs", {}) | named
    reason = _why_not(model, kwargs)
    if reason is not None:
        takeover.log_once(reason)
        return original(**kwargs)
    # what is made here outlives the call, and a later one may be in another mode
    with takeover.entered() as free, torch.inference_mode(False), torch.no_grad():
        if not free:
            takeover.log_once("it is called from within another call of the same model")
            return original(**kwargs)
        reason = takeover.follow(model)
        if reason is not None:
            takeover.log_once(reason)
            return original(**kwargs)
        streamer = kwargs.get("streamer")
        loop = partial(_decode, takeover=takeover, streamer=streamer)
        return original(**kwargs, custom_generate=loop)


def _why_not(model: PreTrainedModel, kwargs: dict[str, Any]) -> str | None:
    """Why a call goes to the original; None if the runner takes it."""
    given = {name: value for name, value in kwargs.items() if value is not None}
    config: GenerationConfig = given.get("generation_config") or model.generation_config
    known = set(vars(GenerationConfig())) | _TAKEN
    for name in given:
        if name not in known:
            return f"the argument {name}"
    merged = copy.copy(model.generation_config)
    options = {k: v for k, v in vars(config).items() if v is not None}
    options |= {k: v for k, v in given.items() if k not in _TAKEN}
    for name, value in options.items():
        setattr(merged, name, value)
    mode = merged.get_generation_mode(None)
    if mode not in _PLAIN_MODES:
        return str(mode.value).replace("_", " ")
    for name in _LEFT:
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
    """Whether there are hooks beside those that transformers leaves after output_hidden_states."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    own = "transformers.utils.output_capturing"
    return any(getattr(hook, "__module__", None) != own for hook in hooks)


# ------------------------------------------------------------------------------------- decoding


def _decode(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: Sequence[Any],
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: Any = None,
    *,
    takeover: Takeover,
    **model_kwargs: Any,
) -> Any:
    """The decoding loop that a call brings: transformers gives it what it has prepared."""
    config = generation_config
    rows, padded = input_ids.shape
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    if not bool(mask[:, -1:].all() & (mask[:, 1:] >= mask[:, :-1]).all()):
        takeover.log_once("the attention mask is not one of left padding")
        return type(model)._sample(
            model,
            input_ids,
            logits_processor,
            stopping_criteria,
            config,
            synced_gpus,
            streamer,
            **model_kwargs,
        )
    lengths = mask.sum(1).tolist()
    max_length = min(c.max_length for c in stopping_criteria if type(c) is MaxLengthCriteria)
    padding = [padded - length for length in lengths]
    sampling = _read(config, logits_processor, stopping_criteria, padded, padding)
    wants_dict = config.return_dict_in_generate
    if wants_dict and (config.output_scores or config.output_logits):
        sampling = None
    new_tokens = max(max_length - padded, 1)
    longest = max(lengths) + new_tokens
    blocks = sum(-(-(length + new_tokens) // BLOCK_SIZE) for length in lengths)
    runner = takeover.runner_for(rows, longest, blocks)
    seeds = padding_seen = None
    if config.do_sample and sampling is not None:
        # the same after the same torch.manual_seed
        seeds = torch.randint(2**63 - 1, (rows,), device="cpu").to(model.device)
    if _counts_padding(logits_processor):
        padding_seen = ((~mask).nonzero()[:, 0], input_ids[~mask])
    try:
        runner.start(
            input_ids[mask],
            lengths,
            new_tokens,
            sampling or Sampling(),
            seeds,
            also_seen=padding_seen,
            host_samples=sampling is None,
        )
        if sampling is None:
            return _host_loop(
                runner, input_ids, logits_processor, stopping_criteria, config, streamer
            )
        tokens = device_loop(runner, new_tokens, sampling, streamer)
    finally:
        runner.end()
    if streamer is not None:
        streamer.end()
    sequences = torch.cat([input_ids, tokens.to(input_ids.device)], dim=1)
    return GenerateDecoderOnlyOutput(sequences=sequences) if wants_dict else sequences


def device_loop(runner: Runner, new_tokens: int, sampling: Sampling, streamer: Any) -> torch.Tensor:
    """Step until every row is done. Of a GPU the host reads tokens a step after they are made."""
    read = _Reader(runner)
    read.copy()
    stops = torch.tensor(sampling.stop_tokens, device="cpu")
    done = torch.zeros(len(runner.host_tokens()), dtype=torch.bool, device="cpu")
    columns: list[torch.Tensor] = []
    ahead = _AHEAD if runner.device.type == "cuda" else 1
    for launched in range(1, new_tokens + 1):
        while len(read) and (len(read) >= ahead or launched == new_tokens):
            column = read.next()
            _refuse(column < NO_TOKEN)
            columns.append(column)
            if streamer is not None:
                streamer.put(column)
            done |= torch.isin(column, stops)
            if bool(done.all()):
                return torch.stack(columns, dim=1)
        if launched < new_tokens:
            runner.step()
            read.copy()
    return torch.stack(columns, dim=1)


class _Reader:
    """Tokens on their way to the host, copied behind the step that made them."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._cuda = runner.device.type == "cuda"
        self._waiting: deque[tuple[torch.Tensor, Any]] = deque()
        rows = len(runner.host_tokens())
        self._buffers = [
            torch.empty(rows, dtype=torch.int64, device="cpu", pin_memory=self._cuda)
            for _ in range(_AHEAD + 1)
        ]
        self._copied = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def copy(self) -> None:
        buffer = self._buffers[self._copied % len(self._buffers)]
        buffer.copy_(self._runner.host_tokens(), non_blocking=True)
        event = None
        if self._cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._runner.device))
        self._waiting.append((buffer, event))
        self._copied += 1

    def next(self) -> torch.Tensor:
        buffer, event = self._waiting.popleft()
        if event is not None:
            event.synchronize()
        return buffer.clone()


def _host_loop(
    runner: Runner,
    input_ids: torch.Tensor,
    processors: Any,
    criteria: Any,
    config: GenerationConfig,
    streamer: Any,
) -> Any:
    """The user's own processors or criteria run between the steps, as in transformers' loop."""
    rows = len(input_ids)
    has_stops = any(hasattr(c, "eos_token_id") for c in criteria)
    keeps_scores = config.return_dict_in_generate and config.output_scores
    unfinished = torch.ones(rows, dtype=torch.bool, device=input_ids.device)
    all_scores: list[torch.Tensor] = []
    all_logits: list[torch.Tensor] = []
    while True:
        logits = runner.logits().to(torch.float32, copy=True)
        scores = processors(input_ids, logits)
        if keeps_scores:
            all_scores.append(scores)
        if config.output_logits:
            all_logits.append(logits)
        weights = torch.softmax(scores, dim=-1) if config.do_sample else scores
        _refuse(weights.isnan().any(-1))
        tokens = weights.multinomial(1)[:, 0] if config.do_sample else weights.argmax(-1)
        if has_stops:
            tokens = torch.where(unfinished, tokens, _pad(config))
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        unfinished &= ~criteria(input_ids, tuple(all_scores) if keeps_scores else None)
        if not bool(unfinished.any()):
            break
        runner.feed(tokens)  # of the rows that are done too: their scores are wanted, or tokens
        runner.step()
    if streamer is not None:
        streamer.end()
    if not config.return_dict_in_generate:
        return input_ids
    return GenerateDecoderOnlyOutput(
        sequences=input_ids,
        scores=tuple(all_scores) if keeps_scores else None,
        logits=tuple(all_logits) if config.output_logits else None,
    )


def _refuse(broken: torch.Tensor) -> None:
    """Raise if a row had no token to choose."""
    if bool(broken.any()):
        row = int(broken.nonzero()[0])
        raise UserError(f"generate: the logits of row {row} are NaN or infinite, or all are -inf")


# -------------------------------------------------------------------- reading what was prepared


def _read(
    config: GenerationConfig,
    processors: Sequence[Any],
    criteria: Sequence[Any],
    padded: int,
    padding: list[int],
) -> Sampling | None:
    """How to sample on the device; None where the host has to."""
    stops: tuple[int, ...] = ()
    for criterion in criteria:
        if type(criterion) is EosTokenCriteria:
            stops += tuple(criterion.eos_token_id.flatten().tolist())
        elif type(criterion) is not MaxLengthCriteria:
            return None
    if len(stops) > MAX_STOP_TOKENS:
        return None
    options: dict[str, Any] = {"temperature": 1.0 if config.do_sample else 0.0}
    stage = 0
    for processor in processors:
        place = _ORDER.get(type(processor), 0)
        if place <= stage and not (place == stage == _BARRING):
            return None
        stage = place
        if type(processor) is RepetitionPenaltyLogitsProcessor:
            ignored = processor.prompt_ignore_length
            if isinstance(ignored, int) or (ignored is not None and ignored.tolist() != padding):
                return None
            options["repetition_penalty"] = float(processor.penalty)
        elif place == _BARRING:
            if set(processor.eos_token_id.flatten().tolist()) != set(stops):
                return None
            least = (
                processor.min_new_tokens - (padded - processor.prompt_length_to_skip)
                if type(processor) is MinNewTokensLengthLogitsProcessor
                else processor.min_length - padded
            )
            options["min_new_tokens"] = max(options.get("min_new_tokens", 0), least)
        elif not config.do_sample or getattr(processor, "filter_value", _OUT) != _OUT:
            return None
        elif type(processor) is TemperatureLogitsWarper:
            options["temperature"] = float(processor.temperature)
        elif type(processor) is TopKLogitsWarper:
            options["top_k"] = int(processor.top_k)
        elif processor.min_tokens_to_keep != 1:
            return None
        elif type(processor) is TopPLogitsWarper:
            options["top_p"] = float(processor.top_p)
        else:
            options["min_p"] = float(processor.min_p)
    return Sampling(stop_tokens=stops, pad_token=_pad(config), **options)


_OUT = -float("inf")
_BARRING = 2
_ORDER: dict[type, int] = {
    RepetitionPenaltyLogitsProcessor: 1,
    MinLengthLogitsProcessor: _BARRING,
    MinNewTokensLengthLogitsProcessor: _BARRING,
    TemperatureLogitsWarper: 3,
    TopKLogitsWarper: 4,
    TopPLogitsWarper: 5,
    MinPLogitsWarper: 6,
}


def _counts_padding(processors: Sequence[Any]) -> bool:
    """Whether transformers' repetition penalty is on padding too, as in older versions."""
    penalties = [p for p in processors if type(p) is RepetitionPenaltyLogitsProcessor]
    return any(p.prompt_ignore_length is None for p in penalties)


def _pad(config: GenerationConfig) -> int:
    pad = config._pad_token_tensor
    return 0 if pad is None else int(pad)
