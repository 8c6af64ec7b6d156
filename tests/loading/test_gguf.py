"""GGUF files: the logits of the model they were made from, or an error of one line."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import llmfast
from llmfast.errors import UserError
from llmfast.loading.embedded import embedded_model_path
from llmfast.loading.gguf import READABLE
from llmfast.loading.gguf_file import GgufFile

IDS = torch.arange(3, 35).reshape(2, 16)
Write = Callable[..., Path]
Make = Callable[..., LlamaForCausalLM]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@torch.no_grad()
def logits(model: LlamaForCausalLM) -> torch.Tensor:
    return model(IDS.to(model.device)).logits


def load(path: Path, **options: Any) -> llmfast.Loaded:
    return llmfast.load(path, device="cpu", **options)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"tie_word_embeddings": True},
        {"head_dim": 32},
        {"num_key_value_heads": 4, "rms_norm_eps": 1e-6},
        {"attention_bias": True, "mlp_bias": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ],
    ids=["plain", "tied", "head_dim", "mha", "bias", "theta"],
)
def test_float32_gives_the_very_logits_of_the_source(
    config: dict[str, Any], tmp_path: Path, tiny_llama: Make, write_gguf: Write
):
    source = tiny_llama(**config)
    model = load(write_gguf(tmp_path / "m.gguf", source)).model
    assert not model.training
    assert torch.equal(logits(model), logits(source))
    assert model.state_dict().keys() == source.state_dict().keys()
    assert model.config.tie_word_embeddings == source.config.tie_word_embeddings
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == source.config.tie_word_embeddings


def test_the_order_of_a_heads_rows_shows_in_the_logits(
    tmp_path: Path, tiny_llama: Make, write_gguf: Write
):
    """Guards the test above: with q in the file's order, the logits would differ."""
    source = tiny_llama()
    path = write_gguf(tmp_path / "m.gguf", source)
    raw = torch.from_numpy(GgufFile(path).raw("blk.0.attn_q.weight").copy()).view(torch.float32)
    right = logits(source)
    source.model.layers[0].self_attn.q_proj.weight.data = raw.view(64, 64)
    assert (logits(source) - right).abs().max() > 0.1


@pytest.mark.parametrize("kind", READABLE)
def test_every_type_gives_the_logits_of_its_dequantised_weights(
    kind: str, tmp_path: Path, tiny_llama: Make, write_gguf: Write
):
    source = tiny_llama()
    model = load(write_gguf(tmp_path / "m.gguf", source, kind)).model
    qtype = gguf.GGMLQuantizationType[kind]
    # half a step of the coarsest: 4 bits over a block's range, of at most 2.4 here
    bound = {"Q4_0": 0.16, "Q4_1": 0.1, "Q8_0": 0.01, "F16": 1e-3, "BF16": 8e-3, "F32": 0}[kind]
    ours = dict(model.named_parameters())
    for name, parameter in source.named_parameters():
        if parameter.dim() == 2:
            assert (ours[name] - parameter).abs().max() <= bound, name
            packed = gguf.quants.quantize(parameter.detach().numpy(), qtype)
            parameter.data = torch.tensor(gguf.quants.dequantize(packed, qtype))
    assert torch.equal(logits(model), logits(source))


def scaled(**rope: Any) -> dict[str, Any]:
    return {"rope_theta": 10000.0, **rope}


@pytest.mark.parametrize(
    ("rope", "metadata"),
    [
        (
            scaled(rope_type="linear", factor=4.0),
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        ),
        (
            scaled(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 32,
                "llama.rope.scaling.finetuned": True,
                "llama.rope.scaling.attn_factor": 1.0,
            },
        ),
        (scaled(**LLAMA3), {}),
    ],
    ids=["linear", "yarn", "llama3"],
)
def test_scaled_rotation(
    rope: dict[str, Any],
    metadata: dict[str, Any],
    tmp_path: Path,
    tiny_llama: Make,
    write_gguf: Write,
):
    source = tiny_llama(rope_parameters=rope, head_dim=64)
    extra = {}
    if rope["rope_type"] == "llama3":  # the file holds what each frequency is divided by
        plain = tiny_llama(head_dim=64).model.rotary_emb.inv_freq
        extra["rope_freqs.weight"] = (plain / source.model.rotary_emb.inv_freq).numpy()
        assert 1 < np.unique(extra["rope_freqs.weight"]).size
    path = write_gguf(tmp_path / "m.gguf", source, metadata=metadata, extra=extra)
    model = load(path).model
    torch.testing.assert_close(  # the constants pass through float32
        model.model.rotary_emb.inv_freq, source.model.rotary_emb.inv_freq, rtol=1e-6, atol=0
    )
    assert model.model.rotary_emb.attention_scaling == source.model.rotary_emb.attention_scaling
    torch.testing.assert_close(logits(model), logits(source), rtol=1e-4, atol=1e-4)


def test_a_dtype_is_that_of_the_weights_and_never_of_the_frequencies(
    tmp_path: Path, tiny_llama: Make, write_gguf: Write
):
    source = tiny_llama()
    path = write_gguf(tmp_path / "m.gguf", source)
    model = load(path, dtype="bf16").model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == model.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, source.model.rotary_emb.inv_freq)
    source.to(torch.bfloat16)  # rounds the frequencies too, so they are put back
    source.model.rotary_emb = model.model.rotary_emb
    assert torch.equal(logits(model), logits(source))


def test_loading_draws_no_random_number_and_tells_its_progress(
    tmp_path: Path, tiny_llama: Make, write_gguf: Write
):
    source = tiny_llama()
    path = write_gguf(tmp_path / "m.gguf", source)
    state, seen = torch.get_rng_state(), []
    load(path, on_progress=lambda *args: seen.append(args))
    assert torch.equal(torch.get_rng_state(), state)
    count = len(list(source.parameters()))
    assert seen == [("loading weights", i + 1, count) for i in range(count)]


def test_a_loaded_model_is_saved_and_read_again(
    tmp_path: Path, tiny_llama: Make, write_gguf: Write
):
    first = load(write_gguf(tmp_path / "m.gguf", tiny_llama(tie_word_embeddings=True)))
    for part in first:
        part.save_pretrained(tmp_path / "saved")
    second = load(tmp_path / "saved")
    assert torch.equal(logits(second.model), logits(first.model))
    text = "hello world 12 héllo\n"
    assert second.tokenizer(text).input_ids == first.tokenizer(text).input_ids
    assert second.tokenizer.chat_template == first.tokenizer.chat_template


# faults of files: (arguments of write_gguf, words of the error)
BAD_FILES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "architecture": (
        {"metadata": {"general.architecture": "gptneox"}},
        ["architecture 'gptneox'", "'llama' can"],
    ),
    "type": (
        {"kind_of": {"blk.1.ffn_up.weight": "Q5_1"}},
        ["'blk.1.ffn_up.weight'", "Q5_1", "Q4_0, Q4_1, Q8_0, F16, BF16, F32"],
    ),
    "missing tensor": ({"drop": ("blk.1.attn_k.weight",)}, ["'blk.1.attn_k.weight' is missing"]),
    "unknown tensor": (
        {"extra": {"blk.0.ffn_gate_inp.weight": np.ones((2, 64), np.float32)}},
        ["'blk.0.ffn_gate_inp.weight' is not part of a Llama model"],
    ),
    "more blocks than said": (
        {"metadata": {"llama.block_count": 1}},
        ["'blk.1.", "is not part of a Llama model"],
    ),
    "fewer blocks than said": (
        {"metadata": {"llama.block_count": 3}},
        ["'blk.2.", "is missing"],
    ),
    "far fewer blocks than said": (
        {"metadata": {"llama.block_count": 4_000_000_000}},
        ["4000000000 blocks"],
    ),
    "shape": (
        {"metadata": {"llama.feed_forward_length": 95}},
        ["'blk.0.ffn_gate.weight'", "(95, 64)", "(96, 64)"],
    ),
    "vocabulary": (
        {"metadata": {"llama.vocab_size": 260}},
        ["265 tokens do not fit a vocabulary of 260"],
    ),
    "no context length": (
        {"metadata": {"llama.context_length": None}},
        ["'llama.context_length' is missing"],
    ),
    "a list of head counts": (
        {"metadata": {"llama.attention.head_count_kv": [2, 1]}},
        ["llama.attention.head_count_kv", "[2, 1]"],
    ),
    "heads that share nothing": (
        {"metadata": {"llama.attention.head_count_kv": 3}},
        ["4 heads cannot share 3"],
    ),
    "heads that do not fit": (
        {"metadata": {"llama.attention.head_count": 5}},
        ["64 is no multiple of 5 heads"],
    ),
    "epsilon": (
        {"metadata": {"llama.attention.layer_norm_rms_epsilon": 0.0}},
        ["llama.attention.layer_norm_rms_epsilon", "above 0", "0.0"],
    ),
    "part of a head rotated": (
        {"metadata": {"llama.rope.dimension_count": 8}},
        ["llama.rope.dimension_count is 8", "16"],
    ),
    "another scaling": (
        {"metadata": {"llama.rope.scaling.type": "longrope"}},
        ["llama.rope.scaling.type = 'longrope'", "none, linear and yarn"],
    ),
    "scaling without factor": (
        {"metadata": {"llama.rope.scaling.type": "linear"}},
        ["'llama.rope.scaling.factor' is missing"],
    ),
    "frequencies of another kind": (
        {"extra": {"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)}},
        ["'rope_freqs.weight'", "Llama 3"],
    ),
    "experts": ({"metadata": {"llama.expert_count": 8}}, ["llama.expert_count = 8"]),
    "an unknown key": ({"metadata": {"llama.logit_scale": 0.5}}, ["llama.logit_scale = 0.5"]),
    "split": ({"metadata": {"split.count": 3}}, ["split", "gguf-split --merge"]),
    "tokenizer kind": (
        {"metadata": {"tokenizer.ggml.model": "bert"}},
        ["'bert'", "gpt2 and llama"],
    ),
    "pre-tokenizer": (
        {"metadata": {"tokenizer.ggml.pre": "tekken"}},
        ["'tekken'", "tokenizer.ggml.pre", "smollm"],
    ),
    "no merges": (
        {"metadata": {"tokenizer.ggml.merges": None}},
        ["'tokenizer.ggml.merges' is missing"],
    ),
    "a merge of no tokens": (
        {"metadata": {"tokenizer.ggml.merges": ["xx yy"]}},
        ["damaged vocabulary", "xx"],
    ),
    "a merge of one token": (
        {"metadata": {"tokenizer.ggml.merges": ["he"]}},
        ["damaged vocabulary", "does not name two"],
    ),
    "token id": (
        {"metadata": {"tokenizer.ggml.eos_token_id": 9999}},
        ["tokenizer.ggml.eos_token_id is 9999", "265"],
    ),
    "token types": (
        {"metadata": {"tokenizer.ggml.token_type": [1, 3]}},
        ["265 tokens but 2 token types"],
    ),
    "no scores": (
        {"metadata": {"tokenizer.ggml.model": "llama"}},
        ["'tokenizer.ggml.scores' is missing"],
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_read_is_refused_by_name(
    name: str, tmp_path: Path, tiny_llama: Make, write_gguf: Write
):
    arguments, words = BAD_FILES[name]
    if "general.architecture" in arguments.get("metadata", {}):
        path = write_gguf(tmp_path / "m.gguf", tiny_llama())
        path.write_bytes(
            path.read_bytes().replace(b"\5\0\0\0\0\0\0\0llama", b"\7\0\0\0\0\0\0\0gptneox")
        )
    else:
        path = write_gguf(tmp_path / "m.gguf", tiny_llama(), **arguments)
    assert_refused(path, *words)


def assert_refused(path: Path, *words: str) -> None:
    seen: list[object] = []
    with pytest.raises(UserError) as caught:
        load(path, on_progress=lambda *args: seen.append(args))
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    assert [word for word in words if word not in message] == [], message
    assert seen == []  # nothing was read


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (b"", ["not a GGUF file"]),
        (b"GGML" + bytes(100), ["not a GGUF file"]),
        (b"GGUF\1\0\0\0" + bytes(100), ["version 1"]),
        (b"GGUF\0\0\0\3" + bytes(100), ["big-endian"]),
        (b"GGUF\3\0\0\0" + b"\xff" * 16, ["cut short or damaged"]),
    ],
    ids=["empty", "magic", "version", "big-endian", "counts"],
)
def test_a_file_that_is_no_gguf_is_refused(start: bytes, words: list[str], tmp_path: Path):
    path = tmp_path / "m.gguf"
    path.write_bytes(start)
    assert_refused(path, *words)


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path, tiny_llama: Make, write_gguf: Write):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(), "Q4_0")
    whole, file = path.read_bytes(), GgufFile(path)
    end = max(info.start + info.nbytes for info in file.tensors.values())
    header = min(info.start for info in file.tensors.values())
    draw = random.Random(0)
    cuts = {0, 1, 3, 4, 8, 23, 24, header - 1, header, end - 1}
    cuts |= set(draw.sample(range(header), 150)) | set(draw.sample(range(header, end), 50))
    for cut in sorted(cuts):
        path.write_bytes(whole[:cut])
        assert_refused(path, "cut short" if cut >= 4 else "not a GGUF file")
    path.write_bytes(whole[:end])  # what follows is padding
    load(path)


def test_no_damaged_byte_of_the_header_is_more_than_a_user_error(
    tmp_path: Path, tiny_llama: Make, write_gguf: Write
):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(num_hidden_layers=1))
    whole = bytearray(path.read_bytes())
    header = min(info.start for info in GgufFile(path).tensors.values())
    draw = random.Random(0)
    for _ in range(150):
        damaged = whole.copy()
        damaged[draw.randrange(header)] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            load(path)  # a changed letter of a token is no fault
        except UserError as error:
            assert "\n" not in str(error)


# --- tokenizers ---


TEXTS = [
    "hello world 12345",
    "  two  spaces\n\n\nnew lines\r\n\tand tabs \u00a0 ",
    "naïve café — 日本語 🙂 ½ ² ٣٤",
    "def f(x):\n    return x**2 + 1234567  # it's, IT'S",
    "<|im_start|>user\nhi<|im_end|>\n",
    "",
    " ",
]


def pieces(path: Path, text: str) -> list[str]:
    """Return the pieces of the text before any merge."""
    backend = load(path).tokenizer.backend_tokenizer
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    return [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


def test_byte_level_tokens_and_their_roles(tmp_path: Path, tiny_llama: Make, write_gguf: Write):
    metadata = {"tokenizer.ggml.eot_token_id": 0, "tokenizer.ggml.padding_token_id": None}
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(), metadata=metadata)
    model, tokenizer = load(path)
    ids = tokenizer("<|im_start|>hello world 12<|im_end|>").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *("<|im_start|>", "hello", "Ġw", "o", "r", "l", "d", "Ġ", "1", "2", "<|im_end|>")
    ]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello world 12"
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert named == (1, 2, 0)
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id == 2  # the end's
    assert model.generation_config.eos_token_id == [2, 0]
    assert tokenizer.padding_side == "left"
    assert tokenizer.model_max_length == 128
    assert set(tokenizer.all_special_ids) == {0, 1, 2}
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert chat == "<|im_start|>hello<|im_end|>"


def test_the_first_token_is_added_where_the_file_says_so(
    tmp_path: Path, tiny_llama: Make, write_gguf: Write
):
    def first(**metadata: Any) -> int:
        keys = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
        path = write_gguf(tmp_path / "m.gguf", tiny_llama(), metadata=keys)
        return load(path).tokenizer("hello").input_ids[0]

    hello = 3 + 256 + 3
    assert first() == hello
    assert first(add_bos_token=True) == 1
    assert first(pre="llama-bpe") == 1
    assert first(pre="llama-bpe", add_bos_token=False) == hello


def test_llama3_takes_a_word_that_is_a_token_whole(
    tmp_path: Path, tiny_llama: Make, write_gguf: Write
):
    for pre, expected in (("llama-bpe", ["hello"]), ("smollm", ["he", "ll", "o"])):
        keys = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": ["h e", "l l"]}
        path = write_gguf(tmp_path / "m.gguf", tiny_llama(), metadata=keys)
        assert load(path).tokenizer.tokenize("hello") == expected


def test_smollm_splits_as_its_own_tokenizer_does(
    tmp_path: Path, tiny_llama: Make, write_gguf: Write
):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama())
    original = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    for text in TEXTS:
        assert pieces(path, text) == [piece for piece, _ in original.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("gpt-2", "it's 12345 x_1\n\n y", ["it", "'s", "Ġ12345", "Ġx", "_", "1", "ĊĊ", "Ġy"]),
        ("gpt-2", "IT'S", ["IT", "'", "S"]),
        (
            "llama-bpe",
            "IT'S 12345 (x)\n\n y",
            ["IT", "'S", "Ġ", "123", "45", "Ġ(", "x", ")ĊĊ", "Ġy"],
        ),
        ("qwen2", "IT'S 12 (x)\n\n y", ["IT", "'S", "Ġ", "1", "2", "Ġ(", "x", ")ĊĊ", "Ġy"]),
        ("qwen2", "e\u0301", ["Ã©"]),  # composed first
        ("default", "a+b 12345.", ["a", "+", "b", "Ġ", "123", "45", "."]),
        (None, "a+b 12345.", ["a", "+", "b", "Ġ", "123", "45", "."]),
    ],
)
def test_text_is_split_as_the_pre_tokenizer_says(
    pre: str | None,
    text: str,
    expected: list[str],
    tmp_path: Path,
    tiny_llama: Make,
    write_gguf: Write,
):
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(), metadata={"tokenizer.ggml.pre": pre})
    assert pieces(path, text) == expected


def sentencepiece_metadata(**keys: Any) -> dict[str, Any]:
    words = {"▁": -3.0, "a": -9.0, "b": -9.0, "ab": -1.0, "▁a": -0.5, "ba": -2.0}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + list(words.values()),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
        "tokenizer.ggml.merges": None,
        **keys,
    }


def test_sentencepiece_joins_the_best_score_first(
    tmp_path: Path, tiny_llama: Make, write_gguf: Write
):
    model = tiny_llama(vocab_size=265)
    tokenizer = load(
        write_gguf(tmp_path / "m.gguf", model, metadata=sentencepiece_metadata())
    ).tokenizer
    # ▁abab: ▁a (-0.5) first, then of b, a, b the pair ab (-1), which leaves b alone
    cases = {
        "abab": ["<s>", "▁a", "b", "ab"],
        "bab": ["<s>", "▁", "b", "ab"],
        "b": ["<s>", "▁", "b"],
        "é": ["<s>", "▁", "<0xC3>", "<0xA9>"],
        "a  a": ["<s>", "▁a", "▁", "▁a"],
        "": ["<s>"],
    }
    for text, expected in cases.items():
        ids = tokenizer(text).input_ids
        assert tokenizer.convert_ids_to_tokens(ids) == expected
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.all_special_tokens == ["<s>", "</s>", "<unk>"]


def test_sentencepiece_without_a_leading_space(tmp_path: Path, tiny_llama: Make, write_gguf: Write):
    keys = {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    path = write_gguf(
        tmp_path / "m.gguf",
        tiny_llama(vocab_size=265),
        metadata=sentencepiece_metadata(**keys),
    )
    tokenizer = load(path).tokenizer
    assert tokenizer.tokenize("ab a") == ["ab", "▁a"]
    assert tokenizer.decode(tokenizer("ab a").input_ids) == "ab a"


# --- the embedded model ---


def ask(loaded: llmfast.Loaded, question: str) -> str:
    model, tokenizer = loaded
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=20)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_embedded_model_knows_the_capital_of_france(embedded: llmfast.Loaded):
    assert ask(embedded, "What is the capital of France?") == "The capital of France is Paris."


def test_the_embedded_model_follows_its_file(embedded: llmfast.Loaded):
    model, tokenizer = embedded
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (576, 30, 49152)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (9, 3, 64)
    assert config.rms_norm_eps == 1e-5 and config.max_position_embeddings == 8192
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1e5}
    assert config.tie_word_embeddings and config._attn_implementation == "sdpa"
    assert model.num_parameters() == 134_515_008
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == 2
    assert len(tokenizer.all_special_ids) == 3  # the named ones; every control token stays whole
    assert tokenizer("<jupyter_code>").input_ids == [13]


def test_the_embedded_model_loads_in_ten_seconds_of_one_core(embedded: llmfast.Loaded):
    """Processor time, since others may run on this machine; imports are done by the fixture."""
    start = time.process_time()
    llmfast.load(device="cpu")
    assert time.process_time() - start < 10


def test_the_embedded_tokenizer_equals_that_of_transformers(embedded: llmfast.Loaded):
    """Except beside numerals other than 0 to 9, which only we split as the model's own does."""
    path = embedded_model_path()
    oracle = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        text = text.translate({ord(c): None for c in "½²٣٤"})
        assert embedded.tokenizer(text).input_ids == oracle(text).input_ids
    assert embedded.tokenizer.chat_template == oracle.chat_template


@torch.no_grad()
def test_the_embedded_weights_equal_those_of_transformers(embedded: llmfast.Loaded):
    pytest.importorskip("accelerate", reason="transformers reads GGUF only with accelerate")
    path = embedded_model_path()
    oracle = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    ours, theirs = embedded.model.state_dict(), oracle.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert torch.equal(embedded.model(IDS).logits, oracle(IDS).logits)
