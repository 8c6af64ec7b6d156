"""AsyncLLM yields what LLM yields, and no request affects another."""

import asyncio
import contextlib
import functools
import threading
import time

import pytest

import llmfast
from engines import LONG, check_empty, engine, executor_of, model_of, options
from generating import tokenizer as byte_tokenizer
from llmfast import AsyncLLM, SamplingParams
from llmfast.errors import UserError

pytestmark = pytest.mark.usefixtures("how")

GREEDY = SamplingParams(temperature=0, max_tokens=15)
LONGEST = SamplingParams(temperature=0, max_tokens=200)
PROMPTS = [LONG[:n] for n in (1, 15, 16, 33, 60)]


@functools.cache
def alone():
    with engine() as llm:
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def serve(body, **changes):
    """Run ``body(llm)`` with an engine. Nothing may be left of its requests."""

    async def main():
        async with asyncio.timeout(60):
            async with AsyncLLM(model_of(), **options(**changes)) as llm:
                result = await body(llm)
                await quiet(llm)
                check_empty(llm)
                return result

    result = asyncio.run(main())
    assert not [t for t in threading.enumerate() if t.name == "llmfast engine"]
    return result


async def quiet(llm):
    while not llm.core.idle:
        await asyncio.sleep(0.005)


async def last(llm, *args, **kwargs):
    outputs = [output async for output in llm.generate(*args, **kwargs)]
    return outputs[-1]


def tokens(output):
    return output.outputs[0].token_ids


@pytest.mark.parametrize("blocks", [7, 40])
def test_requests_at_the_same_time_yield_what_each_yields_alone(blocks):
    async def body(llm):
        tasks = []
        for n in range(3):
            for i, prompt in enumerate(PROMPTS):
                tasks.append(asyncio.create_task(last(llm, prompt, GREEDY, f"{n} {i}", priority=n)))
                await asyncio.sleep(0.002 * i)
        return await asyncio.gather(*tasks)

    outputs = serve(body, num_blocks=blocks, max_num_seqs=4)
    assert [tokens(output) for output in outputs] == alone() * 3
    assert [output.request_id for output in outputs] == [
        f"{n} {i}" for n in range(3) for i in range(5)
    ]
    assert all(output.finished for output in outputs)


def test_outputs_grow():
    async def body(llm):
        return [output async for output in llm.generate(PROMPTS[1], GREEDY)]

    seen = serve(body)
    assert 1 <= len(seen) <= 15 and seen[-1].finished and tokens(seen[-1]) == alone()[1]
    lengths = [len(tokens(output)) for output in seen]
    assert lengths == sorted(set(lengths))
    assert all(
        tokens(seen[-1])[:n] == tokens(output) for n, output in zip(lengths, seen, strict=True)
    )


def test_text_and_conversations():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] + m.content }}{% endfor %}"

    async def body(llm):
        text = await last(llm, "uAB", GREEDY)
        chat = await last(llm, llm.chat_prompt([{"role": "user", "content": "AB"}]), GREEDY)
        assert chat.prompt == "uAB" and chat.outputs[0].text == text.outputs[0].text != ""

    serve(body, tokenizer=tokenizer)


def test_abort():
    async def body(llm):
        await llm.abort("no such request")
        seen = []
        async for output in llm.generate(PROMPTS[1], LONGEST, "mine"):
            seen.append(output)
            await llm.abort("mine")
        other = await last(llm, PROMPTS[2], GREEDY, "mine")  # the id is free again
        return seen[-1], other

    aborted, other = serve(body)
    assert aborted.finished and aborted.outputs[0].finish_reason == "abort"
    assert 1 <= len(tokens(aborted)) < 200
    assert tokens(other) == alone()[2]


@pytest.mark.parametrize("how", ["cancel", "break"])
def test_a_reader_that_leaves_takes_its_request_along(how):
    async def body(llm):
        began = asyncio.Event()

        async def read():
            async with contextlib.aclosing(llm.generate(PROMPTS[1], LONGEST, "left")) as outputs:
                async for _ in outputs:
                    began.set()
                    if how == "break":
                        break

        task = asyncio.create_task(read())
        beside = asyncio.create_task(last(llm, PROMPTS[3], GREEDY))
        await began.wait()
        if how == "cancel":
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        output = await beside
        await quiet(llm)
        return output, await last(llm, PROMPTS[1], GREEDY, "left")

    output, again = serve(body)
    assert tokens(output) == alone()[3] and tokens(again) == alone()[1]


def test_a_task_cancelled_before_its_request_was_seen():
    async def body(llm):
        tasks = [asyncio.create_task(last(llm, PROMPTS[0], LONGEST)) for _ in range(20)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert all(task.cancelled() for task in tasks)

    serve(body)


def test_a_task_cancelled_while_it_does_something_else():
    """Its exception keeps the generator from being collected."""

    async def body(llm):
        began = asyncio.Event()

        async def read():
            async for _ in llm.generate(PROMPTS[1], LONGEST, "mine"):
                began.set()
                await asyncio.sleep(60)

        task = asyncio.create_task(read())
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as kept:
            await task
        await quiet(llm)
        again = await last(llm, PROMPTS[1], GREEDY, "mine")
        assert kept.value is not None and tokens(again) == alone()[1]

    serve(body)


def test_a_time_limit_for_each_output():
    async def body(llm):
        outputs = llm.generate(PROMPTS[1], GREEDY)
        seen = []
        with contextlib.suppress(StopAsyncIteration):
            while True:  # each of them in a task of its own, before Python 3.12
                seen.append(await asyncio.wait_for(anext(outputs), 30))
        assert tokens(seen[-1]) == alone()[1]
        late = llm.generate(PROMPTS[1], LONGEST)
        await anext(late)
        with pytest.raises(TimeoutError):
            while True:
                await asyncio.wait_for(anext(late), 0)

    serve(body)


def test_a_reader_that_stops_reading_stops_nobody():
    async def body(llm):
        stuck = llm.generate(PROMPTS[1], GREEDY)
        first = await anext(stuck)
        others = [tokens(await last(llm, prompt, GREEDY)) for prompt in PROMPTS]
        assert others == alone()
        rest = [output async for output in stuck]  # the last one was kept for it, none else
        assert len(rest) == (0 if first.finished else 1)
        assert tokens([first, *rest][-1]) == alone()[1]

    serve(body)


def test_a_step_that_raises_reaches_every_reader_and_the_engine_goes_on(monkeypatch):
    async def body(llm):
        own, failing = llm.core.model_runner.launch, threading.Event()

        def run(*args):
            if failing.is_set():
                failing.clear()
                raise RuntimeError("out of luck")
            return own(*args)

        monkeypatch.setattr(llm.core.model_runner, "launch", run)
        outputs = [llm.generate(prompt, LONGEST) for prompt in PROMPTS[:3]]
        for each in outputs:
            await anext(each)
        failing.set()
        for each in outputs:
            with pytest.raises(RuntimeError, match="out of luck"):
                async for _ in each:
                    pass
        return await last(llm, PROMPTS[3], GREEDY)

    assert tokens(serve(body)) == alone()[3]


def test_mistakes_are_the_callers_alone():
    async def body(llm):
        good = asyncio.create_task(last(llm, PROMPTS[3], GREEDY, "good"))
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match="request 'good' is in work already"):
            await last(llm, PROMPTS[0], GREEDY, "good")
        with pytest.raises(UserError, match="no tokenizer was given"):
            await last(llm, "text", GREEDY)
        with pytest.raises(TypeError, match="wants SamplingParams, got dict"):
            await last(llm, PROMPTS[0], {"temperature": 0})
        with pytest.raises(TypeError):
            await last(llm, ["two", "texts"], GREEDY)
        with pytest.raises(TypeError, match="lora_request"):
            llm.generate(PROMPTS[0], GREEDY, lora_request=None)
        empty = await last(llm, [], GREEDY)
        assert empty.finished and "the prompt is empty" in empty.outputs[0].error
        return await good

    assert tokens(serve(body)) == alone()[3]
    with pytest.raises(TypeError, match="swap_space"):
        AsyncLLM(model_of(), swap_space=4)


def test_closing_ends_what_is_in_work():
    async def body():
        llm = AsyncLLM(model_of(), **options())
        task = asyncio.create_task(last(llm, PROMPTS[1], LONGEST))
        while not llm.core.has_work:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(llm.close)
        llm.close()
        output = await task
        assert output.finished and output.outputs[0].finish_reason == "abort"
        with pytest.raises(RuntimeError, match="it is closed"):
            await last(llm, PROMPTS[0])
        await llm.abort("any")
        assert not executor_of(llm).cache.keys

    asyncio.run(asyncio.wait_for(body(), 60))


def test_several_event_loops_one_of_them_gone():
    llm = llmfast.AsyncLLM(model_of(), **options())
    left = asyncio.new_event_loop()
    generator = llm.generate(PROMPTS[1], SamplingParams(temperature=0, max_tokens=230))
    left.run_until_complete(anext(generator))
    left.close()  # its reader is never woken again
    found = {}

    def read(i):
        found[i] = asyncio.run(last(llm, PROMPTS[i], GREEDY))

    threads = [threading.Thread(target=read, args=(i,)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [tokens(found[i]) for i in range(5)] == alone()
    llm.close()
    assert llm.core.idle


def test_a_prompt_that_takes_long_to_tokenize_delays_nobody():
    """Tokens of others arrive while it is tokenized in another thread."""
    tokenizer, entered, release = byte_tokenizer(), threading.Event(), threading.Event()
    encode, threads = tokenizer.encode, []

    def slow(text, **kwargs):
        threads.append(threading.current_thread())
        if len(text) == 50:
            entered.set()
            assert release.wait(30)
        return encode(text, **kwargs)

    tokenizer.encode = slow

    async def body(llm):
        late = asyncio.create_task(last(llm, "A" * 50, GREEDY))
        await asyncio.to_thread(entered.wait, 30)
        beside = await last(llm, PROMPTS[1], GREEDY)
        assert not late.done()
        release.set()
        assert len(tokens(await late)) == 15
        return beside

    assert tokens(serve(body, tokenizer=tokenizer)) == alone()[1]
    assert all(thread.name.startswith("llmfast input") for thread in threads)


@pytest.mark.parametrize("how_it_ends", ["abort", "cancel", "close"])
def test_a_request_that_ends_while_it_is_tokenized(how_it_ends):
    tokenizer, entered, release = byte_tokenizer(), threading.Event(), threading.Event()
    encode = tokenizer.encode

    def slow(text, **kwargs):
        entered.set()
        assert release.wait(30)
        return encode(text, **kwargs)

    tokenizer.encode = slow

    async def body():
        llm = AsyncLLM(model_of(), tokenizer=tokenizer, **options())
        task = asyncio.create_task(last(llm, "AB", LONGEST, "mine"))
        await asyncio.to_thread(entered.wait, 30)
        if how_it_ends == "abort":
            await llm.abort("mine")
            release.set()
            output = await task
            assert output.finished and output.outputs[0].finish_reason == "abort"
        elif how_it_ends == "cancel":
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            release.set()
            output = await last(llm, "AB", GREEDY, "mine")  # its id is free again
            assert output.finished
        else:
            await asyncio.to_thread(llm.close)
            release.set()
            with pytest.raises(RuntimeError, match="it is closed"):
                await task
        await quiet(llm)
        check_empty(llm)
        llm.close()

    asyncio.run(asyncio.wait_for(body(), 60))


def test_seeds_are_drawn_in_the_order_of_the_calls():
    """A text, which is tokenized in another thread, and token ids, which are not."""
    drawn = SamplingParams(max_tokens=12)
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("AB")
    encode = tokenizer.encode

    def slow(text, **kwargs):
        time.sleep(0.05)
        return encode(text, **kwargs)

    tokenizer.encode = slow

    async def body(llm):
        asked = ["AB", ids, "AB", ids]
        tasks = [asyncio.create_task(last(llm, prompt, drawn)) for prompt in asked]
        return [tokens(output) for output in await asyncio.gather(*tasks)]

    with engine() as llm:
        wanted = [tokens(output) for output in llm.generate([ids] * 4, drawn, use_tqdm=False)]
    assert serve(body, tokenizer=tokenizer) == wanted
