"""Recipes: every family against the model's own forward, prefilled in chunks and decoded."""

import pytest
import torch
from torch import nn

import llmfast_kernels
from llmfast.model.shadow import make_shadow
from llmfast.model.swap import Operations
from llmfast.model.trace import NotTraced, trace
from llmfast.runner.block_model import BlockModel
from llmfast.runner.blocks.build import build_blocks
from llmfast.runner.blocks.run import BlockOperations
from llmfast.runner.cache import PagedCache
from llmfast.runner.step import Chunk, make_step
from llmfast.runner.verify import run_sequences
from llmfast.weights import dense
from tiny_models import make, tokens

FAMILIES = {
    "Llama": "pre-norm",
    "Mistral": "pre-norm",
    "Qwen2": "pre-norm",
    "Qwen3": "pre-norm",
    "SmolLM3": "pre-norm",
    "Phi3": "pre-norm",
    "Granite": "pre-norm, scaled",
    "Olmo2": "post-norm",
    "Gemma2": "sandwich",
    "Gemma3": "sandwich",
    "Glm": "pre-norm",
}
OTHERS = {
    "GPTNeoX": "LayerNorm",
    "Cohere": "CohereLayerNorm",
    "StableLm": "LayerNorm",
    "Starcoder2": "LayerNorm",
    "Falcon": "forward",
    "Mixtral": "Router",
    "Qwen3Moe": "Router",
    "DeepseekV3": "heads of 32 for keys and of 16 for values",
    "Nemotron": "LayerNorm",
    "Bamba": "attention interface",
    "Mamba2": "attention interface",
}
STEPS = 20


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits[0]


def assert_close(actual, expected, dtype):
    """Sums in another order, through two blocks: some hundred roundings of the largest. The norms
    of transformers round to float32 in a float64 model too, but nothing else does."""
    roundings = 20 if dtype == torch.float64 else 200
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=roundings * 2**-24 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_chunked_prefill_and_decoding_equal_the_models_forward(kind, dtype, device):
    if dtype == torch.float64 and device.type == "cuda":
        pytest.skip("the kernels refuse float64")
    model = make(kind, device).to(dtype)
    ours = BlockModel(model, 128)
    assert ours.built.recipes == [FAMILIES[kind]]
    ids = tokens(3, 64, device)
    lengths = (64, 40, 23)  # past the windows, and past a block of the cache
    sequences = [ids[i, :n] for i, n in enumerate(lengths)]
    actual = run_sequences(ours, [s.tolist() for s in sequences], STEPS, prefill=11)
    expected = torch.cat([logits(model, s[None]) for s in sequences])
    assert_close(actual, expected, dtype)
    greedy = actual.argmax(-1)
    assert torch.equal(greedy, expected.argmax(-1))


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_without_a_recipe_says_why(kind, device):
    model = make(kind, device)
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    with pytest.raises(NotTraced, match=OTHERS[kind]):
        BlockModel(model, 128)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


def test_smollm3_rotates_only_some_layers(device):
    model = make("SmolLM3", device, num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0])
    ours = BlockModel(model, 64)
    assert [b.mixer.rope for b in ours.built.blocks] == [0, 0, 0, None]


def test_gemma3_has_two_tables_and_windows(device):
    types = ["sliding_attention", "full_attention"]
    model = make("Gemma3", device, layer_types=types)
    attention = [b.mixer for b in BlockModel(model, 64).built.blocks]
    assert [a.cache.window for a in attention] == [8, None]
    assert sorted(a.rope for a in attention) == [0, 1]


def test_biases_are_merged_too(device):
    model = make("Llama", device, attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    ours = BlockModel(model, 64)
    ids = tokens(1, 30, device)
    actual = run_sequences(ours, ids.tolist(), 4)
    assert_close(actual, logits(model, ids), torch.float32)


def test_merging_takes_no_memory_and_changes_no_result(device):
    model = make("Llama", device)
    ids = tokens(2, 9, device)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    before = logits(model, ids)
    ours = BlockModel(model, 64)
    layer = model.model.layers[0]
    q, k = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
    assert k.data_ptr() == q.data_ptr() + q.nbytes
    assert torch.equal(logits(model, ids), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with torch.no_grad():  # what is loaded or trained later is in the merged tensor too
        q.add_(1)
    assert torch.equal(ours.built.blocks[0].mixer.qkv.weight.tensor[: len(q)], q)


def test_restore_gives_back_tensors_of_their_own(device):
    model = make("Qwen3", device)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    ours = BlockModel(model, 64)
    ours.restore()
    starts = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(starts)) == len(starts)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_the_models_own_tree_is_untouched(device):
    model = make("Llama", device)
    tree = [(name, type(m), dict(vars(m))) for name, m in model.named_modules()]
    BlockModel(model, 64)
    for (name, kind, attributes), (now, module) in zip(tree, model.named_modules(), strict=True):
        assert (name, kind) == (now, type(module))
        assert vars(module).keys() == attributes.keys()
        assert all(vars(module)[k] is v for k, v in attributes.items())
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_a_shadow_shares_tensors_and_nothing_else(device):
    model = make("Llama", device)
    shadow = make_shadow(model)
    mine, its = dict(model.named_parameters()), dict(shadow.named_parameters())
    assert all(its[name] is parameter for name, parameter in mine.items())
    shadow.model.layers[0].mlp = nn.Identity()
    shadow.config.vocab_size = 7
    shadow.model.norm.register_forward_hook(lambda *_: 1 / 0)
    assert type(model.model.layers[0].mlp).__name__ == "LlamaMLP"
    assert model.config.vocab_size != 7
    logits(model, tokens(1, 3, device))


@pytest.mark.parametrize("kind", ["Llama", "Phi3", "Gemma2"])
def test_every_linear_layer_is_the_operation_s(kind, device, monkeypatch):
    calls = []

    def counted(x, weight, bias=None):
        calls.append(tuple(weight.shape))
        return llmfast_kernels.dense_linear(x, weight, bias)

    def counted_gated(x, weight, bias=None, *, activation):
        calls.append(tuple(weight.shape))
        return llmfast_kernels.gated_linear(x, weight, bias, activation=activation)

    model = make(kind, device)
    monkeypatch.setattr(dense, "dense_linear", counted)
    monkeypatch.setattr(dense, "gated_linear", counted_gated)
    steps = BlockModel(model, 64)
    assert steps.verification.holds
    calls.clear()
    rows = run_sequences(steps, [tokens(1, 9, device)[0].tolist()], 1)
    assert len(calls) == 2 * (4 * len(model.model.layers) + 1)  # of a block, and the head; 2 steps
    assert calls[-1] == (rows.shape[1], model.config.hidden_size)


def test_a_wrong_operation_is_not_verified(device):
    def skewed(x, weight, *, eps, unit_offset=False):
        from llmfast_kernels.norm import rms_norm

        return rms_norm(x, weight, eps=eps * 1.5 + 1e-3, unit_offset=unit_offset)

    with pytest.raises(NotTraced, match="is not what"):
        BlockModel(make("Llama", device), 64, operations=BlockOperations(rms_norm=skewed))


def test_a_wiring_that_no_block_shows_is_found_by_the_whole_check(device, monkeypatch):
    """Blocks that are each right, in a wrong order."""
    import llmfast.runner.block_model as module

    def reversed_blocks(*args):
        built = build_blocks(*args)
        built.blocks.reverse()
        return built

    monkeypatch.setattr(module, "build_blocks", reversed_blocks)
    model = make("Llama", device)
    with pytest.raises(NotTraced, match="the whole model"):
        BlockModel(model, 64)


def test_an_offloaded_model_is_refused(device):
    model = make("Llama", device)
    model.model.layers[0].mlp.forward = lambda x: x
    with pytest.raises(NotTraced, match="overridden"):
        trace(model, Operations())


def test_other_tables_and_padding_rows_change_nothing(device):
    model = make("Qwen3", device)
    ours = BlockModel(model, 128)
    ids = tokens(2, 70, device)
    rows = torch.tensor([69, 139], device=device)

    def run(places, padding):
        cache = PagedCache(ours.layer_caches, 8, model.device)
        for tensor in (*cache.keys, *cache.values):
            tensor.fill_(torch.nan)
        chunks = [Chunk(ids[i].tolist(), 0, places[i], ours.admit(70)) for i in range(2)]
        step = make_step(chunks, cache.block_size, 2, device)
        if padding:
            step.token_ids = torch.cat([step.token_ids, step.token_ids[:3]])
            step.positions = torch.cat([step.positions, step.positions[:3]])
            (slots,), (table,) = step.slots, step.block_tables
            step.slots = (torch.cat([slots, torch.full_like(slots[:3], -1)]),)
            step.query_start = torch.cat([step.query_start, step.query_start[-1:] + 3])
            step.context_len = torch.cat([step.context_len, torch.zeros_like(step.context_len[:1])])
            step.block_tables = (torch.cat([table, torch.full_like(table[:1], -1)]),)
        return ours(step, cache, rows)

    plain = run([[0, 1], [2, 3]], padding=False)
    assert_close(plain[0], logits(model, ids[:1])[-1], torch.float32)
    shuffled = run([[7, 2], [5, 0]], padding=False)
    assert torch.equal(shuffled, plain)
    # rows of padding change the shape of the products, so the sums' order at most
    assert_close(run([[7, 2], [5, 0]], padding=True), plain, torch.float32)
