"""From sampled tokens to outputs: text, stop conditions, log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .request import Answer, CompletionOutput, Logprob, Request, RequestOutput
from .text import Decoder, Detokenizer, find_stop, held_back

if TYPE_CHECKING:
    from .sampling import SampledToken


class OutputProcessor:
    """Appends tokens to answers, and makes outputs of requests."""

    def __init__(self, tokenizer: Any, end_tokens: set[int]) -> None:
        """
        Args:
            tokenizer: a transformers tokenizer; None: answers have no text.
            end_tokens: the model's own.
        """
        self.tokenizer = tokenizer
        self.end_tokens = end_tokens
        self._decode = Decoder(tokenizer)
        self._detokenizers: dict[Answer, Detokenizer] = {}  # of answers with up-to-date text

    @property
    def num_detokenizers(self) -> int:
        """Unfinished answers whose text is kept up to date."""
        return len(self._detokenizers)

    def start_text(self, answer: Answer) -> None:
        """Keep an answer's text up to date with each token. Other text is made at the end."""
        if self.tokenizer is not None:
            self._detokenizers[answer] = self._decode.detokenizer()

    def append(self, answer: Answer, sampled: SampledToken) -> str | None:
        """Append a good token. Return the finish reason if the answer ends with it, or None."""
        token, params, sequence = sampled.token, answer.params, answer.sequence
        sequence.tokens.append(token)
        answer.num_output += 1
        if params.logprobs is not None and sampled.logprob is not None:
            answer.cumulative_logprob += sampled.logprob
            answer.logprobs.append(self.logprobs(token, sampled.logprob, sampled.top))
        if answer.matcher is not None and answer.matcher.terminated:
            return "stop"
        if token in answer.stop_tokens:
            ends = token in self.end_tokens and not params.ignore_eos
            answer.stop_reason = None if ends else token
            return "stop"
        text = self._detokenizers.get(answer)
        if text is not None:
            before = len(text.text)
            text.push(token)
            answer.text = text.text
            if params.stop and answer.num_output >= params.min_tokens:
                stop = find_stop(text.text, before, params.stop)
                if stop is not None:
                    answer.text, answer.stop_reason = text.text[: stop[0]], stop[1]
                    return "stop"
            if params.stop:
                answer.text = text.text[: len(text.text) - held_back(text.text, params.stop)]
        return "length" if len(sequence.tokens) >= sequence.limit else None

    def finish(self, answer: Answer) -> None:
        """Make the text of an answer that has its finish reason."""
        text = self._detokenizers.pop(answer, None)
        if isinstance(answer.stop_reason, str):  # it ends before the stop text
            return
        if text is not None:
            text.finish()
            answer.text = text.text
        elif self.tokenizer is not None:
            answer.text = self._decode(_tokens_with_text(answer))

    def logprobs(
        self, token: int, logprob: float, top: Sequence[tuple[int, float]]
    ) -> dict[int, Logprob]:
        """Return the log-probabilities of a token and of the most likely ones."""
        found = dict([*top, (token, logprob)])
        return {t: Logprob(lp, self._piece(t)) for t, lp in found.items()}

    def output(self, request: Request) -> RequestOutput:
        """Return the output of a request so far."""
        outputs = []
        for answer in request.answers:
            wanted = answer.params.logprobs is not None
            outputs.append(
                CompletionOutput(
                    index=answer.index,
                    text=answer.text,
                    token_ids=answer.sequence.output,
                    cumulative_logprob=answer.cumulative_logprob if wanted else None,
                    logprobs=list(answer.logprobs) if wanted else None,
                    finish_reason=answer.finish_reason,
                    stop_reason=answer.stop_reason,
                    error=answer.error,
                )
            )
        prompt_logprobs = request.prompt_logprobs
        return RequestOutput(
            request_id=request.id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_ids,
            outputs=outputs,
            finished=request.finished,
            metrics=request.metrics,
            prompt_logprobs=None if prompt_logprobs is None else list(prompt_logprobs),
        )

    def _piece(self, token: int) -> str | None:
        return None if self.tokenizer is None else str(self.tokenizer.decode([token]))


def _tokens_with_text(answer: Answer) -> list[int]:
    """Return the output without the token that stopped it."""
    output = answer.sequence.output
    stopped = answer.finish_reason == "stop" and not isinstance(answer.stop_reason, str)
    return output[:-1] if stopped else output
