"""Dense weights are freed while packed ones replace them, and restored afterwards."""

import copy
import gc

import pytest
import torch

import llmfast
from engines import executor_of
from generating import batch
from llmfast.errors import UserError
from llmfast.quantization.driver import quantize, simulate
from llmfast.runner import block_model, make_model
from llmfast.weights.model_weights import attach, set_quantized
from tiny_models import make, tokens

# on the CPU, where dense weights are faster and kept, they are freed for these tests alone
CPU = torch.device("cpu")
GREEDY = {"max_new_tokens": 12, "do_sample": False}
PATCH = {"ops": "generate", "weights": "int4", "group_size": 32}
IDS = tokens(2, 20)


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch):
    monkeypatch.setattr(make_model, "OFFLOADED", ("cpu", "cuda"))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_is(model, before):
    now = model.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], before[name]) for name in before)
    assert all(not p.isnan().any() for p in model.parameters())


def held(model):
    """Bytes behind a model's parameters."""
    storages = [p.untyped_storage() for p in model.parameters()]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def alive():
    """Bytes of all floating-point matrices that this process holds."""
    gc.collect()
    found = {}
    for each in gc.get_objects():
        if (
            type(each) in (torch.Tensor, torch.nn.Parameter)
            and each.dtype == torch.float32
            and each.ndim == 2
        ):
            found[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return sum(found.values())


def logits(model, ids=IDS):
    return model(ids).logits.detach()


def close_to(got, wanted):
    """Sums in another order through two blocks; some hundred roundings."""
    torch.testing.assert_close(got, wanted, rtol=0, atol=200 * 2**-24 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", ["Llama", "Phi3", "Gemma2"])
def test_no_dense_copy_is_kept_and_all_forwards_compute_the_same(kind):
    model, twin = make(kind), make(kind)
    before, dense = state(model), held(model)
    linears = sum(p.nbytes for n, p in model.named_parameters() if "_proj" in n)
    llmfast.patch(model, **PATCH)
    count = 8 if kind == "Phi3" else 14
    assert held(model) == dense - linears + 4 * count
    beams = {"num_beams": 2, "max_new_tokens": 8, "do_sample": False}
    with simulate(twin, quantize(twin, group_size=32)):
        wanted = logits(twin)
        with torch.no_grad():
            close_to(logits(model), wanted)
        close_to(logits(model), wanted)  # with autograd on
        for options in (GREEDY, beams):
            ours, its = (m.generate(**batch(CPU), **options) for m in (model, twin))
            assert torch.equal(ours, its)
        simulated = state(twin)
    assert_is_state(model.state_dict(), simulated)
    llmfast.unpatch(model)
    assert_is(model, before)
    assert held(model) == dense and not any(m._state_dict_hooks for m in model.modules())
    assert torch.equal(logits(model), logits(twin))


def assert_is_state(got, wanted):
    assert all(torch.equal(got[name], value) for name, value in wanted.items())


def test_no_tensor_anywhere_holds_them():
    """Not only the parameters: also the blocks, the shadow and leftovers of verification."""
    model = make("Llama", hidden_size=128, intermediate_size=256)
    linears = sum(p.nbytes for n, p in model.named_parameters() if "_proj" in n)
    attach(model, quantize(model, group_size=32))
    full = alive()
    steps = make_model.make_step_model(model)
    kept = alive()
    scales = sum(part.scales.nbytes for part in steps.built.packed)
    assert full - kept >= linears - scales - 2**14  # rotary tables and the like


def test_gradients_of_inputs_are_those_of_the_dense_weights():
    model, twin = make("Llama", attention_bias=True), make("Llama", attention_bias=True)
    grads = []
    llmfast.patch(model, **PATCH)
    with simulate(twin, quantize(twin, group_size=32)):
        for each in (model, twin):
            x = each.get_input_embeddings()(IDS).detach().requires_grad_()
            each(inputs_embeds=x).logits.square().mean().backward()
            bias = each.model.layers[0].self_attn.q_proj.bias
            grads.append((x.grad, bias.grad))
    for ours, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_a_copy_has_its_own(weights):
    model = make("Llama")
    before = state(model)
    llmfast.patch(model, **PATCH | {"weights": weights})
    wanted = model.generate(**batch(CPU), **GREEDY)
    twin = copy.deepcopy(model)
    llmfast.unpatch(model)
    assert_is(model, before)
    with torch.no_grad():
        assert not torch.equal(logits(twin), logits(model))
    assert torch.equal(twin.generate(**batch(CPU), **GREEDY), wanted)
    llmfast.unpatch(twin)
    assert_is(twin, before)
    llmfast.patch(model, **PATCH)
    twin = copy.deepcopy(model)
    llmfast.unpatch(twin)  # before it has generated anything
    assert_is(twin, before)


def test_a_model_in_another_dtype_computes_and_is_packed_again():
    model = make("Llama")
    llmfast.patch(model, **PATCH)
    with torch.no_grad():
        wanted = logits(model)
        model.double()
        close_to(logits(model).float(), wanted)
    model.generate(**batch(CPU), **GREEDY)
    assert model.generate.args[1].step_model.packed_bytes > 0
    with torch.no_grad():
        close_to(logits(model).float(), wanted)


def test_weights_of_the_checkpoint_are_restored():
    model = make("Llama")
    found = quantize(model, group_size=32)
    with torch.no_grad():
        for name, w in found.weights.items():
            model.get_parameter(f"{name}.weight").copy_(w.dequantize())
    set_quantized(model, found.weights)
    before = state(model)
    llmfast.patch(model, ops="generate", weights="own")
    assert held(model) < sum(value.nbytes for value in before.values())
    llmfast.unpatch(model)
    assert_is(model, before)


def test_a_shared_weight_is_kept():
    model = make("Llama")
    first, second = (layer.mlp for layer in model.model.layers)
    second.down_proj.weight = first.down_proj.weight
    llmfast.patch(model, **PATCH)
    assert first.down_proj.weight.untyped_storage().nbytes() > 4
    assert first.up_proj.weight.untyped_storage().nbytes() == 4
    llmfast.unpatch(model)
    assert second.down_proj.weight is first.down_proj.weight


def test_the_engine_frees_them_while_it_is_open():
    model, twin = make("Llama"), make("Llama")
    attach(model, quantize(model, group_size=32))
    before, dense = state(model), held(model)
    prompt = IDS[0].tolist()
    with llmfast.LLM(model, max_num_seqs=2) as llm:
        assert held(model) < dense / 2
        params = llmfast.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        (result,) = llm.generate([prompt], params)
    assert_is(model, before)
    with simulate(twin, quantize(twin, group_size=32)):
        wanted = twin.generate(torch.tensor([prompt]), min_new_tokens=8, max_new_tokens=8)
    assert list(result.outputs[0].token_ids) == wanted[0, 20:].tolist()


def test_the_engine_s_cache_is_freed_before_dense_weights_are_restored(monkeypatch):
    """The cache takes all memory, so there would be none for them."""
    model = make("Llama")
    before = state(model)
    llm = llmfast.LLM(model, max_num_seqs=2, weights="int4", group_size=32)
    executor, restore_dense, seen = executor_of(llm), block_model.restore_dense, []

    def watched(model):
        seen.append((len(executor.cache.keys), executor.num_graphs))
        restore_dense(model)

    monkeypatch.setattr(block_model, "restore_dense", watched)
    assert executor.cache.keys
    llm.close()
    assert seen == [(0, 0)]
    assert_is(model, before)


def test_the_engine_rounds_a_model_while_it_is_open():
    model, twin = make("Llama"), make("Llama")
    before, dense = state(model), held(model)
    prompt = IDS[0].tolist()
    params = llmfast.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with llmfast.LLM(model, max_num_seqs=2, weights="int4", group_size=32) as llm:
        assert held(model) < dense / 2
        (result,) = llm.generate([prompt], params)
    assert_is(model, before)
    with simulate(twin, quantize(twin, group_size=32)):
        wanted = twin.generate(torch.tensor([prompt]), min_new_tokens=8, max_new_tokens=8)
    assert list(result.outputs[0].token_ids) == wanted[0, 20:].tolist()
    for wrong, words in (
        ({"weights": "int3"}, "LLM: weights must be 'int4'"),
        ({"weights": "int4", "group_size": 48}, "48"),
        ({"weights": "int8", "max_model_len": 10**6}, "max_model_len"),  # after they were rounded
    ):
        with pytest.raises(UserError, match=words):
            llmfast.LLM(model, max_num_seqs=2, **wrong)
        assert_is(model, before)


@pytest.mark.gpu
@pytest.mark.parametrize(("weights", "share"), [("int4", 0.35), ("int8", 0.6)])
def test_on_a_gpu_the_memory_is_freed(weights, share):
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "head_dim": 128}
    model = make("Llama", "cuda", **sizes).bfloat16()
    before = state(model)
    linears = sum(p.nbytes for n, p in model.named_parameters() if "_proj" in n)
    gc.collect()
    dense = torch.cuda.memory_allocated()
    report = llmfast.patch(model, weights=weights)
    assert "8 of their 8 linear layers" in " ".join(str(report).split())
    model.generate(**batch(torch.device("cuda")), **GREEDY)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        logits(model, IDS.cuda())
    saved = dense - torch.cuda.max_memory_allocated()
    assert saved > (1 - share) * linears - 2**26  # the cache, graphs and what a forward takes
    llmfast.unpatch(model)
    assert_is(model, before)
