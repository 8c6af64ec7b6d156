"""patch: every row of a batch, every cache, every way of generating, and unpatch.

On a GPU the Triton kernels run. On the CPU the tests force the same swap with the references.
"""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, StaticCache

import llmfast
from llmfast.errors import UserError
from llmfast.model import attention, modules
from llmfast.model import patch as patch_module
from llmfast.model.swap import Operations
from tiny_models import KINDS, from_config, make, tokens

HALF = {"training": "the module is in training mode", "autograd": "outside torch.no_grad()"}


def logits(model, ids, mask=None, **kwargs):
    with torch.no_grad():
        return model(ids, attention_mask=mask, **kwargs).logits


def swap(model, **kwargs):
    """Patch with everything forced, and assert that something was swapped."""
    report = llmfast.patch(model, ops="all", **kwargs)
    assert report.swapped > 0, report
    return report


def assert_close(actual, expected):
    """Assert equality up to the order of float32 sums: some hundred roundings of the largest."""
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=200 * 2**-24 * scale)


def greedy(model, ids, mask=None, **kwargs):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=12, pad_token_id=0, **kwargs
    )


def padding(ids, side):
    mask = torch.ones_like(ids)
    for row, length in enumerate((0, 5, 1, 3)[: len(ids)]):
        if length and side == "left":
            mask[row, :length] = 0
        elif length:
            mask[row, -length:] = 0
    return mask


def without_forward(model):
    return not any("forward" in vars(m) or attention.STATE in vars(m) for m in model.modules())


# ------------------------------------------------------------------------------- what is swapped


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_llama_and_qwen3_swap_fully(kind, device):
    model = make(kind, device)
    report = swap(model, strict=True)
    swapped = [e for e in report.entries if e.swapped]
    norms = [e for e in swapped if e.operation == "rms_norm"]
    assert len(norms) == sum("norm" in n.split(".")[-1] for n, _ in model.named_modules())
    assert [e.class_name for e in swapped if e.operation == "silu_mul"] == [f"{kind}MLP"] * 2
    attends = [e.class_name for e in swapped if e.operation == "flash_attention"]
    assert attends == [f"{kind}Attention"] * 2
    assert report.kept == 0
    assert all(e.error <= max(2 * e.own_error, 4 * 2**-23) for e in swapped)
    kept = {e.class_name for e in report.entries if not e.swapped}
    assert kept == {"Embedding", "Linear", f"{kind}RotaryEmbedding"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_stays_right(kind, device):
    model = make(kind, device)
    ids = tokens(3, 24, device)
    mask = padding(ids, "left")
    before = logits(model, ids, mask)
    report = llmfast.patch(model, ops="all")
    after = logits(model, ids, mask)
    assert_close(after[mask.bool()], before[mask.bool()])
    # each module that holds weights is accounted for, and none twice
    names = [entry.name for entry in report.entries]
    assert len(names) == len(set(names))
    assert {n for n, m in model.named_modules() if m._parameters} <= set(names)


def test_layer_norms_are_not_taken_for_rms_norms(device):
    report = llmfast.patch(make("Cohere", device), ops="all")
    kept = {(e.class_name, e.reason) for e in report.entries if e.expected and not e.swapped}
    assert kept == {("CohereLayerNorm", "not what rms_norm computes")}
    assert report.kept == 3


@pytest.mark.parametrize(("kind", "offset"), [("Gemma2", True), ("Llama", False)])
def test_gemma_s_norm_is_told_from_llama_s(kind, offset, device):
    entries = swap(make(kind, device)).entries
    assert {"1 + weight" in e.reason for e in entries if e.operation == "rms_norm"} == {offset}


def test_a_merged_gate_and_up_is_recognised(device):
    entries = swap(make("Phi3", device)).entries
    assert [e.operation for e in entries if e.class_name == "Phi3MLP"] == ["silu_mul"] * 2


@pytest.mark.parametrize("family", patch_module.FAMILIES)
def test_one_family_alone(family, device):
    model = make("Llama", device)
    ids = tokens(2, 9, device)
    before = logits(model, ids)
    report = llmfast.patch(model, ops=[family])
    assert {e.operation for e in report.entries if e.swapped} == {
        {"norm": "rms_norm", "activation": "silu_mul", "attention": "flash_attention"}[family]
    }
    assert_close(logits(model, ids), before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks at a model on the CPU")
def test_on_the_cpu_nothing_is_swapped_unless_asked():
    model = make("Llama")
    report = llmfast.patch(model, strict=True)
    assert report.swapped == 0
    assert "On the CPU nothing is swapped" in str(report)
    assert without_forward(model)
    llmfast.unpatch(model)


def test_the_report_is_a_table(device):
    text = str(swap(make("Qwen3", device)))
    for words in ("13 modules swapped, 0 kept", "Qwen3RMSNorm", "flash_attention", "torch.compile"):
        assert words in text


# ----------------------------------------------------------------------------- right everywhere


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Mistral", "Gemma2"])
def test_logits_of_every_row_of_a_padded_batch(kind, side, device):
    model = make(kind, device)
    ids = tokens(4, 21, device)
    mask = padding(ids, side)
    before = logits(model, ids, mask)
    report = swap(model)
    after = logits(model, ids, mask)
    for row in range(4):
        valid = mask[row].bool()
        assert_close(after[row, valid], before[row, valid])
    assert not report.fallbacks


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
def test_logits_of_every_step_with_a_cache(kind, static, device):
    """Compare a padded prefill, a chunk of three tokens and two single ones."""
    model = make(kind, device)
    ids = tokens(2, 20, device)
    mask = padding(ids, "left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def run():
        cache = StaticCache(model.config, max_cache_len=32) if static else None
        rows, start = [], 0
        for stop in (15, 18, 19, 20):
            with torch.no_grad():
                out = model(
                    ids[:, start:stop],
                    attention_mask=mask[:, :stop],
                    position_ids=positions[:, start:stop],
                    past_key_values=cache,
                    use_cache=True,
                )
            cache = out.past_key_values
            rows.append(out.logits)
            start = stop
        return torch.cat(rows, dim=1)

    before = run()
    report = swap(model)
    after = run()
    assert_close(after[mask.bool()], before[mask.bool()])
    assert not report.fallbacks


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"cache_implementation": "static", "disable_compile": True},
        {"num_beams": 3},
        {"output_hidden_states": True, "return_dict_in_generate": True},
    ],
    ids=["dynamic", "static", "beams", "hidden"],
)
@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
def test_generated_tokens_are_equal_in_float32(kind, how, device):
    model = make(kind, device)
    ids = tokens(3, 10, device)
    mask = padding(ids, "left")
    before = greedy(model, ids, mask, **how)
    report = swap(model)
    after = greedy(model, ids, mask, **how)
    if "output_hidden_states" in how:
        assert torch.equal(after.sequences, before.sequences)
        assert len(after.hidden_states) == len(before.hidden_states) == 12
        assert [len(step) for step in after.hidden_states] == [3] * 12  # embeddings and 2 blocks
        assert_close(after.hidden_states[3][2], before.hidden_states[3][2])
    else:
        assert torch.equal(after, before)
    assert not report.fallbacks


def test_a_compiled_decode_with_a_static_cache(device):
    """Compile as transformers' generate does on a GPU; on the CPU this is forced."""
    from transformers import CompileConfig

    backend = "inductor" if device.type == "cuda" else "eager"
    how = CompileConfig(backend=backend, mode=None)
    how._compile_all_devices = True
    model = make("Llama", device)
    ids = tokens(2, 10, device)
    before = greedy(model, ids)
    swap(model)
    after = greedy(model, ids, cache_implementation="static", compile_config=how)
    assert torch.equal(after, before)
    torch._dynamo.reset()


def test_hidden_states_of_a_forward(device):
    model = make("Llama", device)
    ids = tokens(2, 9, device)
    with torch.no_grad():
        before = model(ids, output_hidden_states=True).hidden_states
        swap(model)
        after = model(ids, output_hidden_states=True).hidden_states
    assert len(after) == len(before) == 3
    for ours, theirs in zip(after, before, strict=True):
        assert_close(ours, theirs)


def test_prompt_lookup_and_an_assistant_in_transformers_own_generate(device):
    model, assistant = make("Llama", device), make("Llama", device, num_hidden_layers=1)
    ids = tokens(1, 6, device).repeat(1, 3)  # repeats, so that lookup finds something
    plain = greedy(model, ids)
    swap(model)
    swap(assistant)
    assert torch.equal(greedy(model, ids, prompt_lookup_num_tokens=4), plain)
    assert torch.equal(greedy(model, ids, assistant_model=assistant), plain)


def test_a_mask_with_holes_goes_to_the_original(device):
    model = make("Llama", device)
    ids = tokens(2, 12, device)
    mask = torch.ones_like(ids)
    mask[0, 4:6] = 0
    before = logits(model, ids, mask)
    report = swap(model)
    assert_close(logits(model, ids, mask)[mask.bool()], before[mask.bool()])
    reason = "a mask that is not causal with padding at the ends"
    assert report.fallbacks == {("LlamaAttention", reason): 2}
    assert "fell back: LlamaAttention, 2 calls" in str(report)


def test_a_mask_of_four_dimensions_goes_to_the_original(device):
    model = make("Llama", device)
    ids = tokens(1, 8, device)
    bidirectional = torch.ones(1, 1, 8, 8, dtype=torch.bool, device=device)
    before = logits(model, ids, bidirectional)
    report = swap(model)
    assert_close(logits(model, ids, bidirectional), before)
    assert sum(report.fallbacks.values()) == 2


def test_an_attention_that_says_it_is_not_causal_goes_to_the_original(device):
    """Without a mask, transformers' sdpa obeys the module."""
    model = make("Llama", device)
    ids = tokens(2, 9, device)
    report = swap(model)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    plain = make("Llama", device)
    for layer in plain.model.layers:
        layer.self_attn.is_causal = False
    assert_close(logits(model, ids), logits(plain, ids))
    assert report.fallbacks == {("LlamaAttention", "not causal"): 2}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_errs_no_more_than_the_original(dtype, device):
    """Apply the relative rule to a model's logits, against the same weights in float64."""
    model = make("Llama", device).to(dtype)
    ids = tokens(2, 24, device)
    oracle = logits(copy.deepcopy(model).double(), ids)
    own = (logits(model, ids).double() - oracle).square().mean().sqrt()
    swap(model)
    error = (logits(model, ids).double() - oracle).square().mean().sqrt()
    assert error <= 2 * own


# --------------------------------------------------------------------------- nothing else changes


def test_two_models_from_one_config_do_not_touch_each_other(device):
    one = make("Llama", device)
    config = one.config
    two = from_config("Llama", config, device)
    assert two.config is config
    ids = tokens(2, 9, device)
    before = logits(two, ids)
    swap(one)
    assert two.config is config and config._attn_implementation == "sdpa"
    assert torch.equal(logits(two, ids), before)
    assert without_forward(two)


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Gemma2", "DeepseekV3"])
def test_unpatch_restores_bit_for_bit(kind, device):
    model = make(kind, device)
    ids = tokens(2, 9, device)
    before = logits(model, ids)
    state = {name: dict(vars(m)) for name, m in model.named_modules()}
    swap(model)
    logits(model, ids)
    llmfast.unpatch(model)
    for name, module in model.named_modules():
        assert vars(module).keys() == state[name].keys()
        assert all(vars(module)[k] is state[name][k] for k in state[name]), name
    assert torch.equal(logits(model, ids), before)


def test_the_context_manager_unpatches_after_an_error(device):
    model = make("Llama", device)
    with pytest.raises(RuntimeError, match="inside"), llmfast.patched(model, ops="all") as report:
        assert report.swapped == 9
        raise RuntimeError("inside")
    assert without_forward(model)
    llmfast.patch(model, ops="all")  # so it was unpatched


def test_a_failure_in_the_middle_restores(device, monkeypatch):
    model = make("Llama", device)
    ids = tokens(2, 9, device)
    before, config = logits(model, ids), model.config

    def fail(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(attention, "verify", fail)  # after norms and MLPs have been swapped
    with pytest.raises(KeyboardInterrupt):
        llmfast.patch(model, ops="all")
    assert model.config is config and model.model.config is config
    assert without_forward(model)
    assert torch.equal(logits(model, ids), before)


def test_a_wrong_operation_is_kept_out(device):
    """Verification keeps the bug of a kernel away from a user's model."""

    def wrong(x, weight, *, eps, unit_offset=False):
        return nn.functional.rms_norm(x, weight.shape, weight, eps * 10)

    model = make("Llama", device)
    report = patch_module.swap_in(model, Operations(rms_norm=wrong))
    kept = [e for e in report.entries if e.class_name == "LlamaRMSNorm"]
    assert len(kept) == 5 and not any(e.swapped for e in kept)
    assert kept[0].reason == "not what rms_norm computes" and kept[0].error > kept[0].own_error
    llmfast.unpatch(model)
    with pytest.raises(UserError, match="LlamaRMSNorm: not what rms_norm computes"):
        patch_module.swap_in(model, Operations(rms_norm=wrong), strict=True)
    assert without_forward(model)


def test_a_deepcopy_is_patched_on_its_own(device):
    model = make("Llama", device)
    ids = tokens(2, 9, device)
    swap(model)
    before = logits(model, ids)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # a tensor that the copy still shares would show
    assert torch.equal(logits(twin, ids), before)
    llmfast.unpatch(twin)
    assert without_forward(twin) and not without_forward(model)


def test_pickle_keeps_the_patch(device):
    model = make("Llama", device)
    ids = tokens(2, 9, device)
    swap(model)
    before = logits(model, ids)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(twin, ids), before)
    assert not without_forward(twin)
    llmfast.unpatch(twin)
    assert without_forward(twin)


def test_saving_a_patched_model(device, tmp_path):
    model = make("Llama", device)
    ids = tokens(2, 9, device)
    before = logits(model, ids)
    names = list(model.state_dict())
    swap(model)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    assert "llmfast" not in (tmp_path / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path).to(device)
    assert again.config._attn_implementation == "sdpa"
    assert_close(logits(again, ids), before)


def test_new_weights_and_a_new_dtype_are_followed(device):
    model, other = make("Llama", device), make("Llama", device)
    for parameter in other.parameters():
        parameter.data.mul_(1.5)
    ids = tokens(2, 9, device)
    report = swap(model)
    model.load_state_dict(other.state_dict())
    assert_close(logits(model, ids), logits(other, ids))
    oracle = logits(copy.deepcopy(other).half(), ids)
    ours = logits(model.half(), ids)
    # two computations in float16 of values up to about 4, through some 30 roundings each
    torch.testing.assert_close(ours, oracle, rtol=0, atol=0.03)
    assert not report.fallbacks


def test_double_runs_on_the_cpu_and_goes_to_the_original_elsewhere(device):
    model, plain = make("Llama", device), make("Llama", device)
    ids = tokens(2, 9, device)
    report = swap(model)
    ours, theirs = logits(model.double(), ids), logits(plain.double(), ids)
    if device.type == "cpu":  # the references compute in float64, transformers' norms in float32
        assert_close(ours, theirs)
        assert not report.fallbacks
    else:
        assert torch.equal(ours, theirs)
        assert {"float64" in reason for _, reason in report.fallbacks} == {True}


def test_an_adapter_added_after_the_patch_is_followed(device):
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return 2 * self.base(x)

    model, plain = make("Llama", device), make("Llama", device)
    swap(model)
    for m in (model, plain):
        m.model.layers[0].mlp.up_proj = Adapter(m.model.layers[0].mlp.up_proj)
    ids = tokens(2, 9, device)
    assert_close(logits(model, ids), logits(plain, ids))


@pytest.mark.parametrize("when", HALF)
def test_training_and_autograd_use_the_original_modules(when, device, caplog):
    model, plain = make("Llama", device), make("Llama", device)
    report = swap(model)
    ids = tokens(2, 9, device)
    with caplog.at_level(logging.WARNING, "llmfast"):
        if when == "training":
            model.train()
            plain.train()
        for _ in range(2):
            ours, theirs = model(ids, labels=ids).loss, plain(ids, labels=ids).loss
    assert torch.equal(ours, theirs)
    ours.backward()
    theirs.backward()
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)
    assert report.fallbacks == {
        ("LlamaRMSNorm", HALF[when]): 10,
        ("LlamaMLP", HALF[when]): 4,
        ("LlamaAttention", HALF[when]): 4,
    }
    assert len(caplog.records) == 3  # once per class, not per call


def test_a_model_in_training_mode_can_be_patched_and_stays_in_it(device):
    model = make("Llama", device)
    model.train()
    model.model.norm.eval()
    swap(model)
    assert model.training and not model.model.norm.training
    assert model.model.layers[0].mlp.training


def test_the_random_state_is_left_alone(device):
    model = make("Llama", device)
    torch.manual_seed(3)
    expected = torch.rand(4, device=device)
    torch.manual_seed(3)
    swap(model)
    assert torch.equal(torch.rand(4, device=device), expected)


# ------------------------------------------------------------------------------- other libraries


def test_layers_of_another_class_are_kept_with_the_reason(device):
    class Quantized(nn.Linear):
        pass

    model = make("Llama", device)
    model.model.layers[0].mlp.gate_proj.__class__ = Quantized
    report = swap(model)
    entry = next(e for e in report.entries if e.name == "model.layers.0.mlp")
    assert not entry.swapped and entry.reason == "gate_proj is Quantized, not torch.nn.Linear"
    assert next(e for e in report.entries if e.name == "model.layers.1.mlp").swapped


def test_an_overridden_forward_is_kept(device):
    model = make("Llama", device)
    norm = model.model.norm
    norm.forward = original = norm.forward
    report = swap(model)
    entry = next(e for e in report.entries if e.name == "model.norm")
    assert not entry.swapped and "overridden already" in entry.reason
    llmfast.unpatch(model)
    assert vars(norm)["forward"] is original


def test_a_module_on_another_device_is_kept():
    model = make("Llama")
    model.model.norm.to("meta")
    report = llmfast.patch(model, ops="norm")
    entry = next(e for e in report.entries if e.name == "model.norm")
    assert not entry.swapped and entry.reason == "on meta, the model is on cpu"


def test_an_attention_that_is_neither_sdpa_nor_eager_is_kept(device):
    model = make("Llama", device)
    model.config._attn_implementation_internal = "flex_attention"
    report = llmfast.patch(model, ops="all")
    assert any("'flex_attention'" in note for note in report.notes)
    assert not any(e.operation == "flash_attention" for e in report.entries)


def test_torch_compile_after_a_patch(device):
    model = make("Llama", device)
    ids = tokens(2, 9, device)
    before = logits(model, ids)
    swap(model)
    compiled = torch.compile(model, backend="inductor" if device.type == "cuda" else "aot_eager")
    assert_close(logits(compiled, ids), before)
    torch._dynamo.reset()


def test_torch_compile_before_a_patch_is_refused(device):
    model = make("Llama", device)
    with pytest.raises(UserError, match=r"patch it first, then call torch\.compile"):
        llmfast.patch(torch.compile(model))
    model.model.layers[0].compile()
    with pytest.raises(UserError, match="compiled"):
        llmfast.patch(model)


# ------------------------------------------------------------------------------------- bad input


def test_patching_twice_and_unpatching_what_is_not(device):
    model = make("Llama", device)
    with pytest.raises(UserError, match="not patched"):
        llmfast.unpatch(model)
    swap(model)
    with pytest.raises(UserError, match="patched already"):
        llmfast.patch(model)
    llmfast.unpatch(model)
    with pytest.raises(UserError, match="not patched"):
        llmfast.unpatch(model)


def test_bad_arguments_are_named():
    with pytest.raises(UserError, match="norm, activation, attention, generate or 'all', got rope"):
        llmfast.patch(make("Llama"), ops=["norm", "rope"])
    with pytest.raises(UserError, match="or 'all', got none"):
        llmfast.patch(make("Llama"), ops=[])
    with pytest.raises(UserError, match="model of transformers, got Linear"):
        llmfast.patch(nn.Linear(2, 2))
    with pytest.raises(UserError, match="on meta"):
        llmfast.patch(make("Llama", "meta"))


def test_an_encoder_decoder_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(UserError, match="encoder-decoder"):
        llmfast.patch(T5ForConditionalGeneration(config))


# ------------------------------------------------------------------------------------ the parts


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1, 1, 1], [1, 1, 1]], (None, None)),
        ([[0, 1, 1], [1, 1, 1]], ([1, 0], [3, 3])),
        ([[1, 1, 0], [0, 1, 0]], ([0, 1], [2, 2])),
        ([[0, 0, 0], [1, 1, 1]], ([0, 0], [0, 3])),
        ([[1, 0, 1], [1, 1, 1]], None),
    ],
)
def test_padding_ranges(rows, expected, device):
    mask = torch.tensor(rows, dtype=torch.bool, device=device)
    got = attention._padding_ranges(mask, kv_length=3, kv_offset=0)
    if got is not None:
        got = tuple(None if t is None else t.tolist() for t in got)
    assert got == expected


def test_a_static_cache_is_padding_behind_the_mask(device):
    mask = torch.ones(2, 3, dtype=torch.bool, device=device)
    start, end = attention._padding_ranges(mask, kv_length=8, kv_offset=0)
    assert start.tolist() == [0, 0] and end.tolist() == [3, 3]


def test_known_patterns_are_told_from_others():
    from transformers import masking_utils as mu

    assert attention._causal_window(mu.causal_mask_function) == (True, None)
    assert attention._causal_window(mu.sliding_window_causal_mask_function(5)) == (True, 5)
    others = [
        mu.bidirectional_mask_function,
        mu.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64)),
        mu.or_masks(mu.causal_mask_function, mu.causal_mask_function),
        lambda b, h, q, k: k <= q,
    ]
    for function in others:
        assert attention._causal_window(function) == (False, None)


def test_twins_share_a_verification_and_strangers_do_not(device):
    model = make("Llama", device)
    first, second = (layer.mlp for layer in model.model.layers)
    assert modules.attributes(first) == modules.attributes(second)
    second.act_fn = nn.GELU()
    assert modules.attributes(first) != modules.attributes(second)
    norms = [model.model.layers[0].input_layernorm, model.model.norm]
    assert modules.attributes(norms[0]) == modules.attributes(norms[1])
    norms[1].variance_epsilon = 1e-3
    assert modules.attributes(norms[0]) != modules.attributes(norms[1])
    report = swap(model)
    operations = [e.operation for e in report.entries if e.class_name == "LlamaMLP"]
    assert operations == ["silu_mul", "gelu_mul"]
