"""``llmfast generate``: answer one prompt, token by token."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from . import options, ui

if TYPE_CHECKING:
    from .stream import TextStream

LEAST_TEMPERATURE = 1e-6  # logits divided by less overflow float32


@dataclass(frozen=True)
class GenerateOptions:
    """The options of one call of ``llmfast generate``. None: not given."""

    prompt: str
    model: str | None = None
    max_tokens: int = 200
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    raw: bool = False
    stats: bool = False

    def check(self) -> None:
        """Refuse options that no model could meet, before one is loaded.

        Raises:
            UserError: an empty prompt, or an option outside its range.
        """
        if not self.prompt.strip():
            raise UserError("the prompt is empty: give the text to answer, in quotes")
        try:
            self.prompt.encode()
        except UnicodeEncodeError:
            raise UserError("the prompt is not valid UTF-8") from None
        if self.max_tokens < 1:
            raise UserError(f"--max-tokens must be at least 1, got {self.max_tokens}")
        t = self.temperature
        if t is not None and t != 0 and not (LEAST_TEMPERATURE <= t < math.inf):
            raise UserError(
                f"--temperature must be 0 (greedy) or from {LEAST_TEMPERATURE:g} up, got {t}"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top-p must be more than 0 and at most 1, got {self.top_p}")
        if self.top_k is not None and self.top_k < 0:
            raise UserError(f"--top-k must be 0 (off) or more, got {self.top_k}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UserError(f"--min-p must be from 0 to 1, got {self.min_p}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise UserError(f"--seed must be from 0 to 2**63 - 1, got {self.seed}")

    def sampling_options(self) -> list[str]:
        """Return the names of the sampling options that were given, except temperature."""
        options = {
            "--top-p": self.top_p,
            "--top-k": self.top_k,
            "--min-p": self.min_p,
            "--seed": self.seed,
        }
        return [name for name, value in options.items() if value is not None]

    @property
    def greedy(self) -> bool:
        """Temperature 0, or no sampling option at all."""
        return self.temperature == 0 or (self.temperature is None and not self.sampling_options())


def generate_command(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to answer.")],
    model: options.Model = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 200,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    seed: options.SamplingSeed = None,
    raw: Annotated[bool, typer.Option("--raw", help="Apply no chat template.")] = False,
    stats: Annotated[
        bool,
        typer.Option("--stats", help="End with speed, memory and what was swapped, on stderr."),
    ] = False,
) -> None:
    """Answer PROMPT, token by token: greedy unless --temperature is above 0.

    With --top-p, --top-k, --min-p or --seed but no --temperature
    it samples at the model's own temperature, or 1.
    What is not given is as in the model's generation_config.
    """
    answer(
        GenerateOptions(
            prompt, model, max_tokens, temperature, top_p, top_k, min_p, seed, raw, stats
        )
    )


def answer(request: GenerateOptions) -> None:
    """Write the answer to stdout token by token; everything else goes to stderr.

    Raises:
        UserError: a bad option, a model that cannot be loaded, or a prompt that is too long.
    """
    request.check()
    if request.temperature == 0 and request.sampling_options():
        ui.note(
            f"--temperature 0 is greedy: {', '.join(request.sampling_options())} changes nothing"
        )

    import llmfast

    started = time.perf_counter()
    model, tokenizer = ui.load(request.model)  # imports torch and transformers, under its bar
    loaded = time.perf_counter()
    ids = encode(tokenizer, request.prompt, raw=request.raw)
    max_tokens = _room(model, len(ids), request.max_tokens)
    with ui.progress("Compiling and verifying the kernels"):
        # on the CPU this swaps nothing: there transformers' own loop is faster than the runner
        report = llmfast.patch(model)
    patched = time.perf_counter()

    import torch

    from .stream import TextStream

    stream = TextStream(tokenizer, sys.stdout)
    if request.seed is not None:
        torch.manual_seed(request.seed)
    asked = torch.tensor([ids], device=model.device)
    try:
        model.generate(
            input_ids=asked,
            attention_mask=torch.ones_like(asked),
            max_new_tokens=max_tokens,
            streamer=stream,
            **_settings(model, tokenizer, request),
        )
    except KeyboardInterrupt:
        stream.end()  # writes pending text and the newline
        raise
    except torch.OutOfMemoryError as failure:
        raise UserError(f"the GPU's memory is too small: {failure}") from None
    if request.stats:
        _print_stats(stream, model, report, loaded - started, patched - loaded, patched, len(ids))


def encode(tokenizer: Any, prompt: str, *, raw: bool = False) -> list[int]:
    """Return the prompt's token ids, in the model's chat template unless ``raw``.

    Raises:
        UserError: the template fails, or the prompt has no tokens.
    """
    text, special = prompt, True
    if not raw and getattr(tokenizer, "chat_template", None):
        try:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
        except Exception as failure:  # a template is a program: it can raise anything
            raise UserError(
                f"the model's chat template failed ({failure}): --raw asks without it"
            ) from failure
        special = False  # the template contains them
    # verbose=False: the length is judged by `_room`, in one line
    ids: list[int] = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    if not ids:
        raise UserError("the prompt is empty: the tokenizer makes no token of it")
    return ids


def _room(model: Any, prompt_tokens: int, max_tokens: int) -> int:
    """Return how many tokens may follow the prompt: ``max_tokens`` or less, if the context ends.

    Raises:
        UserError: the prompt itself does not fit.
    """
    from ..model.sizes import ModelSizes

    context = ModelSizes.from_config(model.config).context_length
    if not context:
        return max_tokens  # no limit
    if prompt_tokens >= context:
        raise UserError(
            f"the prompt has {prompt_tokens} tokens, but the model's context holds {context}, "
            f"the answer included: shorten the prompt to at most {context - 1} tokens"
        )
    if prompt_tokens + max_tokens > context:
        ui.note(
            f"the prompt takes {prompt_tokens} of the context's {context} tokens: "
            f"at most {context - prompt_tokens} can follow, not {max_tokens}"
        )
    return min(max_tokens, context - prompt_tokens)


def _settings(model: Any, tokenizer: Any, request: GenerateOptions) -> dict[str, Any]:
    """Return the arguments of ``generate`` for sampling and stopping."""
    own = model.generation_config
    settings: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True}
    for place in (own, model.config.get_text_config(), tokenizer):
        ends = getattr(place, "eos_token_id", None)
        if ends is not None:
            settings["eos_token_id"] = ends
            break
    pad = own.pad_token_id if own.pad_token_id is not None else tokenizer.pad_token_id
    if pad is None and ends is not None:
        pad = ends[0] if isinstance(ends, list) else ends
    settings["pad_token_id"] = pad

    if request.greedy:
        # None: transformers warns of a sampling option, also the model's own, on a greedy call
        return (
            settings
            | dict.fromkeys(("temperature", "top_p", "top_k", "min_p"))
            | {"do_sample": False}
        )
    temperature = request.temperature
    if temperature is None:
        temperature = own.temperature or 1.0
    settings |= {"do_sample": True, "temperature": temperature}
    for name in ("top_p", "top_k", "min_p"):
        value = getattr(request, name)
        if value is not None:
            settings[name] = value
    return settings


def _print_stats(
    stream: TextStream,
    model: Any,
    report: Any,
    load_s: float,
    patch_s: float,
    asked_at: float,
    prompt_tokens: int,
) -> None:
    rate = stream.decode_tokens_per_s
    lines = {
        "prompt": f"{prompt_tokens} tokens",
        "time to first token": f"{stream.first_at - asked_at:.3f} s",
        "decode": "not measured: one token" if rate is None else f"{rate:.1f} tokens/s",
        "tokens out": f"{stream.count} (an end token included)",
        "decoded by": _decoded_by(model),
        "peak memory": _peak_memory(model.device),
        "load": f"{load_s:.2f} s",
        "patch": f"{patch_s:.2f} s",
        "swapped": f"{report.swapped} modules, {report.kept} kept",
    }
    print(file=sys.stderr)
    for name, value in lines.items():
        print(f"{name:<20} {value}", file=sys.stderr)
    print(f"\n{report}", file=sys.stderr)


def _decoded_by(model: Any) -> str:
    """Return which loop ran the model's latest ``generate``."""
    from ..runner.generate.override import override_of

    override = override_of(model)
    if override is None or override.batch is None:
        return "transformers' own loop"
    return "llmfast's runner" + (", CUDA graphs" if override.batch.executor.use_graphs else "")


def _peak_memory(device: Any) -> str:
    if device.type == "cuda":
        import torch

        return f"{torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB (GPU allocator)"
    try:
        import resource
    except ImportError:  # Windows
        return "not measured on this system"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return f"{peak * unit / 2**20:,.0f} MiB (process)"
