"""Random load on a tiny model for a while. No request may leave anything; memory must stay flat.

``PYTHONPATH=tests/helpers python tests/engine/soak.py --seconds 60``, or ``make soak``.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import logging
import time
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, NamedTuple

import torch

from engines import VOCABULARY, check_empty
from generating import tokenizer
from llmfast import LLM, RequestOutput, SamplingParams
from tiny_models import make

STREAMS = 24  # that are read in turn at most
ROUND = 80  # actions between two looks at what is held
MOST_BYTES = 6 * 2**20  # that the process may grow by: what an allocator leaves in pieces
MOST_OBJECTS = 100  # that Python may have more of: its own caches
GRAMMARS: list[dict[str, Any]] = [{"regex": "[a-e]{1,30}"}, {"choice": ["yes", "no", "perhaps"]}]
EXPECTED = (  # errors of requests
    "the prompt is empty",
    "the prompt has",
    "a logits processor failed: RuntimeError: a processor that raises",
    "memory ran out in a step",
)
CANARY = SamplingParams(seed=5, max_tokens=12)


class Held(NamedTuple):
    """Return what the process holds while there is no request."""

    resident: int  # bytes
    tensors: int
    tensor_bytes: int
    objects: int  # that Python's collector knows


def held() -> Held:
    gc.collect()
    known = gc.get_objects()
    tensors = [each for each in known if type(each) is torch.Tensor]
    size = sum(tensor.nbytes for tensor in tensors)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return Held(pages * 4096, len(tensors), size, len(known))


def fail(ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    if len(ids) > 2:
        raise RuntimeError("a processor that raises")
    return logits


class Load:
    """Requests of all kinds, some of which cannot be run."""

    def __init__(self, random: Random, structured: bool) -> None:
        self.random = random
        self.prefixes = [self.ids(60) for _ in range(4)]
        self.kinds = ["greedy", "drawn", "counted", "scored", "stopped", "masked", "raising", "bad"]
        self.kinds += ["structured"] * structured

    def ids(self, count: int) -> list[int]:
        return [self.random.randrange(3, VOCABULARY) for _ in range(count)]

    def prompt(self) -> list[int]:
        random = self.random
        prefix = random.choice(self.prefixes)[: random.randrange(61)]
        return prefix + self.ids(random.randrange(1, 30))

    def ask(self) -> tuple[str, Any, SamplingParams]:
        """Return a kind, a prompt and parameters."""
        random, prompt = self.random, self.prompt()
        kind = random.choice(self.kinds)
        given: dict[str, Any] = {"max_tokens": random.randrange(1, 40), "temperature": 0.8}
        given["n"] = random.choice([1, 1, 1, 3])
        if kind == "greedy":
            given["temperature"] = 0
        elif kind == "drawn":
            given |= {"top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": random.randrange(99)}
        elif kind == "counted":
            given |= {"repetition_penalty": 1.2, "presence_penalty": 0.5, "logprobs": 2}
        elif kind == "scored":
            given |= {"prompt_logprobs": random.randrange(3)}
        elif kind == "stopped":
            given |= {"stop": ["ab", "q"], "stop_token_ids": [7], "min_tokens": 1}
        elif kind == "masked":
            given |= {"bad_words": ["a", [5, 6]], "logit_bias": {9: -1.0, 8: -float("inf")}}
        elif kind == "raising":
            given |= {"logits_processors": [fail]}
        elif kind == "structured":
            given |= {"structured_outputs": random.choice(GRAMMARS)}
        else:
            prompt = random.choice([[], [VOCABULARY], [5] * 300])
        return kind, prompt, SamplingParams(**given)


class Soak:
    """An engine whose cache is too small for its load, and the streams of it."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        model = make("Llama")
        model.generation_config.eos_token_id = 2
        self.llm = LLM(
            model,
            tokenizer=tokenizer(),
            num_blocks=40,
            block_size=16,
            max_num_seqs=12,
            max_num_batched_tokens=96,
        )
        self.load = Load(self.random, importlib.util.find_spec("xgrammar") is not None)
        self.streams: list[Generator[RequestOutput]] = []
        self.count: Counter[str] = Counter()
        (first,) = self.llm.generate([self.load.prefixes[0]], CANARY, use_tqdm=False)
        self.canary = first.outputs[0].token_ids
        self._scarce()

    def _scarce(self) -> None:
        """Let a step run out of memory now and then."""
        launch = self.llm.core.model_runner.launch

        def scarce(*args: Any) -> Any:
            self.count["steps"] += 1
            if self.random.random() < 0.002:
                self.count["steps without memory"] += 1
                raise torch.OutOfMemoryError("for a test")
            return launch(*args)

        self.llm.core.model_runner.launch = scarce  # type: ignore[method-assign]

    def act(self) -> None:
        """Do something that a user may do."""
        random = self.random
        what = random.choices(["arrive", "read", "leave", "abort", "batch"], [40, 40, 5, 8, 1])[0]
        if what == "batch":
            asked = [self.load.ask() for _ in range(10)]
            prompts, params = [prompt for _, prompt, _ in asked], [own for _, _, own in asked]
            for output in self.llm.generate(prompts, params, use_tqdm=False):
                self.note(output)
        elif what == "arrive" and len(self.streams) < STREAMS:
            kind, prompt, params = self.load.ask()
            self.count[kind] += 1
            priority = random.choice([0, 0, 1])
            self.streams.append(self.llm.stream([prompt], params, priority=priority))
            self.read(self.streams[-1], 1)
        elif self.streams:
            stream = random.choice(self.streams)
            if what == "leave":
                self.count["left"] += 1
                self.streams.remove(stream)
                stream.close()
                return
            if what == "abort" and self.llm.core.requests:
                self.llm.abort(random.choice(list(self.llm.core.requests)))
            self.read(stream, random.randrange(1, 12))

    def read(self, stream: Generator[RequestOutput], outputs: int) -> None:
        for output in itertools.islice(stream, outputs):
            if output.finished:
                self.note(output)
                self.streams.remove(stream)
                return

    def note(self, output: RequestOutput) -> None:
        assert output.finished
        self.count["preemptions"] += output.metrics.preemptions
        for answer in output.outputs:
            self.count[f"finished: {answer.finish_reason}"] += 1
            assert answer.error is None or answer.error.startswith(EXPECTED), answer.error

    def settle(self) -> None:
        """Let all requests end. Nothing may be left, and the canary is answered as at first."""
        for stream in list(self.streams):
            self.read(stream, 10**6)
        assert not self.streams
        check_empty(self.llm)
        answers = []
        while not answers or answers[0].error is not None:  # a step without memory
            prompts = [self.load.prefixes[0]]
            (output,) = self.llm.generate(prompts, CANARY, use_tqdm=False)
            answers = output.outputs
        assert answers[0].token_ids == self.canary


def soak(seconds: float, seed: int) -> list[Held]:
    """Run for some seconds. Return what is held after each round."""
    run = Soak(seed)
    found, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(ROUND):
            run.act()
        run.settle()
        found.append(held())
    run.llm.close()
    for name, count in sorted(run.count.items()):
        print(f"{name}: {count}")
    return found


def check(found: list[Held]) -> None:
    """Assert that nothing grows after the first third, which warms up."""
    assert len(found) >= 9, f"{len(found)} rounds are too few to tell: more --seconds"
    third = len(found) // 3
    before, after = found[third : 2 * third], found[-third:]
    grown = Held(
        *(
            int(median(b) - median(a))
            for a, b in zip(zip(*before, strict=True), zip(*after, strict=True), strict=True)
        )
    )
    print(f"{len(found)} rounds; grown by {grown}")
    assert grown.resident <= MOST_BYTES
    assert grown.tensors <= 0 and grown.tensor_bytes <= 0
    assert grown.objects <= MOST_OBJECTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.getLogger("llmfast").setLevel(logging.ERROR)  # requests that fail are part of it
    torch.set_num_threads(1)
    found = soak(args.seconds, args.seed)
    print("first:", found[0], "last:", found[-1], sep="\n")
    check(found)


if __name__ == "__main__":
    main()
