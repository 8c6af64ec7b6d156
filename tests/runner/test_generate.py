"""``model.generate`` on the runner: every argument against an unpatched twin of the same model."""

import functools
import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TextStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

import llmfast
from generating import (
    EOS,
    NoRepeat,
    Recorder,
    StopAtEven,
    batch,
    check,
    make_pair,
    shared_pair,
    tokenizer,
)
from llmfast.errors import UserError
from llmfast.runner.generate.batch import StaticBatch
from tiny_models import make, tokens

FAMILIES = [
    "Llama",
    "Mistral",
    "Qwen2",
    "Qwen3",
    "SmolLM3",
    "Phi3",
    "Granite",
    "Olmo2",
    "Gemma2",
    "Gemma3",
]
OWN_LAYERS = ["GPTNeoX", "Mixtral"]  # no recipe: their own layers, our attention


# --------------------------------------------------------------------------- supported arguments


@pytest.mark.parametrize("kind", [*FAMILIES, *OWN_LAYERS])
def test_greedy_tokens_of_a_padded_batch(kind, device, started):
    model, twin = make_pair(kind, device)
    inputs = batch(device, padding=(0, 17, 40), length=70)  # past the windows and a cache's block
    check(model, twin, **inputs, max_new_tokens=24, do_sample=False)
    assert len(started) == 1


def test_a_model_that_the_runner_cannot_run_keeps_its_generate(device):
    model, twin = make("Falcon", device), make("Falcon", device)
    report = llmfast.patch(model, ops="all")
    assert "generate" not in vars(model)
    assert any("generate: transformers' own, since" in note for note in report.notes)
    check(model, twin, **batch(device), max_new_tokens=8)
    with pytest.raises(UserError, match="generate is transformers' own"):
        llmfast.patch(twin, ops="generate", strict=True)
    assert "generate" not in vars(twin)
    llmfast.unpatch(model)


@pytest.mark.parametrize("how", ["greedy", "penalty", "sampled", "host"])
@pytest.mark.parametrize("pad", [-1, 101], ids=["pad -1", "pad past the vocabulary"])
@pytest.mark.parametrize("rows", [3, 5, 6, 7])
def test_a_pad_that_is_no_token(rows, pad, how, device, started):
    """In batches that are no bucket, whose idle rows run along, and with rows that end early."""
    model, twin = shared_pair(device)
    stops = list(range(1, 101, 7))
    options = {"max_new_tokens": 12, "eos_token_id": stops, "do_sample": how == "sampled"}
    if how == "penalty":
        options["repetition_penalty"] = 1.2
    if how == "host":
        options["max_time"] = 1e4
    inputs = batch(device, padding=tuple(3 * row % 10 for row in range(rows)))
    torch.manual_seed(5)
    theirs = twin.generate(**inputs, **options, pad_token_id=0)  # of theirs a pad is embedded
    torch.manual_seed(5)
    ours = model.generate(**inputs, **options, pad_token_id=pad)
    start = inputs["input_ids"].shape[1]
    assert torch.equal(ours[:, :start], theirs[:, :start])
    ours, theirs = ours[:, start:], theirs[:, start:]
    # sampled tokens come from other random numbers than theirs: of these only the pads are known
    is_stop = torch.isin(ours if how == "sampled" else theirs, torch.tensor(stops, device=device))
    ended = is_stop.cumsum(1) - is_stop.long() > 0
    assert ended.any() and ours[ended].eq(pad).all()
    assert how == "sampled" or torch.equal(ours[~ended], theirs[~ended])
    assert len(started) == 1


ARGUMENTS = {
    "greedy": {},
    "one token": {"max_new_tokens": 1},
    "default length": {"max_new_tokens": None},
    "max_length": {"max_new_tokens": None, "max_length": 19},
    "both lengths": {"max_length": 14},
    "eos": {"eos_token_id": EOS[0], "pad_token_id": 7},
    "several eos": {"eos_token_id": EOS},
    "eos beyond the vocabulary": {"eos_token_id": [*EOS, 1000], "min_new_tokens": 3},
    "more eos than a graph holds": {"eos_token_id": [*range(80, 101)], "pad_token_id": 7},
    "eos at once": {"eos_token_id": list(range(101)), "pad_token_id": 9},
    "min_new_tokens": {"eos_token_id": EOS, "min_new_tokens": 6},
    "min_length": {"eos_token_id": EOS, "min_length": 17},
    "both minima": {"eos_token_id": EOS, "min_length": 20, "min_new_tokens": 2},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "repetition and minimum": {
        "repetition_penalty": 0.6,
        "eos_token_id": EOS,
        "min_new_tokens": 4,
    },
    "generation_config": {
        "max_new_tokens": None,
        "generation_config": GenerationConfig(max_new_tokens=9, eos_token_id=EOS, pad_token_id=3),
    },
    "generation_config and arguments": {
        "generation_config": GenerationConfig(max_new_tokens=9, repetition_penalty=1.5),
        "eos_token_id": EOS,
    },
    "dictionary": {"return_dict_in_generate": True},
    "scores": {"return_dict_in_generate": True, "output_scores": True, "eos_token_id": EOS},
    "scores and logits": {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "repetition_penalty": 1.3,
    },
    "scores without a dictionary": {"output_scores": True},
    "sampled scores": {
        "return_dict_in_generate": True,
        "output_scores": True,
        "do_sample": True,
        "top_k": 9,
    },
    "criteria": {"stopping_criteria": [StopAtEven()]},
    "criteria and eos": {"stopping_criteria": [StopAtEven()], "eos_token_id": EOS},
    "own length": {"stopping_criteria": [MaxLengthCriteria(16)]},
    "own length, passed already": {"stopping_criteria": [MaxLengthCriteria(5)]},
    "two lengths": {"stopping_criteria": [MaxLengthCriteria(20), MaxLengthCriteria(15)]},
    "two eos criteria": {"stopping_criteria": [EosTokenCriteria(12), EosTokenCriteria(92)]},
    "max_time": {"max_time": 1e4},
    "max_time, passed already": {"max_time": -1.0},
    "processor": {"logits_processor": LogitsProcessorList([NoRepeat()])},
    "processor with all else": {
        "logits_processor": [NoRepeat()],
        "eos_token_id": EOS,
        "min_new_tokens": 3,
        "repetition_penalty": 1.2,
        "num_return_sequences": 2,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
    },
    "own penalty": {"logits_processor": [RepetitionPenaltyLogitsProcessor(1.7)]},
    "own penalty, prompt left out": {
        "logits_processor": [RepetitionPenaltyLogitsProcessor(1.7, prompt_ignore_length=12)]
    },
    "own warpers, greedy": {"logits_processor": [TemperatureLogitsWarper(3.0)]},
    "own warpers, unusual order": {
        "logits_processor": [TopPLogitsWarper(0.8), TopKLogitsWarper(5), MinPLogitsWarper(0.01)],
        "do_sample": True,
        "top_k": 0,
    },
    "own least number kept": {
        "logits_processor": [TopPLogitsWarper(0.01, min_tokens_to_keep=3)],
        "do_sample": True,
        "top_k": 0,
    },
    "own filter value": {
        "logits_processor": [TopKLogitsWarper(2, filter_value=0.0)],
        "do_sample": True,
        "top_k": 0,
    },
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[20], [31], [68]]},
    "renormalize_logits": {"renormalize_logits": True, "do_sample": True},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(name, device, started, reasons):
    model, twin = shared_pair(device)
    arguments = {"max_new_tokens": 12, "do_sample": False} | ARGUMENTS[name]
    arguments = {k: v for k, v in arguments.items() if v is not None}
    check(model, twin, **batch(device), **arguments)
    assert len(started) == 1 and not reasons()


def test_the_arguments_above_say_something(device):
    """Rows stop at different times, some never; a penalty and a minimum change tokens."""
    _, twin = shared_pair(device)
    inputs = batch(device)

    def run(**kwargs):
        return twin.generate(**inputs, max_new_tokens=12, do_sample=False, **kwargs)[:, 12:]

    plain, stopped = run(), run(eos_token_id=EOS, pad_token_id=0)
    ends = {int((row != 0).sum()) for row in stopped}
    assert len(ends) > 1 and stopped.shape[1] > 6
    assert not torch.equal(plain, run(repetition_penalty=1.7))
    assert not torch.equal(stopped, run(eos_token_id=EOS, pad_token_id=0, min_new_tokens=6)[:, :12])


INPUTS = {
    "one row": lambda d: {"input_ids": tokens(1, 9, d)},
    "no mask": lambda d: {"input_ids": tokens(3, 9, d)},
    "one token": lambda d: {"input_ids": tokens(2, 1, d)},
    "mask made from pad tokens": lambda d: {"input_ids": batch(d)["input_ids"]},
    "bool mask": lambda d: {k: v.bool() if "mask" in k else v for k, v in batch(d).items()},
    "int32 ids": lambda d: {"input_ids": tokens(2, 9, d).int()},
    "inputs": lambda d: {"inputs": tokens(2, 9, d)},
}


@pytest.mark.parametrize("penalty", [1.0, 1.7], ids=["plain", "penalty"])
@pytest.mark.parametrize("name", INPUTS)
def test_inputs(name, penalty, device, started):
    model, twin = shared_pair(device)
    check(model, twin, **INPUTS[name](device), max_new_tokens=9, repetition_penalty=penalty)
    assert len(started) == 1


@pytest.mark.parametrize("ignored", [(4, 9, 0), (12, 12, 12)])
def test_a_penalty_that_leaves_tokens_out(ignored, device, started):
    """A mask marks the padding, as newer versions of transformers infer it, or other tokens."""
    model, twin = shared_pair(device)
    try:
        penalty = RepetitionPenaltyLogitsProcessor(1.7, torch.tensor(ignored, device=device))
    except ValueError:
        pytest.skip("this version of transformers wants a number")
    check(model, twin, **batch(device), max_new_tokens=12, logits_processor=[penalty])
    assert started[0]["host_samples"] == (ignored == (12, 12, 12))


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "drawn"])
def test_another_default_device(sample, device, started):
    """As torch.set_default_device sets it: whatever forgets to say where it is made shows."""
    model, _ = shared_pair(device)
    inputs = {**batch(device), "max_new_tokens": 5, "do_sample": sample, "eos_token_id": EOS}
    results = []
    for default in ("meta", "cpu"):
        torch.manual_seed(1)
        with torch.device(default):
            results.append(model.generate(**inputs))
    assert torch.equal(*results) and len(started) == 2


def test_positional_arguments(device, started):
    model, twin = shared_pair(device)
    config = GenerationConfig(max_new_tokens=6, eos_token_id=EOS)
    ids = tokens(2, 9, device)
    check(model, twin, ids, config, LogitsProcessorList([NoRepeat()]), [StopAtEven()])
    assert len(started) == 1
    for call in (model, twin):
        with pytest.raises(TypeError, match="inputs"):
            call.generate(ids, inputs=ids)


def test_the_defaults_are_the_models_own(device, started):
    model, twin = make_pair("Llama", device)
    for m in (model, twin):
        m.generation_config.update(eos_token_id=EOS, max_new_tokens=7, repetition_penalty=1.4)
    ours = check(model, twin, **batch(device))
    assert ours.shape[1] == 19 and len(started) == 1
    for m in (model, twin):
        m.generation_config.num_beams = 2
    check(model, twin, **batch(device))
    assert len(started) == 1


def test_what_transformers_refuses_is_refused_with_its_words(device, started):
    model, twin = shared_pair(device)
    ids = tokens(2, 9, device)
    contrastive = {"penalty_alpha": 0.6, "top_k": 4}
    alone = {"num_return_sequences": 2}
    for bad in ({"max_length": 9}, {"temprature": 1.0}, alone, contrastive):
        with pytest.raises(ValueError) as theirs:
            twin.generate(ids, do_sample=False, **bad)
        with pytest.raises(ValueError) as ours:
            model.generate(ids, do_sample=False, **bad)
        assert str(ours.value) == str(theirs.value)
    assert not started


# ------------------------------------------------------------------------------------ streaming


@pytest.mark.parametrize("processors", [[], [NoRepeat()]], ids=["device", "host"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_streamer_gets_the_same_chunks(rows, processors, device, started):
    model, twin = shared_pair(device)
    inputs = batch(device, padding=(0, 3, 5)[:rows])
    ours, theirs = Recorder(), Recorder()
    for m, streamer in ((model, ours), (twin, theirs)):
        m.generate(
            **inputs,
            max_new_tokens=8,
            eos_token_id=EOS,
            streamer=streamer,
            logits_processor=processors,
        )
    assert ours.chunks == theirs.chunks and ours.chunks[-1] == "end"
    assert len(started) == 1


def test_a_cpu_hands_out_each_token_before_it_makes_the_next(monkeypatch):
    model, _ = shared_pair("cpu")
    came, step = Recorder(), StaticBatch.step

    def note(batch):
        came.chunks.append("step")
        return step(batch)

    monkeypatch.setattr(StaticBatch, "step", note)
    model.generate(tokens(1, 9, "cpu"), max_new_tokens=3, streamer=came)
    kinds = ["step" if chunk == "step" else "tokens" for chunk in came.chunks[1:-1]]
    assert kinds == ["tokens", "step", "tokens", "step", "tokens"]


def test_a_text_streamer_prints_the_same(device, started, monkeypatch):
    printed = []
    for model in shared_pair(device):
        out = io.StringIO()
        monkeypatch.setattr("sys.stdout", out)
        streamer = TextStreamer(tokenizer(), skip_prompt=True)
        model.generate(tokens(1, 9, device), max_new_tokens=8, streamer=streamer)
        printed.append(out.getvalue())
    assert printed[0] == printed[1] and len(printed[0].strip()) == 8
    assert len(started) == 1


# ------------------------------------------------------------------------------------- sampling

DRAWS = 800
FILTERS = {
    "plain": {"top_k": 0},
    "temperature": {"top_k": 0, "temperature": 0.4},
    "top_k": {"top_k": 6},
    "top_p": {"top_k": 0, "top_p": 0.6},
    "min_p": {"top_k": 0, "min_p": 0.3},
    "all": {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.1},
    "penalty": {"top_k": 0, "repetition_penalty": 2.0},
    "default top_k": {},
}


def distance(drawn, exact):
    """Total variation of the drawn tokens' shares, row by row, from the exact probabilities."""
    counts = torch.stack([torch.bincount(row, minlength=len(exact)) for row in drawn])
    return (counts / drawn.shape[1] - exact).abs().sum(1) / 2


def assert_drawn_from(drawn, exact):
    """No farther off than the farthest of 500 exact draws of the same number."""
    generator = torch.Generator().manual_seed(0)
    same = torch.multinomial(exact.expand(500, -1), len(drawn), True, generator=generator)
    assert distance(drawn[None], exact)[0] <= distance(same, exact).max()
    assert not exact[drawn.unique()].eq(0).any()


@functools.cache
def sampling_pair(device):
    return make_pair("Llama", device)


@pytest.mark.parametrize("name", FILTERS)
def test_tokens_are_drawn_from_the_filtered_distribution(name, device, started):
    model, twin = sampling_pair(device)
    ids = tokens(1, 9, device)
    options = {"do_sample": True, **FILTERS[name]}
    kept = {"return_dict_in_generate": True, "output_scores": True}
    scores = twin.generate(ids, max_new_tokens=1, **options, **kept).scores[0]
    torch.manual_seed(11)
    ours = model.generate(ids, max_new_tokens=1, num_return_sequences=DRAWS, **options)
    assert ours.shape == (DRAWS, 10) and torch.equal(ours[:, :9], ids.expand(DRAWS, -1))
    assert_drawn_from(ours[:, 9].cpu(), scores[0].softmax(-1).cpu())
    assert len(started) == 1 and started[0]["host_samples"] is False


def test_the_second_token_is_drawn_anew(device):
    model, twin = sampling_pair(device)
    ids = tokens(1, 9, device)
    torch.manual_seed(12)
    ours = model.generate(
        ids, max_new_tokens=2, num_return_sequences=DRAWS, do_sample=True, top_k=4
    )
    first = ours[:, 9].mode().values
    prompt = torch.cat([ids[0], first[None]])[None]
    scores = twin.generate(
        prompt,
        max_new_tokens=1,
        do_sample=True,
        top_k=4,
        return_dict_in_generate=True,
        output_scores=True,
    ).scores[0]
    drawn = ours[ours[:, 9] == first, 10].cpu()
    assert len(drawn) > DRAWS / 4
    assert_drawn_from(drawn, scores[0].softmax(-1).cpu())


def test_a_seed_repeats_and_another_differs(device):
    model, _ = sampling_pair(device)
    inputs = batch(device)

    def draw(seed):
        torch.manual_seed(seed)
        return model.generate(**inputs, max_new_tokens=12, do_sample=True)

    first, again, other = draw(1), draw(1), draw(2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(model.generate(**inputs, max_new_tokens=12, do_sample=True), other)
    repeated = inputs["input_ids"][2:].expand(3, -1)
    rows = model.generate(repeated, max_new_tokens=12, do_sample=True)
    assert not torch.equal(rows[0], rows[1])  # each row has draws of its own


# -------------------------------------------------------------------------------------- threads


def test_threads_take_turns(device, started):
    model, twin = shared_pair(device)
    calls = [batch(device), batch(device, padding=(0, 1)), batch(device, padding=(2,), length=7)]
    expected = [twin.generate(**inputs, max_new_tokens=12) for inputs in calls]
    together = threading.Barrier(4)

    def run(number):
        together.wait()
        return model.generate(**calls[number % 3], max_new_tokens=12)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, range(12)))
    assert all(torch.equal(r, expected[i % 3]) for i, r in enumerate(results))
    assert len(started) == 12


def test_unpatch_waits_for_a_call_of_another_thread(device):
    model, twin = make_pair("Llama", device)

    class Unpatches(Recorder):
        def put(self, value):
            if len(self.chunks) == 2:
                self.job = pool.submit(llmfast.unpatch, model)
                time.sleep(0.1)  # it could have done harm by now
            super().put(value)

    ids = tokens(1, 9, device)
    with ThreadPoolExecutor(1) as pool:
        streamer = Unpatches()
        ours = model.generate(ids, max_new_tokens=12, streamer=streamer)
        streamer.job.result(timeout=30)
    assert "generate" not in vars(model)
    assert torch.equal(ours, twin.generate(ids, max_new_tokens=12))
    check(model, twin, ids, max_new_tokens=12)
