"""Faults in the middle of a run: one request ends, the others yield what they yield alone."""

import pytest
import torch

from engines import LONG, check_empty, engine
from llmfast import SamplingParams
from llmfast.engine import core
from llmfast.engine.request import Answer, SequenceStatus

pytestmark = pytest.mark.usefixtures("how")

PROMPTS = [LONG[:n] for n in (5, 20, 50)] + [[9, *LONG[:30]]]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=14),
    SamplingParams(seed=1, max_tokens=12),
    SamplingParams(seed=2, max_tokens=9, n=2, presence_penalty=0.4),
    SamplingParams(seed=3, max_tokens=6, prompt_logprobs=1, logprobs=1),
]


def run(llm, prompts, params):
    return llm.generate(prompts, params, use_tqdm=False)


def token_ids(output):
    return [answer.token_ids for answer in output.outputs]


@pytest.fixture(scope="module")
def alone():
    with engine(enable_prefix_caching=False) as llm:
        return [token_ids(run(llm, [p], own)[0]) for p, own in zip(PROMPTS, PARAMS, strict=True)]


def out_of_memory(*args):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    ("nth", "late"), [(1, False), (3, True), (12, False)], ids=["first", "launched", "decode"]
)
def test_memory_runs_out_in_a_step(alone, nth, late, monkeypatch):
    with engine(num_blocks=12, max_num_batched_tokens=24) as llm:
        launch, plans = llm.core.model_runner.launch, []

        def scarce(plan, *args):
            plans.append(dict(plan.num_scheduled_tokens))
            if len(plans) != nth:
                return launch(plan, *args)
            if late:
                launch(plan, *args)
            return out_of_memory()

        monkeypatch.setattr(llm.core.model_runner, "launch", scarce)
        outputs = run(llm, PROMPTS, PARAMS)
        check_empty(llm)
        monkeypatch.undo()
        again = run(llm, PROMPTS, PARAMS)
    errors = [[answer.error for answer in output.outputs] for output in outputs]
    (failed,) = [i for i, own in enumerate(errors) if any(own)]
    most = [s.prompt_len for s, n in plans[nth - 1].items() if n == max(plans[nth - 1].values())]
    assert len(PROMPTS[failed]) in most
    for i, expected in enumerate(alone):
        assert token_ids(again[i]) == expected
        for answer, whole in zip(outputs[i].outputs, expected, strict=True):
            if answer.error is None:
                assert answer.token_ids == whole
            else:
                assert answer.error.startswith("memory ran out in a step")
                assert answer.token_ids == whole[: len(answer.token_ids)]


def test_memory_never_suffices(monkeypatch):
    with engine() as llm:
        monkeypatch.setattr(llm.core.model_runner, "launch", out_of_memory)
        outputs = run(llm, PROMPTS, PARAMS)
        assert all("memory ran out" in a.error for o in outputs for a in o.outputs)
        check_empty(llm)


def test_memory_runs_out_while_a_prompt_is_scored(alone, monkeypatch):
    with engine() as llm:
        with monkeypatch.context() as patch:
            patch.setattr(core, "score", out_of_memory)
            outputs = run(llm, PROMPTS, PARAMS)
        check_empty(llm)
        errors = [output.outputs[0].error for output in outputs]
        assert errors[3] is not None
        for i in range(3):
            assert errors[i] is not None or token_ids(outputs[i]) == alone[i]
        assert token_ids(run(llm, PROMPTS, PARAMS)[3]) == alone[3]


@pytest.mark.parametrize("which", [2, 3])
def test_abort_at_every_stage(alone, which):
    """After each number of steps: waiting, in a chunk of its prompt, decoding, preempted, done."""
    seen, at = set(), 0
    with engine(num_blocks=9, max_num_batched_tokens=16, max_num_seqs=4) as llm:
        while "finished" not in seen:
            requests = llm.core.processor.process(PROMPTS, PARAMS)
            llm.core.add(requests, streaming=at % 2 == 0)
            for _ in range(at):
                llm.core.step()
            sequence = requests[which].answers[0].sequence
            seen.add(sequence.status.name.lower())
            if at % 2 and sequence.status == SequenceStatus.RUNNING:
                llm.core.scheduler.preempt(sequence)
                seen.add("preempted")
            known = [list(answer.sequence.output) for answer in requests[which].answers]
            llm.abort(requests[which].id)
            while any(not request.finished for request in requests):
                llm.core.step()
            check_empty(llm)
            for i, request in enumerate(requests):
                if i != which:
                    assert token_ids(llm.core.output(request)) == alone[i]
            for answer, so_far, whole in zip(
                requests[which].answers, known, alone[which], strict=True
            ):
                ended = answer.finish_reason != "abort"
                assert answer.sequence.output == (whole if ended else so_far)
                assert ended == (len(so_far) == len(whole))
            at += 3
    assert seen == {"waiting", "running", "preempted", "finished"}


def test_ten_thousand_requests(monkeypatch):
    """All are queued before the first step; those that wait cost a step nothing."""
    looks = []
    look = property(lambda answer: looks.append(answer) or True)
    monkeypatch.setattr(Answer, "sampled_on_device", look)
    few = SamplingParams(temperature=0, max_tokens=1)
    prompts = [[3 + i % 90, 3 + i // 90 % 90, 5] for i in range(10_000)]
    with engine(num_blocks=300, max_num_batched_tokens=1024) as llm:
        requests = llm.core.processor.process(prompts, few)
        llm.core.add(requests)
        steps = 0
        while not requests[999].finished:
            llm.core.step()
            steps += 1
        assert steps <= 16 and len(looks) <= 256 * 3 * steps
        llm.core.abort(requests[1000:])
        while any(not request.finished for request in requests):
            llm.core.step()
        check_empty(llm)
        reasons = [request.answers[0].finish_reason for request in requests]
        assert set(reasons[:1000]) == {"length"} and set(reasons[1500:]) == {"abort"}
        expected = [token_ids(output) for output in run(llm, prompts[:1000:111], few)]
        assert [[r.answers[0].sequence.output] for r in requests[:1000:111]] == expected
