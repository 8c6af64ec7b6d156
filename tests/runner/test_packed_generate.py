"""``patch(model, weights=...)``: generate over packed weights, and everything back afterwards."""

import copy

import pytest
import torch

import llmfast
from generating import batch
from llmfast.errors import UserError
from llmfast.quantization.driver import quantize, simulate
from llmfast.weights import int4
from llmfast.weights.model_weights import attach, quantized_weights_of
from llmfast_kernels.quantized_linear.reference import int4_linear_reference
from tiny_models import make, tokens

# models are on the CPU in float32, which the kernel does not have: a test below runs it on a GPU
CPU = torch.device("cpu")


def state(model):
    return {name: p.clone() for name, p in model.state_dict().items()}


def assert_is(model, before):
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@torch.no_grad()
def logits(model):
    return model(tokens(2, 20)).logits


GREEDY = {"max_new_tokens": 12, "do_sample": False}


@pytest.mark.parametrize("kind", ["Llama", "Phi3", "Gemma2"])
def test_generate_is_that_of_the_simulated_model(kind):
    model, twin = make(kind), make(kind)
    before, dense = state(model), logits(model)
    report = llmfast.patch(model, ops="generate", weights="int4", group_size=32)
    (line,) = [note for note in report.notes if note.startswith("generate")]
    assert "8 of their 8 linear layers in four bits" in line
    count = 8 if kind == "Phi3" else 14
    assert any(f"{count} linear layers are rounded" in note for note in report.notes)
    with simulate(twin, quantize(twin, group_size=32)):
        wanted = twin.generate(**batch(CPU), **GREEDY)
        assert torch.equal(logits(model), logits(twin))  # its own forward has the same weights
    assert not torch.equal(logits(model), dense)
    assert torch.equal(model.generate(**batch(CPU), **GREEDY), wanted)
    override = model.generate.args[1]
    assert override.step_model.packed_bytes > 0
    memory = llmfast.warmup(model, max_length=16, progress=False).memory
    dense_bytes = sum(
        storage.nbytes()
        for storage in {
            p.untyped_storage().data_ptr(): p.untyped_storage() for p in model.parameters()
        }.values()
    )
    assert memory["weights"] == dense_bytes + override.step_model.packed_bytes
    llmfast.unpatch(model)
    assert_is(model, before)
    assert quantized_weights_of(model) is None and torch.equal(logits(model), dense)
    llmfast.patch(model, ops="generate")  # and again without
    assert model.generate.args[1].step_model.packed_bytes == 0


def test_the_result_of_quantize_is_used():
    model = make("Llama")
    before = state(model)
    ids = tokens(8, 64)
    found = llmfast.quantize(model, method="awq", group_size=32, calibration=ids)
    with llmfast.patched(model, ops="all", weights=found) as report:
        assert any("8 of their 8" in note for note in report.notes)
        ours = model.generate(**batch(CPU), **GREEDY)
        own = type(model).generate(model, **batch(CPU), **GREEDY)
        assert torch.equal(ours, own)
    assert_is(model, before)


def test_eight_bits_have_one_scale_an_output():
    model, twin = make("Llama"), make("Llama")
    before = state(model)
    report = llmfast.patch(model, ops="generate", weights="int8")
    assert any("14 linear layers are rounded to eight bits" in note for note in report.notes)
    assert any("8 of their 8 linear layers in eight bits" in note for note in report.notes)
    block = model.generate.args[1].step_model.built.blocks[0]
    assert block.feed_forward.down.weight.codes.dtype == torch.uint8
    assert block.feed_forward.down.weight.scales.shape == (64, 1)
    with simulate(twin, quantize(twin, weights="int8", group_size=None)):
        wanted = twin.generate(**batch(CPU), **GREEDY)
        assert torch.equal(logits(model), logits(twin))
    assert torch.equal(model.generate(**batch(CPU), **GREEDY), wanted)
    llmfast.unpatch(model)
    assert_is(model, before)


def test_calibrated_methods_find_their_codes_in_patch():
    model, twin = make("Llama"), make("Llama")
    ids = tokens(8, 64)
    llmfast.patch(model, weights="int4", group_size=32, method="gptq", calibration=ids)
    found = quantize(twin, group_size=32, method="gptq", calibration=ids)
    with simulate(twin, found):
        assert torch.equal(logits(model), logits(twin))


def test_a_moved_model_is_packed_again():
    model = make("Llama")
    llmfast.patch(model, ops="generate", weights="int4", group_size=32)
    first = model.generate(**batch(CPU), **GREEDY)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    assert torch.equal(model.generate(**batch(CPU), **GREEDY), first)
    assert model.generate.args[1].step_model.packed_bytes > 0


def test_a_copy_is_unpatched_by_itself():
    model = make("Llama")
    before = state(model)
    llmfast.patch(model, ops="generate", weights="int4", group_size=32)
    twin = copy.deepcopy(model)
    llmfast.unpatch(twin)
    assert_is(twin, before)
    assert quantized_weights_of(model) is not None
    llmfast.unpatch(model)
    assert_is(model, before)
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    assert all(mine.data_ptr() != its.data_ptr() for mine, its in pairs)


def test_the_engine_runs_the_packed_weights_that_a_model_carries(monkeypatch):
    model, twin = make("Llama"), make("Llama")
    attach(model, quantize(model, group_size=32))
    prompt = tokens(1, 12)[0].tolist()
    calls = []

    def counted(**arguments):
        calls.append(arguments)
        return int4_linear_reference(**arguments)

    engine = llmfast.LLM(model, max_num_seqs=2)
    monkeypatch.setattr(int4, "int4_linear", counted)
    params = llmfast.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    (result,) = engine.generate([prompt], params)
    engine.close()
    assert calls
    with simulate(twin, quantize(twin, group_size=32)):
        wanted = twin.generate(torch.tensor([prompt]), min_new_tokens=8, max_new_tokens=8)
    assert list(result.outputs[0].token_ids) == wanted[0, 12:].tolist()


@pytest.mark.gpu
def test_generate_on_a_gpu_in_bfloat16():
    model = make("Llama", "cuda").bfloat16()
    before = state(model)
    report = llmfast.patch(model, weights="int4", group_size=32)
    assert any("8 of their 8 linear layers in four bits" in note for note in report.notes)
    for rows in (1, 3):
        given = batch(torch.device("cuda"), padding=(0,) * rows)
        assert model.generate(**given, **GREEDY).shape[0] == rows
    llmfast.unpatch(model)
    assert_is(model, before)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weights": "int2"}, "weights must be 'int4', 'int8', 'own', .*; got 'int2'"),
        ({"weights": "int8", "group_size": "all"}, "group_size must be 32.*; got 'all'"),
        ({"weights": "int4", "group_size": 48}, "group"),
        ({"weights": "int4", "method": "best"}, "method must be nearest, gptq or awq"),
        ({"weights": "int4", "method": "gptq", "group_size": 32}, "needs a calibration"),
        ({"weights": "int4", "group_size": 32, "ops": "nothing"}, "nothing"),
    ],
)
def test_refused_options_leave_the_model_unchanged(options, says):
    model = make("Llama")
    before = state(model)
    with pytest.raises(UserError, match=says):
        llmfast.patch(model, **options)
    assert_is(model, before)
    assert quantized_weights_of(model) is None and "generate" not in vars(model)


def test_weights_of_another_model_are_refused():
    model = make("Llama")
    before = state(model)
    other = quantize(make("Llama", intermediate_size=128), group_size=32)
    with pytest.raises(UserError, match=r"weights: 'model.layers.0.mlp.*has shape"):
        llmfast.patch(model, weights=other)
    with pytest.raises(UserError, match="weights: the model has no parameter"):
        llmfast.patch(model, weights=quantize(make("Phi3"), group_size=32))
    assert_is(model, before)


def test_a_patch_that_fails_late_puts_the_weights_back(monkeypatch):
    import llmfast.patching as module

    def fail(*_):
        raise RuntimeError("late")

    model = make("Llama")
    before = state(model)
    monkeypatch.setattr(module, "_take_over", fail)
    with pytest.raises(RuntimeError, match="late"):
        llmfast.patch(model, ops="generate", weights="int4", group_size=32)
    assert_is(model, before)
    assert quantized_weights_of(model) is None


def test_an_attachment_that_is_interrupted_leaves_the_model_alone(monkeypatch):
    model = make("Llama")
    before = state(model)
    found = quantize(model, group_size=32)
    moved = []

    def interrupt(self):
        moved.append(self)
        if len(moved) == 3:
            raise KeyboardInterrupt
        return self.clone()

    monkeypatch.setattr(torch.Tensor, "cpu", interrupt)
    with pytest.raises(KeyboardInterrupt):
        attach(model, found)
    monkeypatch.undo()
    assert len(moved) == 3 and quantized_weights_of(model) is None
    assert_is(model, before)
