"""``llmfast chat``: a conversation, turn by turn."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from . import options, ui
from .sampling import sampling_params

if TYPE_CHECKING:
    from ..engine.llm import LLM
    from ..engine.request import RequestOutput
    from ..engine.sampling_params import SamplingParams

COMMANDS = ("/reset", "/stats", "/quit")


def chat_command(
    model: options.Model = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 1024,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    seed: options.SamplingSeed = None,
) -> None:
    """Talk with a model: each line is answered with all before it in mind.

    /reset forgets the conversation, /stats shows what the last answer took, /quit (or the end of
    the input) ends. Ctrl-C ends an answer.
    """
    params = sampling_params(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
    )
    loaded, tokenizer = ui.load(model)
    from ..engine.llm import LLM

    with ui.quiet_log():
        with ui.progress("Preparing the model"):
            llm = LLM(loaded, tokenizer=tokenizer, max_num_seqs=1)
        with llm:
            Chat(llm, params, system).talk()


@dataclass
class Turn:
    """One answer and the seconds that it took."""

    output: RequestOutput
    seconds: float

    def __str__(self) -> str:
        metrics, tokens = self.output.metrics, len(self.output.outputs[0].token_ids)
        first = metrics.time_to_first_token
        lines = {
            "prompt": f"{len(self.output.prompt_token_ids)} tokens, "
            f"{metrics.cached_tokens} of them in the cache",
            "tokens out": f"{tokens} (an end token included)",
        }
        if first is not None:
            lines["time to first token"] = f"{first:.3f} s"
            if tokens > 1:
                lines["decode"] = f"{(tokens - 1) / (self.seconds - first):.1f} tokens/s"
        return "\n".join(f"{name:<20} {value}" for name, value in lines.items())


class Chat:
    """A conversation on stdin and stdout. Notes and statistics go to stderr."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None = None) -> None:
        """Begin a conversation, with a system message if ``system`` is given.

        Raises:
            UserError: the model has no chat template, or it fails.
        """
        self._llm = llm
        self._params = params
        self._opening: list[dict[str, Any]] = (
            [] if system is None else [{"role": "system", "content": system}]
        )
        self.messages = list(self._opening)
        self._last: Turn | None = None
        self._interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._prompt([*self.messages, {"role": "user", "content": "?"}])

    def _prompt(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        try:
            return self._llm.chat_prompt(messages)
        except UserError:
            raise
        except Exception as failure:  # a template is a program: it can raise anything
            raise UserError(f"the model's chat template failed: {failure}") from None

    def talk(self) -> None:
        """Read and answer lines until /quit or the end of the input."""
        if self._interactive:
            try:
                import readline  # noqa: F401  # input() edits lines with it
            except ImportError:  # Windows
                pass
        while True:
            try:
                line = input("> " if self._interactive else "").strip()
                if line == "/quit":
                    return
                self.take(line)
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                print()
                ui.note("/quit ends the conversation")

    def take(self, line: str) -> None:
        """Run a command, or answer a line that is none."""
        if line == "/reset":
            self.messages = list(self._opening)
        elif line == "/stats":
            print(self._last or "nothing was answered yet", file=sys.stderr)
        elif line.startswith("/"):
            ui.note(f"there is no {line.split()[0]}; there are {', '.join(COMMANDS)}")
        elif line:
            self.answer(line)

    def answer(self, line: str) -> None:
        """Answer a line, token by token."""
        asked = [*self.messages, {"role": "user", "content": line}]
        try:
            prompt = self._prompt(asked)
        except UserError as failure:
            ui.note(str(failure))
            return
        started, shown, output = time.perf_counter(), "", None
        stream = self._llm.stream(prompt, self._params)
        try:
            for output in stream:
                text = output.outputs[0].text
                sys.stdout.write(text[len(shown) :])
                sys.stdout.flush()
                shown = text
        except KeyboardInterrupt:
            stream.close()
        if output is None:  # interrupted before its first token
            return
        if output.outputs[0].error is not None:
            ui.note(f"{output.outputs[0].error}; /reset begins a new conversation")
            return
        self.messages = [*asked, {"role": "assistant", "content": shown}]
        print(flush=True)
        self._last = Turn(output, time.perf_counter() - started)
