"""``llmfast run``: answer a file of prompts."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UserError
from . import options, ui
from .sampling import sampling_params

if TYPE_CHECKING:
    from ..engine.llm import LLM
    from ..engine.request import CompletionOutput, RequestOutput
    from ..engine.sampling_params import SamplingParams

Key = int | tuple[str, str | int]  # a line's index, or ("id", its id)


@dataclass(frozen=True)
class Line:
    """One request of the file."""

    index: int  # from 0
    id: str | int | None
    prompt: str | None
    messages: list[dict[str, Any]] | None
    params: SamplingParams

    @property
    def key(self) -> Key:
        return _key(self.index, self.id)


def _key(index: int, own: str | int | None) -> Key:
    return index if own is None else ("id", own)


def run_command(
    prompts: Annotated[
        Path, typer.Argument(metavar="PROMPTS", help="A line of JSON for each request.")
    ],
    out: Annotated[
        Path,
        typer.Option(help="The answers, one line of JSON each, in the order in which they finish."),
    ],
    model: options.Model = None,
    max_tokens: Annotated[int, typer.Option(help="For lines that do not say.")] = 200,
    temperature: Annotated[
        float, typer.Option(help="For lines that do not say; 0 is greedy.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="A line without a seed gets this plus its index.")] = 0,
    max_num_seqs: Annotated[
        int, typer.Option(help="Answers that are generated at the same time.")
    ] = 256,
) -> None:
    """Answer a file of prompts, many at once; lines that are answered already are left out.

    A line has "prompt" (a text, taken as it is) or "messages" (for the chat template), may have an
    "id", and sampling parameters by name. Run again after an interruption, it goes on.
    """
    if max_num_seqs < 1:
        raise UserError(f"--max-num-seqs must be at least 1, got {max_num_seqs}")
    if not prompts.is_file():
        raise UserError(f"there is no file {prompts}")
    if not out.parent.is_dir():
        raise UserError(f"--out: there is no folder {out.parent}")
    if out.is_dir():
        raise UserError(f"--out: {out} is a folder")
    if out.exists() and out.samefile(prompts):
        raise UserError("--out is the file of prompts: give another one")
    defaults = {"max_tokens": max_tokens, "temperature": temperature}
    sampling_params(**defaults, seed=seed)  # refuses bad options once, not line by line
    bad: dict[int, str] = {}
    lines = list(read_lines(prompts, defaults, seed, bad))
    answered_before = repair(out)
    waiting = [line for line in lines if line.key not in answered_before]
    if waiting:
        loaded, tokenizer = ui.load(model)
        from ..engine.llm import LLM

        with ui.quiet_log():
            with LLM(loaded, tokenizer=tokenizer, max_num_seqs=max_num_seqs) as llm:
                _answer(llm, waiting, out, bad, ahead=2 * max_num_seqs)
    for index, why in sorted(bad.items()):
        ui.note(f"{prompts}, line {index + 1}: {why}")
    done = len(lines) - len(waiting)
    answered = len(waiting) - sum(line.index in bad for line in waiting)
    print(f"{out}: {answered} answered, {done} were there already", file=sys.stderr)
    if bad:
        raise UserError(f"{len(bad)} of the lines could not be answered")


def read_lines(
    path: Path, defaults: dict[str, Any], seed: int, bad: dict[int, str]
) -> Iterator[Line]:
    """Yield the requests of a file. Put index and reason of each malformed line into ``bad``."""
    keys: set[Key] = set()
    with path.open("rb") as file:
        for index, raw in enumerate(file):
            if not raw.strip():
                continue
            try:
                line = _parse(json.loads(raw), index, defaults, seed)
                if line.key in keys:
                    raise ValueError(f"the id {line.id!r} is on an earlier line")
            except json.JSONDecodeError as error:
                bad[index] = f"not JSON: {error}"
            except (ValueError, TypeError, RecursionError) as error:  # bad UTF-8 too
                bad[index] = str(error)
            else:
                keys.add(line.key)
                yield line


def _parse(data: Any, index: int, defaults: dict[str, Any], seed: int) -> Line:
    from ..engine.sampling_params import SamplingParams

    if not isinstance(data, dict):
        raise ValueError(f"wanted an object, got {type(data).__name__}")
    given = dict(data)
    own, prompt, messages = (given.pop(name, None) for name in ("id", "prompt", "messages"))
    if isinstance(own, bool) or not isinstance(own, str | int | None):
        raise ValueError(f"id must be a text or an integer, got {own!r}")
    if isinstance(own, str):
        own.encode()  # raises on a lone surrogate, which no UTF-8 file can hold
    if (prompt is None) == (messages is None):
        raise ValueError("wanted either prompt or messages")
    if not isinstance(prompt, str | None):
        raise ValueError(f"prompt must be a text, got {type(prompt).__name__}")
    if prompt is not None:
        prompt.encode()
    if messages is not None and not (
        isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)
    ):
        raise ValueError("messages must be a list of objects, not empty")
    if isinstance(given.get("logit_bias"), dict):  # JSON has only text keys
        given["logit_bias"] = {int(token): by for token, by in given["logit_bias"].items()}
    known = {field.name for field in fields(SamplingParams)}
    if unknown := sorted(given.keys() - known):
        raise ValueError(f"it has an unexpected keyword argument {unknown[0]!r}")
    params = SamplingParams(**{**defaults, "seed": seed + index, **given})
    return Line(index, own, prompt, messages, params)


def repair(path: Path) -> set[Key]:
    """Return the keys of the answers in a file, and cut off a torn last line.

    Raises:
        UserError: the file holds something else than answers.
    """
    keys: set[Key] = set()
    if not path.exists():
        return keys
    end, torn, ends_well = 0, False, True
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            ends_well = raw.endswith(b"\n")
            try:
                data = json.loads(raw)
                keys.add(_key(data["index"], data.get("id")))
            except (ValueError, TypeError, KeyError, AttributeError):
                if not ends_well:
                    torn = True
                    break
                raise UserError(
                    f"--out: line {number} of {path} is no answer: give another file"
                ) from None
            end += len(raw)
    if torn:
        with path.open("r+b") as file:
            file.truncate(end)
        ui.note(f"{path}: its last line was torn, and is answered again")
    elif not ends_well:  # only the newline is missing
        with path.open("ab") as file:
            file.write(b"\n")
    return keys


def _answer(llm: LLM, lines: list[Line], out: Path, bad: dict[int, str], *, ahead: int) -> None:
    from ..engine.offline import answer_all

    def asked() -> Iterator[tuple[Line, Any, SamplingParams]]:
        for line in lines:
            try:
                prompt = line.prompt if line.messages is None else llm.chat_prompt(line.messages)
            except Exception as failure:  # a template is a program of the model's
                bad[line.index] = f"messages: {failure}"
                continue
            yield line, prompt, line.params

    with out.open("a", encoding="utf-8") as file, ui.progress("Answering") as step:
        for line, output in answer_all(llm.core, asked(), ahead=ahead):
            failed = [c.error for c in output.outputs if c.error is not None]
            if failed:
                bad[line.index] = failed[0]
                continue
            file.write(json.dumps(_record(line, output), ensure_ascii=False) + "\n")
            file.flush()
            step("Answering", step.done + 1, len(lines))


def _record(line: Line, output: RequestOutput) -> dict[str, Any]:
    record: dict[str, Any] = {"index": line.index}
    if line.id is not None:
        record["id"] = line.id
    record["outputs"] = [_completion(completion) for completion in output.outputs]
    record["prompt_tokens"] = len(output.prompt_token_ids)
    if output.prompt_logprobs is not None:
        record["prompt_logprobs"] = [found and _numbers(found) for found in output.prompt_logprobs]
    return record


def _completion(completion: CompletionOutput) -> dict[str, Any]:
    record: dict[str, Any] = {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "tokens": len(completion.token_ids),
    }
    if completion.stop_reason is not None:
        record["stop_reason"] = completion.stop_reason
    if completion.logprobs is not None:
        record["token_ids"] = completion.token_ids
        record["logprobs"] = [_numbers(found) for found in completion.logprobs]
    return record


def _numbers(found: dict[int, Any]) -> dict[str, float | None]:
    """Return log-probabilities as JSON, which has no infinity: None takes its place."""
    return {
        str(token): each.logprob if math.isfinite(each.logprob) else None
        for token, each in found.items()
    }
