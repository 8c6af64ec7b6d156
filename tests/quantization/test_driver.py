"""The driver: every linear layer of a decoder, an unchanged model, and refused arguments."""

import gc

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import llmfast
import tiny_models
from llmfast.errors import UserError
from llmfast.model.decoder import capture, decoder_layers, linears, run_layer
from llmfast.quantization import driver
from llmfast.quantization.driver import quantize, simulate
from llmfast.quantization.methods import GptqSettings, Scheme, gptq, round_to_nearest
from llmfast.quantization.scale_folding import find_scale_folds
from llmfast.quantization.statistics import gather_statistics

METHODS = ["nearest", "gptq", "awq"]
IDS = tiny_models.tokens(8, 64)
# linear layers of one block, and the folds of AWQ: (consumers, producer)
NORMS = [(("q_proj", "k_proj", "v_proj"), "input_layernorm")]
OUT, DOWN = (("o_proj",), "v_proj"), (("down_proj",), "up_proj")
LLAMA = [*NORMS, OUT, (("gate_proj", "up_proj"), "post_attention_layernorm"), DOWN]
GEMMA = [*NORMS, OUT, (("gate_proj", "up_proj"), "pre_feedforward_layernorm"), DOWN]
FOLDS = {
    "Llama": LLAMA,
    "Qwen3": LLAMA,
    "Granite": LLAMA,
    "Gemma2": GEMMA,
    "Gemma3": GEMMA,
    "Olmo2": [OUT, DOWN],  # norms come after, so none makes the layers' inputs
    "Phi3": [(("qkv_proj",), "input_layernorm"), (("gate_up_proj",), "post_attention_layernorm")],
    "GPTNeoX": [
        (("query_key_value",), "input_layernorm"),
        (("dense_h_to_4h",), "post_attention_layernorm"),
    ],
    "Cohere": [OUT, DOWN],  # one norm for attention and MLP; see the test
    "Mixtral": [*NORMS, OUT],  # experts are no linear layers
}


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(ids).logits


def kl(model: PreTrainedModel, right: torch.Tensor) -> float:
    p, q = right.double().log_softmax(-1), logits(model).double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Gemma3", "Phi3", "GPTNeoX"])
def test_every_linear_layer_of_the_decoder(kind: str, method: str):
    model, seen = tiny_models.make(kind), []
    before, right = state(model), logits(model)
    found = quantize(
        model,
        method=method,
        group_size=32,
        symmetric=False,
        calibration=IDS,
        on_progress=lambda *args: seen.append(args),
    )
    assert_unchanged(model, before)
    assert seen == [("quantizing layers", done, 2) for done in range(3)]
    prefix, layers = decoder_layers("quantize", model)
    wanted = {
        name: tuple(part.weight.shape)
        for name, part in model.named_modules()
        if type(part) is nn.Linear and name.startswith(f"{prefix}.")
    }
    assert {name: w.shape for name, w in found.weights.items()} == wanted
    assert len(layers) == 2 and not any("lm_head" in name for name in wanted)
    with simulate(model, found):
        assert 0 < kl(model, right) < 0.1
        for name, w in found.weights.items():
            assert torch.equal(model.get_submodule(name).weight, w.dequantize())
    assert_unchanged(model, before)
    assert torch.equal(logits(model), right)


def test_nearest_is_nearest_of_every_weight():
    model = tiny_models.make()
    found = quantize(model, weights="int8", group_size=None)
    for name, w in found.weights.items():
        plain = round_to_nearest(model.get_submodule(name).weight, Scheme(8, None))
        assert torch.equal(w.codes, plain.codes) and torch.equal(w.scales, plain.scales)
        assert w.bits == 8 and w.group_size == w.shape[1]
    assert not found.folded and not found.fallbacks


def test_gptq_is_better_than_nearest():
    model = tiny_models.make("Llama")
    right = logits(model)
    found = {}
    for method in ("nearest", "gptq"):
        with simulate(model, quantize(model, method=method, group_size=32, calibration=IDS)):
            found[method] = kl(model, right)
    assert found["gptq"] < 0.8 * found["nearest"]


def test_act_order_reaches_the_weights():
    settings = GptqSettings(act_order=True, static_groups=False)
    model = tiny_models.make()
    found = quantize(model, method="gptq", group_size=32, calibration=IDS, gptq_settings=settings)
    assert all(w.g_idx is not None for w in found.weights.values())
    with simulate(model, found):
        name, w = next(iter(found.weights.items()))
        assert torch.equal(model.get_submodule(name).weight, w.dequantize())


def test_layers_see_the_layers_before_quantized():
    model = tiny_models.make()
    found = quantize(model, method="gptq", group_size=32, calibration=IDS)
    first = type(found)({name: w for name, w in found.weights.items() if ".layers.0." in name})

    def codes_of_layer_1() -> dict[str, torch.Tensor]:
        with gather_statistics(model.model.layers[1]) as statistics:
            for row in IDS:
                logits(model, row[None])
        return {
            name: gptq(part.weight, statistics[name], Scheme(4, 32)).codes
            for name, part in linears(model.model.layers[1]).items()
        }

    with simulate(model, first):
        ours = codes_of_layer_1()
    dense = codes_of_layer_1()
    assert len(ours) == 7
    for name, codes in ours.items():
        assert torch.equal(codes, found.weights[f"model.layers.1.{name}"].codes), name
        assert not torch.equal(codes, dense[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FOLDS)
def test_the_scale_folds_of_a_layer(kind: str, dtype: torch.dtype):
    model = tiny_models.make(kind).to(dtype)
    before = state(model)
    _, layers = decoder_layers("quantize", model)
    captured = capture("quantize", model, layers, IDS[:1, :32])
    folds = find_scale_folds(layers[0], captured.hidden, captured.calls[0])
    short = [
        (tuple(name.split(".")[-1] for name in fold.consumers), fold.producer.split(".")[-1])
        for fold in folds
    ]
    if kind == "Cohere":
        assert short[-1] == DOWN and short[-2] == OUT
    else:
        assert short == FOLDS[kind]
    assert_unchanged(model, before)


@pytest.mark.parametrize("kind", ["Llama", "Gemma3", "GPTNeoX"])
def test_awq_without_rounding_is_the_same_model(kind: str):
    """With 8 bits and small groups only rounding errors remain, far below those of a wrong fold."""
    model = tiny_models.make(kind)
    right = logits(model)
    found = quantize(model, weights="int8", method="awq", group_size=32, calibration=IDS)
    plain = quantize(model, weights="int8", group_size=32)
    assert found.folded
    moved = [
        name
        for name, w in found.weights.items()
        if not torch.equal(w.scales, plain.weights[name].scales)
    ]
    assert moved  # else nothing was scaled and the test would hold for any fold
    with simulate(model, found):
        assert kl(model, right) < 1e-3
    with simulate(model, type(found)(weights=found.weights)):  # without the folded parameters
        assert kl(model, right) > 1e-3


def test_awq_lists_layers_that_it_could_only_clip():
    found = quantize(tiny_models.make("Phi3"), method="awq", group_size=32, calibration=IDS)
    assert {name.split(".")[-1] for name in found.fallbacks} == {"o_proj", "down_proj"}
    assert all("inverse of the scales" in why for why in found.fallbacks.values())


def test_a_text_is_cut_into_sequences():
    model = tiny_models.make()
    text = torch.cat((IDS.flatten(), torch.tensor([5, 6])))
    rows = quantize(model, method="gptq", group_size=32, calibration=IDS)
    cut = quantize(model, method="gptq", group_size=32, calibration=text, window=64)
    for name, w in rows.weights.items():
        assert torch.equal(w.codes, cut.weights[name].codes)


def test_one_layer_at_a_time_is_the_model():
    model = tiny_models.make("Gemma2")  # whose layers are called with different masks
    _, layers = decoder_layers("quantize", model)
    captured = capture("quantize", model, layers, IDS)
    hidden = captured.hidden
    for layer, call in zip(layers, captured.calls, strict=True):
        hidden = run_layer(layer, hidden, call)
    with torch.no_grad():
        assert torch.equal(model.model.norm(hidden), model.model(IDS).last_hidden_state)


def test_simulate_gives_the_weights_back_after_an_error():
    model = tiny_models.make()
    before, found = state(model), quantize(model, group_size=32)
    parameter = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(RuntimeError, match="inside"), simulate(model, found):
        assert model.model.layers[0].mlp.up_proj.weight is parameter
        raise RuntimeError("inside")
    assert_unchanged(model, before)


def test_an_error_half_way_leaves_the_model_as_it_was():
    model = tiny_models.make()
    before = state(model)

    def stop(what: str, done: int, total: int) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        quantize(model, method="gptq", group_size=32, calibration=IDS, on_progress=stop)
    assert_unchanged(model, before)


def nan(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan


REFUSED = {
    "weights": ({"weights": "int3"}, ["int4 or int8", "'int3'"]),
    "method": ({"method": "magic"}, ["nearest, gptq or awq", "'magic'"]),
    "group": ({"group_size": 64}, ["layers.0.mlp.down_proj", "64 does not divide the 96"]),
    "unknown group": ({"group_size": 7}, ["layers.0.self_attn.q_proj", "32, 64, 128", "7"]),
    "no calibration": ({"method": "awq"}, ["awq needs a calibration text"]),
    "too short": (
        {"method": "gptq", "calibration": IDS[:1]},
        ["too short", "96 tokens", "got 64"],
    ),
    "less than a window": (
        {"method": "gptq", "calibration": IDS.flatten()[:200], "window": 256},
        ["too short", "got 0 in sequences of 256"],
    ),
    "too long sequences": (
        {"method": "gptq", "calibration": IDS.view(1, -1)},
        ["context of 256 tokens", "512"],
    ),
    "ids": ({"method": "gptq", "calibration": IDS + 90}, ["from 0 to 100", "to 190"]),
    "no integers": ({"method": "gptq", "calibration": IDS.float()}, ["integers", "float32"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_refused(name: str):
    model, seen = tiny_models.make(), []
    before = state(model)
    changes, words = REFUSED[name]
    with pytest.raises(UserError) as caught:
        quantize(
            model, **({"group_size": 32} | changes), on_progress=lambda *args: seen.append(args)
        )
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message
    assert "\n" not in message and not seen
    assert_unchanged(model, before)


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_are_not_finite_are_refused_by_name(method: str):
    model = tiny_models.make()
    nan(model)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj: .* infinity or NaN"):
        quantize(model, method=method, group_size=32, calibration=IDS)


def test_a_patched_model_is_refused():
    model = tiny_models.make()
    found = quantize(model, group_size=32)
    with llmfast.patched(model, ops=["norm"]):
        with pytest.raises(UserError, match=r"quantize: .* llmfast\.unpatch"):
            quantize(model, group_size=32)
        with pytest.raises(UserError, match=r"simulate: .*"), simulate(model, found):
            pass
    with simulate(model, found):
        pass


def test_training_mode_is_refused():
    with pytest.raises(UserError, match=r"model\.eval"):
        quantize(tiny_models.make().train(), group_size=32)


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(UserError, match="FalconForCausalLM has no list of layers"):
        quantize(tiny_models.make("Falcon"), group_size=32)


def test_simulate_refuses_weights_of_another_model():
    model = tiny_models.make()
    found = quantize(model, group_size=32)
    name, w = next(iter(found.weights.items()))
    before = state(model)
    other = type(found)(weights=found.weights | {"nowhere": w})
    wrong = type(found)(weights=found.weights | {"model.layers.1.mlp.down_proj": w})
    for bad, words in ((other, "no parameter 'nowhere.weight'"), (wrong, r"\(64, 96\)")):
        with pytest.raises(UserError, match=words), simulate(model, bad):
            pass
    assert_unchanged(model, before)
    assert name


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_hidden_states_and_masks_are_held_once(method: str, monkeypatch):
    """Hidden states once and not as inputs and outputs; masks and tables once for all sequences."""
    model, calls, held = tiny_models.make("Llama"), [], []
    own = driver.run_layer

    def run(layer, hidden, call):
        calls.append(call)
        matrices = {
            each.untyped_storage().data_ptr()
            for each in gc.get_objects()
            if type(each) is torch.Tensor and each.shape == (1, 64, 64)
        }
        held.append(len(matrices))
        return own(layer, hidden, call)

    ids = tiny_models.tokens(12, 64)
    monkeypatch.setattr(driver, "run_layer", run)
    quantize(model, method=method, group_size=32, calibration=ids)
    assert max(held) <= 12 + 2
    tables = {id(table) for call in calls for table in call.kwargs["position_embeddings"]}
    assert len(tables) <= 4


def test_layers_of_one_input_are_one_matrix_to_gptq(monkeypatch):
    model, seen = tiny_models.make("Llama"), []
    own = driver.gptq
    monkeypatch.setattr(
        driver, "gptq", lambda w, *rest: seen.append(tuple(w.shape)) or own(w, *rest)
    )
    found = quantize(model, method="gptq", group_size=32, calibration=IDS)
    assert seen == [(128, 64), (64, 64), (192, 64), (64, 96)] * 2
    first = model.model.layers[0]
    with gather_statistics(first) as statistics:
        captured = [capture("quantize", model, model.model.layers, row[None]) for row in IDS]
        for one in captured:
            run_layer(first, one.hidden, one.calls[0])
    for name, part in linears(first).items():
        alone = own(part.weight, statistics[name], Scheme(4, 32))
        got = found.weights[f"model.layers.0.{name}"]
        assert torch.equal(got.scales, alone.scales)
        assert (got.codes != alone.codes).sum() <= 0.002 * alone.codes.numel()
