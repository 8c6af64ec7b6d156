"""LLM called by several threads: each gets the tokens of a serial run, and none waits for ever."""

import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from engines import LONG, check_empty, engine, text_engine
from generating import tokenizer as byte_tokenizer
from llmfast import SamplingParams
from llmfast.engine.sharing import SharedSteps

PROMPTS = [LONG[:n] for n in (1, 15, 16, 33, 60)] + [[9, *LONG[:20]]]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=20),
    SamplingParams(seed=1, max_tokens=12, temperature=1.5, top_k=20),
    SamplingParams(seed=2, n=2, max_tokens=9, presence_penalty=0.5),
    SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=1, logprobs=1),
]
LONGEST = SamplingParams(temperature=0, max_tokens=190)
SECONDS = 60  # a test that takes longer hangs


def token_ids(output):
    return [answer.token_ids for answer in output.outputs]


def case(number):
    return PROMPTS[number % len(PROMPTS)], PARAMS[number % len(PARAMS)]


@functools.cache
def alone(number):
    prompt, params = case(number)
    with engine(enable_prefix_caching=False) as llm:
        return token_ids(llm.generate([prompt], params, use_tqdm=False)[0])


def wait_for(condition):
    end = time.monotonic() + SECONDS
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    assert condition()


def in_threads(count, work):
    """Return ``work(number)`` of each thread; all begin at the same time."""
    barrier = threading.Barrier(count)

    def run(number):
        barrier.wait(SECONDS)
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return [future.result(SECONDS) for future in [pool.submit(run, n) for n in range(count)]]


@pytest.mark.parametrize("blocks", [9, 40])
def test_threads_get_the_tokens_of_serial_runs(how, blocks):
    def work(number):
        found = []
        for at in range(number, number + 4):
            prompt, params = case(at)
            if at % 2:
                *_, output = llm.stream([prompt], params)
            else:
                (output,) = llm.generate([prompt], params, use_tqdm=False)
            found.append(token_ids(output))
        return found

    with engine(num_blocks=blocks, max_num_seqs=4, max_num_batched_tokens=24) as llm:
        found = in_threads(6, work)
        check_empty(llm)
    for number, own in enumerate(found):
        assert own == [alone(at) for at in range(number, number + 4)]


def test_text_and_conversations(how):
    def work(number):
        prompt = "AB" * (number + 1)
        params = SamplingParams(seed=number, max_tokens=10, stop=["never"], bad_words=["zz"])
        (output,) = llm.generate(prompt, params, use_tqdm=False)
        *_, last = llm.stream(prompt, params)
        return output.outputs[0], last.outputs[0]

    with text_engine() as llm:
        found = in_threads(6, work)
        assert found == [work(number) for number in range(6)]
        check_empty(llm)
    for whole, streamed in found:
        assert whole.text == streamed.text != ""


def test_threads_share_steps():
    """Requests of all threads run together: the steps are those of one call with all prompts."""
    launched = []
    with engine() as llm:
        launch = llm.core.model_runner.launch

        def count(scheduled, *args):
            launched.append(len(scheduled.num_scheduled_tokens))
            return launch(scheduled, *args)

        llm.core.model_runner.launch = count
        in_threads(4, lambda n: llm.generate([PROMPTS[1]], LONGEST, use_tqdm=False))
    assert len(launched) < 2 * 190 and max(launched) == 4


def test_a_request_that_is_added_during_a_step():
    """Its thread waits before the engine has seen the request: that is not taken for its end."""
    with engine() as llm:
        launch, found, threads = llm.core.model_runner.launch, [], []

        def work():
            (output,) = llm.generate([PROMPTS[4]], PARAMS[0], use_tqdm=False)
            found.append(token_ids(output))

        def joined(*args):
            if not threads:
                threads.append(threading.Thread(target=work))
                threads[0].start()
                time.sleep(0.1)
            return launch(*args)

        llm.core.model_runner.launch = joined
        llm.generate([PROMPTS[1]], PARAMS[0], use_tqdm=False)
        threads[0].join(SECONDS)
    assert found == [alone(4)]


def test_a_stream_held_between_its_outputs_stops_no_thread():
    with engine() as llm:

        def generated(number):
            prompt, params = case(number)
            return token_ids(llm.generate([prompt], params, use_tqdm=False)[0])

        held = llm.stream([PROMPTS[1]], PARAMS[0])
        next(held)
        found = in_threads(3, generated)
        assert found == [alone(n) for n in range(3)]
        *_, output = held
        assert token_ids(output) == token_ids(llm.generate([PROMPTS[1]], PARAMS[0], False)[0])
        left = llm.stream([PROMPTS[1]], LONGEST)
        next(left)
        with ThreadPoolExecutor(1) as pool:  # closed in another thread than the one that read it
            pool.submit(left.close).result(SECONDS)
        check_empty(llm)


def test_a_step_that_raises_reaches_all_threads_that_wait():
    with engine() as llm:
        runner, raised = llm.core.model_runner, []
        launch = runner.launch

        def fail(scheduled, *args):
            if len(scheduled.num_scheduled_tokens) == 3 and not raised:
                raised.append(1)
                raise RuntimeError("out of luck")
            return launch(scheduled, *args)

        def generated(number):
            prompt, params = case(number)
            return token_ids(llm.generate([prompt], params, use_tqdm=False)[0])

        def work(number):
            with pytest.raises(RuntimeError, match="out of luck"):
                llm.generate([PROMPTS[number]], LONGEST, use_tqdm=False)
            return generated(number)

        runner.launch = fail
        assert in_threads(3, work) == [alone(number) for number in range(3)]
        check_empty(llm)


def test_ctrl_c_in_one_thread_leaves_the_others_running():
    """The interrupted thread may be the one that runs the steps: another takes over."""
    with engine() as llm:
        runner, main = llm.core.model_runner, threading.current_thread()
        launch, entered = runner.launch, threading.Event()

        def interrupted(*args):
            if threading.current_thread() is main and entered.wait(SECONDS):
                raise KeyboardInterrupt
            return launch(*args)

        runner.launch = interrupted

        def other():
            entered.set()
            (output,) = llm.generate([PROMPTS[4]], PARAMS[0], use_tqdm=False)
            return token_ids(output)

        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(other)
            with pytest.raises(KeyboardInterrupt):
                while True:  # until this thread runs the steps
                    llm.generate([PROMPTS[1]], LONGEST, use_tqdm=False)
            assert future.result(SECONDS) == alone(4)
        check_empty(llm)


def test_aborts_from_other_threads():
    with engine() as llm:
        started = threading.Event()

        def read():
            outputs = []
            for output in llm.stream([PROMPTS[1]], LONGEST):
                outputs.append(output)
                started.set()
            return outputs[-1]

        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(read)
            assert started.wait(SECONDS)
            (request_id,) = llm.core.requests
            llm.abort(request_id)
            last = future.result(SECONDS)
        assert last.finished and last.outputs[0].finish_reason == "abort"
        check_empty(llm)


def test_closing_ends_the_calls_of_all_threads():
    llm = engine()
    started = threading.Barrier(4)

    def work(number):
        stream = llm.stream([PROMPTS[number]], LONGEST)
        next(stream)
        started.wait(SECONDS)
        *_, last = stream
        return last.outputs[0].finish_reason

    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(work, number) for number in range(3)]
        started.wait(SECONDS)
        llm.close()
        assert {future.result(SECONDS) for future in futures} <= {"abort", "length"}
    with pytest.raises(RuntimeError, match="it is closed"):
        llm.generate([PROMPTS[0]], use_tqdm=False)


def test_a_step_that_waits_for_the_engine_raises():
    """A logits processor runs in a step: it may abort, but not wait for another step."""
    seen = []

    def nested(ids, logits):
        llm.abort("no such request")
        with pytest.raises(RuntimeError, match="a step is running in this thread"):
            llm.generate([PROMPTS[0]], use_tqdm=False)
        seen.append(len(ids))
        return logits

    with engine() as llm:
        params = SamplingParams(temperature=0, max_tokens=3, logits_processors=[nested])
        (output,) = llm.generate([PROMPTS[1]], params, use_tqdm=False)
        assert output.outputs[0].error is None and seen == [0, 1, 2]
        check_empty(llm)


def test_truncation_of_a_tokenizer_is_no_race():
    """A fast tokenizer drops its truncation when it encodes; threads must not do so together."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    with engine(tokenizer=tokenizer) as llm:
        texts = ["AB" * 40_000, *["hey"] * 5]
        found = in_threads(6, lambda n: llm.core.processor.encode(texts[n]))
    assert [len(ids) for ids in found] == [80_000, 3, 3, 3, 3, 3]


# ------------------------------------------------------------------------------ SharedSteps


def test_posted_functions_run_between_steps_only():
    events = []

    def step():
        events.append("begin")
        shared.post(lambda: events.append("posted"))  # as a finalizer might
        events.append("end")

    shared = SharedSteps(step)
    shared.step()
    assert events == ["begin", "end", "posted"] and not shared.has_posted
    shared.post(lambda: events.append("at once"))
    assert events[-1] == "at once"


def test_a_result_is_taken_by_the_thread_that_steps():
    """The second thread waits, and its result is there when the first has run its steps."""
    steps, joined = [], threading.Event()

    def step():
        joined.wait(SECONDS)
        steps.append(threading.get_ident())

    shared = SharedSteps(step)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(shared.run_until, lambda: len(steps) >= 3 or None)
        wait_for(lambda: shared.num_waiting == 1)
        second = pool.submit(shared.run_until, lambda: list(steps) if len(steps) >= 2 else None)
        wait_for(lambda: shared.num_waiting == 2)
        joined.set()
        assert first.result(SECONDS) is True
        assert len(second.result(SECONDS)) == 2 and len(steps) == 3


def test_an_error_of_a_result_is_its_threads_alone():
    def bad():
        raise ValueError("mine")

    shared = SharedSteps(lambda: None)
    with pytest.raises(ValueError, match="mine"):
        shared.run_until(bad)
    assert shared.run_until(lambda: 5) == 5
