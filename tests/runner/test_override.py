"""The override of ``generate``: calls left to transformers, errors, copies, changes, undoing."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria

import llmfast
from generating import (
    NoRepeat,
    Recorder,
    batch,
    check,
    make_pair,
    shared_pair,
    tokenizer,
)
from llmfast.errors import UserError
from llmfast.runner import executor
from llmfast.runner.generate.override import override_of
from tiny_models import make, tokens

# --------------------------------------------------------------------- what goes to the original


def count_up(model, input_ids, **_):
    return torch.cat([input_ids, input_ids[:, -1:] + 1], dim=1)


def hole(device):
    inputs = batch(device, padding=(0, 3))
    inputs["attention_mask"][0, 4:6] = 0
    return inputs


def padded_without_a_mask(device):
    ids = tokens(2, 9, device)
    ids[0, 7:] = 0
    return {"input_ids": ids}


EAGER = {"output_attentions": True, "return_dict_in_generate": True}
ORIGINAL = {
    "beam search": lambda d: {"num_beams": 2},
    "beam sample": lambda d: {"num_beams": 2, "do_sample": True},
    "assistant_model": lambda d: {"assistant_model": make("Llama", d, num_hidden_layers=1)},
    "assisted generation": lambda d: {"prompt_lookup_num_tokens": 2},
    "past_key_values": lambda d: {"past_key_values": DynamicCache()},
    "inputs_embeds": lambda d: {
        "input_ids": None,
        "inputs_embeds": torch.ones(2, 3, 64, device=d).cumsum(1) / 64,
    },
    "not a batch of token ids": lambda d: {"input_ids": None},
    "position_ids": lambda d: {"position_ids": torch.arange(2, 11, device=d)[None]},
    "use_cache": lambda d: {"use_cache": False},
    "output_attentions": lambda d: EAGER,
    "output_hidden_states": lambda d: {"output_hidden_states": True},
    "cache_implementation": lambda d: {"cache_implementation": "static", "disable_compile": True},
    "custom_generate": lambda d: {"custom_generate": count_up},
    "prefix_allowed_tokens_fn": lambda d: {"prefix_allowed_tokens_fn": lambda *_: [5, 6, 7]},
    "guidance_scale": lambda d: {"guidance_scale": 1.5},
    "stop_strings": lambda d: {"stop_strings": ["MY"], "tokenizer": tokenizer()},
    "left padding": lambda d: batch(d, padding=(0, 3), side="right"),
    "of left padding": hole,
    "one of left padding": padded_without_a_mask,
}


@pytest.mark.parametrize("reason", ORIGINAL)
def test_unsupported_calls_reach_the_original(reason, device, started, reasons):
    model, twin = shared_pair(device, ops="generate")
    override_of(model).forget_reasons()
    inputs = {"input_ids": tokens(1, 9, device)} | ORIGINAL[reason](device)
    for _ in range(2):
        check(model, twin, max_new_tokens=8, **inputs)
    assert not started
    assert len(reasons()) == 1 and reason in reasons()[0]


@pytest.mark.parametrize("reason", ["training mode", "autocast", "forward hooks"])
def test_states_that_the_runner_does_not_know(reason, device, started, reasons):
    """The runner takes calls before and after."""
    model, twin = make_pair("Llama", device, ops="generate")
    inputs = batch(device)
    before = check(model, twin, **inputs, max_new_tokens=8)
    if reason == "training mode":
        model.train()
        twin.train()
        check(model, twin, **inputs, max_new_tokens=8)
        model.eval()
        twin.eval()
    elif reason == "autocast":
        with torch.autocast(device.type, dtype=torch.bfloat16):
            check(model, twin, **inputs, max_new_tokens=8)
    else:
        hooks = [
            m.model.layers[0].mlp.register_forward_hook(lambda m, args, out: -out)
            for m in (model, twin)
        ]
        steered = check(model, twin, **inputs, max_new_tokens=8)
        assert not torch.equal(steered, before)
        for hook in hooks:
            hook.remove()
    assert len(started) == 1
    assert torch.equal(check(model, twin, **inputs, max_new_tokens=8), before)
    assert len(started) == 2
    assert len(reasons()) == 1 and reason in reasons()[0]


def test_a_streamer_of_a_call_that_turns_out_unsupported(device, started):
    """Found only after transformers has given the streamer the prompt."""
    model, twin = shared_pair(device, ops="generate")
    ids = tokens(1, 9, device)
    ids[0, 7:] = 0
    ours, theirs = Recorder(), Recorder()
    for m, streamer in ((model, ours), (twin, theirs)):
        m.generate(ids, max_new_tokens=5, streamer=streamer)
    assert ours.chunks == theirs.chunks and len(ours.chunks) == 7
    assert not started


class CallsWithin(Recorder):
    """A streamer that generates with the same model."""

    def __init__(self, model, inputs):
        super().__init__()
        self.model, self.inputs, self.results = model, inputs, []

    def put(self, value):
        super().put(value)
        self.results.append(self.model.generate(**self.inputs, max_new_tokens=5))


def test_a_call_from_within_a_call(device, started, reasons):
    model, twin = shared_pair(device)
    override_of(model).forget_reasons()
    outer, inner = batch(device), batch(device, padding=(2, 0))
    expected = twin.generate(**inner, max_new_tokens=5)
    streamer = CallsWithin(model, inner)
    ours = model.generate(tokens(1, 9, device), max_new_tokens=6, streamer=streamer)
    assert torch.equal(ours, twin.generate(tokens(1, 9, device), max_new_tokens=6))
    assert len(streamer.results) == 7
    assert all(torch.equal(result, expected) for result in streamer.results)
    assert len(started) == 1 and len(reasons()) == 1 and "within another call" in reasons()[0]
    check(model, twin, **outer, max_new_tokens=5)
    assert len(started) == 2


def test_a_patched_model_as_an_assistant(device, started):
    """The one that assists is asked for more than tokens; it runs as transformers' own."""
    model, twin = make("Llama", device), make("Llama", device)
    helper, its_twin = (make("Llama", device, num_hidden_layers=1) for _ in range(2))
    llmfast.patch(helper, ops="generate")
    ids = tokens(1, 9, device)
    ours = model.generate(ids, max_new_tokens=9, assistant_model=helper)
    assert torch.equal(ours, twin.generate(ids, max_new_tokens=9, assistant_model=its_twin))
    assert not started


# ------------------------------------------------------------------------------ what goes wrong


class Fails(LogitsProcessor, StoppingCriteria):
    """A streamer, processor or criterion that raises at its third call."""

    def __init__(self, error):
        self.error, self.calls = error, 0

    def __call__(self, input_ids, scores, **kwargs):
        self.put(None)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def put(self, value):
        self.calls += 1
        if self.calls == 3:
            raise self.error

    def end(self):
        raise self.error


class FailsAtTheEnd(Fails):
    def put(self, value):
        pass


class FailingProcessor(Fails):
    def __call__(self, input_ids, scores):
        self.put(None)
        return scores


BREAKS = {
    "streamer": lambda error: {"streamer": Fails(error)},
    "end of a streamer": lambda error: {"streamer": FailsAtTheEnd(error)},
    "streamer, host": lambda error: {"streamer": Fails(error), "logits_processor": [NoRepeat()]},
    "processor": lambda error: {"logits_processor": [FailingProcessor(error)]},
    "criterion": lambda error: {"stopping_criteria": [Fails(error)]},
}


def assert_usable(model, twin, device):
    cache = override_of(model).batch.executor.cache
    assert cache.num_free == cache.num_blocks
    check(model, twin, **batch(device), max_new_tokens=8)
    assert cache.num_free == cache.num_blocks


@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt()], ids=["error", "^C"])
@pytest.mark.parametrize("what", BREAKS)
def test_an_error_of_the_users_ends_the_call_and_no_more(what, error, device):
    model, twin = shared_pair(device)
    with pytest.raises(type(error)) as raised:
        model.generate(**batch(device, padding=(0,)), max_new_tokens=8, **BREAKS[what](error))
    assert raised.value is error
    assert_usable(model, twin, device)


@pytest.mark.parametrize("where", ["prefill", "step"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("none left"), KeyboardInterrupt()])
def test_an_error_in_the_middle_of_a_step(where, error, device, monkeypatch):
    model, twin = make_pair("Llama", device, ops="generate")
    check(model, twin, **batch(device), max_new_tokens=8)

    def fail(*args):
        raise error

    name = {"prefill": "launch", "step": "advance"}[where]
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(executor.Executor, name, fail)
        model.generate(**batch(device), max_new_tokens=8)
    assert_usable(model, twin, device)


def test_a_call_that_does_not_fit(device, monkeypatch):
    model, twin = make_pair("Llama", device)
    check(model, twin, **batch(device), max_new_tokens=8)
    small = weakref.ref(override_of(model).batch.executor.cache.keys[0])
    got = []

    class Full(executor.PagedCache):
        def __init__(self, *args):
            super().__init__(*args)
            got.append(weakref.ref(self.keys[0]))
            raise torch.OutOfMemoryError("none left")

    with monkeypatch.context() as patch:
        patch.setattr(executor, "PagedCache", Full)
        with pytest.raises(UserError, match="generate fewer or shorter") as raised:
            model.generate(**batch(device), max_new_tokens=1000)
    gc.collect()
    # the error, which a notebook keeps, holds on to no memory; nor is the old cache kept
    assert raised.value is not None and got[0]() is None and small() is None
    check(model, twin, **batch(device), max_new_tokens=8)
    assert_usable(model, twin, device)


def test_a_cache_too_large_for_any_machine(device):
    model, twin = shared_pair(device)
    with pytest.raises(UserError, match="does not fit in the memory of"):
        model.generate(**batch(device), max_new_tokens=2**40)
    check(model, twin, **batch(device), max_new_tokens=8)
    assert_usable(model, twin, device)


HOW = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True},
    "host": {"do_sample": False, "logits_processor": [NoRepeat()]},
    "sampled by the host": {"do_sample": True, "logits_processor": [NoRepeat()]},
}


@pytest.mark.parametrize("how", HOW)
def test_logits_that_are_nan(how, device):
    model, twin = make_pair("Llama", device)
    inputs = batch(device)
    token = next(t for t in inputs["input_ids"][1].tolist() if t not in inputs["input_ids"][0])
    kept = model.model.embed_tokens.weight[token].clone()
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = torch.nan
        with pytest.raises(UserError, match="the logits of row 1 are NaN"):
            model.generate(**inputs, max_new_tokens=8, **HOW[how])
        model.model.embed_tokens.weight[token] = kept
    assert_usable(model, twin, device)


# ------------------------------------------------------------------------- copies and changes

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_generates_on_its_own(how, device, started):
    model, twin = make_pair("Llama", device)
    before = check(model, twin, **batch(device), max_new_tokens=8)
    twice = COPIES[how](model)
    assert twice.generate.args[0] is twice
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # whatever the copy still shares would show
    assert torch.equal(check(twice, twin, **batch(device), max_new_tokens=8), before)
    assert len(started) == 2
    llmfast.unpatch(model)
    check(twice, twin, **batch(device), max_new_tokens=8)
    llmfast.unpatch(twice)
    check(twice, twin, **batch(device), max_new_tokens=8)
    assert len(started) == 3


class Adapter(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return 2 * self.base(x)


def add_adapter(model):
    model.model.layers[0].mlp.up_proj = Adapter(model.model.layers[0].mlp.up_proj)


def override(model):
    layer = model.model.layers[0].self_attn.o_proj
    original = layer.forward
    layer.forward = lambda x: -original(x)


def swap_weights(model):
    layer = model.model.layers[0].self_attn
    layer.q_proj.weight.data = layer.q_proj.weight.data.flip(0)


def assign(model):
    state = {name: t.flip(0) * 1.1 for name, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def load(model):
    model.load_state_dict({name: t.flip(0) * 1.1 for name, t in model.state_dict().items()})


def truncate(model):
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1


def replace(model):
    torch.manual_seed(1)
    model.lm_head = nn.Linear(64, 101, bias=True, device=model.device)


CHANGES = {
    "an adapter": add_adapter,
    "half": lambda model: model.half(),
    "there and back": lambda model: model.double().float(),
    "load_state_dict": load,
    "load_state_dict, assign": assign,
    "a parameter's data": swap_weights,
    "fewer layers": truncate,
    "another head": replace,
    "a larger vocabulary": lambda model: model.resize_token_embeddings(120),
}
ENDS = {"a forward overridden": override}


@pytest.mark.parametrize("what", [*CHANGES, *ENDS])
def test_a_change_of_the_model_is_followed(what, device, started, reasons):
    model, twin = make_pair("Llama", device)
    inputs = {**batch(device), "max_new_tokens": 6}
    check(model, twin, **inputs)
    for m in (model, twin):
        torch.manual_seed(3)
        (CHANGES | ENDS)[what](m)
    check(model, twin, **inputs)
    check(model, twin, **inputs)
    assert len(started) == (3 if what in CHANGES else 1)
    assert len(reasons()) == (what in ENDS)
    llmfast.unpatch(model)
    check(model, twin, **inputs)


def test_float64_runs_on_the_cpu_and_goes_to_the_original_elsewhere(device, started):
    model, twin = make_pair("Llama", device)
    check(model.double(), twin.double(), **batch(device), max_new_tokens=6)
    assert len(started) == (device.type == "cpu")


def test_inference_mode_leaves_nothing_behind(device, started):
    """Tensors made in it cannot be written outside of it."""
    model, twin = make_pair("Llama", device)
    inputs = {**batch(device), "max_new_tokens": 6}
    for m in (model, twin):
        load(m)
    with torch.inference_mode():
        check(model, twin, **inputs)
    check(model, twin, **inputs)
    with torch.inference_mode():
        check(model, twin, **inputs, repetition_penalty=1.2)
    check(model, twin, **inputs, repetition_penalty=1.2)
    assert len(started) == 4
    assert not any(p.is_inference() for p in model.parameters())
    model.train()
    model(inputs["input_ids"], labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_unpatch_gives_everything_back(device):
    model, twin = make_pair("Llama", device)
    check(model, twin, **batch(device), max_new_tokens=6)
    override = override_of(model)
    cache = weakref.ref(override.batch.executor.cache.keys[0])
    llmfast.unpatch(model)
    gc.collect()
    assert "generate" not in vars(model) and cache() is None
    assert override.batch is None and override.step_model is None
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())
    state = twin.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    check(model, twin, **batch(device), max_new_tokens=6)


def test_a_forward_put_over_a_swapped_module_is_the_one_that_runs(device):
    model, twin = make_pair("Llama", device)
    for each in (model, twin):
        norm = each.model.norm
        norm.forward = lambda x, norm=norm: 2 * type(norm).forward(norm, x)
    check(model, twin, tokens(1, 9, device), max_new_tokens=6)
    llmfast.unpatch(model)
    assert "forward" in vars(model.model.norm)  # it is not ours to take away


def test_patch_within_inference_mode_leaves_ordinary_parameters(device):
    model, twin = make("Llama", device), make("Llama", device)
    with torch.inference_mode():
        llmfast.patch(model, ops="all")
        check(model, twin, tokens(1, 9, device), max_new_tokens=6)
    assert not any(p.is_inference() for p in model.parameters())
