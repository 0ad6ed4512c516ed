"""Updates as servers of many adapters take them: LoRA of one rank, the scale in its factors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from superlora.errors import some
from superlora.torch.blocks import Blocks
from superlora.torch.interop import formats
from superlora.torch.layers import Weight
from superlora.torch.replaced import Replaced

# PEFT's name of a model's task, by how the names of transformers' classes end. Those with a head of
# classes are not among them: under their names PEFT wants the head in the file, and cannot open it.
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def task_of(model: nn.Module) -> str | None:
    """Return PEFT's name of what a model is for, None where it is not known."""
    names = [base.__name__ for base in type(model).__mro__]
    if "PreTrainedModel" not in names:
        return None
    for name in names[: names.index("PreTrainedModel")]:
        for end, task in _TASKS.items():
            if name.endswith(end):
                whole = getattr(model.config, "is_encoder_decoder", False)
                # Others than encoder-decoders are of images and text, and generate from a prefix.
                return "CAUSAL_LM" if task == "SEQ_2_SEQ_LM" and not whole else task
    return "FEATURE_EXTRACTION" if names[0].endswith("Model") else None


def check_served(weights: Mapping[str, Weight], replaced: Replaced | None) -> None:
    """Refuse what servers do not read beside the LoRA of linear layers and embeddings."""
    if replaced is not None:
        raise ValueError(
            "an adapter must have no parameters of the model with it to be served as a LoRA, since "
            f"servers load none: got {some(map(repr, replaced.names))}; merge the adapter and save "
            "the whole model, or write it with serve=False"
        )
    others = [name for name, weight in weights.items() if weight.kind == "convolution"]
    if others:
        raise ValueError(
            f"layers must be linear or embeddings to be served: got {some(map(repr, others))}, "
            "convolutions; merge the adapter and save the whole model"
        )


def served_layers(
    blocks: Blocks, rank: int | None, energy: float | None
) -> tuple[dict[str, formats.Layer], dict[str, float]]:
    """Return all updates as LoRA of one rank and of scale 1, and the errors that leaves."""
    layers: dict[str, formats.Layer] = {}
    errors: dict[str, float] = {}
    for name in blocks.plan.shapes:
        exact = formats.exact_layer(blocks, name)
        if exact is not None and exact.method == "lora" and rank is None and energy is None:
            layers[name], errors[name] = exact, 0.0
        else:
            layers[name], errors[name] = formats.low_rank_layer(blocks, name, rank, energy)
    return formats.of_one_rank(layers), errors
