"""Load a GGUF file of the Llama architecture as a transformers model and tokenizer.

The model is built on PyTorch's meta device. Then each tensor is read, dequantised and put in place,
so nothing is initialised only to be overwritten. Quantized layers are read again, in their own
bits, when the runner packs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import torch
from gguf.quants import dequantize

from ..errors import UserError
from .gguf_config import llama_config
from .gguf_file import GgufFile
from .gguf_tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from ..weights.quantized import QuantizedWeight

QUANTIZED = ("Q4_0", "Q4_1", "Q8_0")
READABLE = (*QUANTIZED, "F16", "BF16", "F32")


def load_gguf(
    path: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load the model, on ``device`` in ``dtype`` and in eval mode, and its tokenizer.

    ``on_progress("loading weights", done, total)`` is called after each tensor.

    Raises:
        UserError: what is wrong with the file, found before any tensor is read.
    """
    file = GgufFile(path)
    architecture = file.metadata.get("general.architecture")
    if architecture != "llama":
        raise UserError(f"{path}: architecture {architecture!r} cannot be read; 'llama' can")
    if file.metadata.get("split.count", 0) not in (0, 1):
        raise UserError(f"{path}: one part of a split GGUF; join the parts with gguf-split --merge")
    _check_types(file)
    config = llama_config(file, dtype)
    tokenizer = load_tokenizer(file, config.max_position_embeddings)
    model = _empty_model(config)
    names = _match(file, model)

    def read(name: str) -> torch.Tensor:
        return _read(file, name, config).to(dtype).to(device)

    weights = {}
    # in threads: numpy releases the interpreter's lock while it works on a tensor
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for done, (name, weight) in enumerate(zip(names, pool.map(read, names), strict=True), 1):
            weights[names[name]] = weight
            if on_progress is not None:
                on_progress("loading weights", done, len(names))
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    # the only buffers are computed, not stored: compute them again, off the meta device
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config).to(device)
    weights_in_file = GgufWeights(file, names, config)
    if len(weights_in_file):
        from ..weights.model_weights import set_quantized

        set_quantized(model, weights_in_file, requantizable=True)
    return model.eval(), tokenizer


class GgufWeights(Mapping[str, "QuantizedWeight"]):
    """The quantized linear layers of the decoder by name, read from the file on access."""

    def __init__(self, file: GgufFile, names: Mapping[str, str], config: LlamaConfig) -> None:
        """Map the layers to tensors. ``names`` has the parameter of each of the file's tensors."""
        self._file: GgufFile | None = file
        self._path = file.path
        self._config = config
        self._tensors = {
            parameter.removesuffix(".weight"): name
            for name, parameter in names.items()
            if parameter.startswith("model.layers.") and file.tensors[name].type_name in QUANTIZED
        }

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_file": None}  # an open file cannot be pickled

    def __getitem__(self, layer: str) -> QuantizedWeight:
        from ..weights.checkpoint_formats import from_gguf

        name = self._tensors[layer]
        if self._file is None:
            self._file = GgufFile(self._path)
        rows = torch.from_numpy(self._file.raw(name).copy())
        weight = from_gguf(rows, self._file.tensors[name].type_name)
        heads = _rotated_heads(name, self._config)
        if heads is None:
            return weight
        return weight.rows(_half_split(torch.arange(len(rows)), heads))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _check_types(file: GgufFile) -> None:
    for info in file.tensors.values():
        if info.type_name not in READABLE:
            raise UserError(
                f"{file.path}: tensor {info.name!r} has type {info.type_name}, which cannot be"
                f" read; {', '.join(READABLE)} can"
            )


def _empty_model(config: LlamaConfig) -> LlamaForCausalLM:
    from transformers import GenerationConfig
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    end, pad = config.eos_token_id, config.pad_token_id
    if pad is None:  # any id can pad a batch: it is masked
        pad = end[0] if isinstance(end, list) else end
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=end, pad_token_id=pad
    )
    return model


def _match(file: GgufFile, model: LlamaForCausalLM) -> dict[str, str]:
    """Return the parameter of each of the file's tensors; both sides must be complete."""
    blocks = model.config.num_hidden_layers
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, blocks)
    names = {}
    for (
        parameter,
        value,
    ) in model.named_parameters():  # a tied head is the embedding
        name = known.get_name(parameter, try_suffixes=(".weight", ".bias"))
        info = file.tensors.get(name)
        if info is None:
            raise UserError(f"{file.path}: tensor {name!r} is missing")
        if info.shape != tuple(value.shape):
            raise UserError(
                f"{file.path}: tensor {name!r} must have shape {tuple(value.shape)} by the"
                f" metadata; got {info.shape}"
            )
        names[name] = parameter
    # in the configuration: see gguf_config
    unknown = file.tensors.keys() - names.keys() - {"rope_freqs.weight"}
    if unknown:
        raise UserError(f"{file.path}: tensor {min(unknown)!r} is not part of a Llama model")
    return names


def _read(file: GgufFile, name: str, config: LlamaConfig) -> torch.Tensor:
    values = dequantize(file.raw(name), file.tensors[name].type)
    if not values.flags.writeable:  # float32 is a view of the file
        values = values.copy()
    tensor = torch.from_numpy(values)
    heads = _rotated_heads(name, config)
    return tensor if heads is None else _half_split(tensor, heads)


def _rotated_heads(name: str, config: LlamaConfig) -> int | None:
    """Return the number of heads of a tensor whose rows are in GGUF's order; else None."""
    if ".attn_q." in name:
        return int(config.num_attention_heads)
    if ".attn_k." in name:
        return int(config.num_key_value_heads or config.num_attention_heads)
    return None


def _half_split(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo GGUF's order of a head's rows.

    Rows that rotate together are neighbours in GGUF, and half a head apart in transformers.
    """
    rest: tuple[Any, ...] = tuple(tensor.shape[1:])
    return tensor.view(heads, -1, 2, *rest).transpose(1, 2).reshape(tensor.shape)
