"""Choose how a model runs: as blocks, or its own layers over the paged cache."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..model.trace import NotTraced
from ..weights.model_weights import weights_to_pack
from ..weights.packed_linear import restore_dense
from .block_model import BlockModel
from .forward_model import ForwardModel
from .step_model import StepModel

# devices on which packed weights replace the dense ones; on the CPU the references are slow
OFFLOADED = ("cuda",)


def make_step_model(model: PreTrainedModel) -> StepModel:
    """Build blocks if every layer has a recipe, else run the model's own layers.

    Blocks multiply with the model's quantized weights in their own bits, on the CPU only if that
    was requested. On a GPU the dense weights that they replace are offloaded.

    Raises:
        NotTraced: neither computes what the model does.
    """
    restore_dense(model)
    try:
        blocks = BlockModel(model, weights=weights_to_pack(model, model.device))
        if model.device.type in OFFLOADED:
            blocks.offload_dense()
        return blocks
    except NotTraced as error:
        reason = str(error)
    try:
        return ForwardModel(model, reason)
    except NotTraced as error:
        other = str(error)
    raise NotTraced(reason if other == reason else f"{reason}; and {other}")
