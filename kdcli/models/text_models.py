"""The text tower of a transformers model that embeds images and texts alike (CLIP, SigLIP)."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float

from kdcli.errors import BadDataError
from kdcli.models.grammar import ModelSpec
from kdcli.models.transformers_models import LOCAL, checkpoint, library, reading

_FILES = ("*.json", "*.txt", "*.model", "model*.safetensors")


def embed_texts(spec: ModelSpec, texts: Sequence[str]) -> Float[torch.Tensor, "n d"]:
    """Embeddings of texts, float32, as the model gives them (not normalised).

    Args:
        spec: of kind transformers.
        texts: each is one row.

    Raises:
        MissingExtraError: transformers is not installed.
        NotFoundError: the model or its tokenizer is not there.
        BadDataError: it embeds no texts, or its weights do not fit.
    """
    package = library(spec)
    folder = checkpoint(spec, _FILES)
    with reading(spec, "model or tokenizer"):
        tokenizer = package.AutoTokenizer.from_pretrained(folder, **LOCAL)
        network, report = package.AutoModel.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **LOCAL
        )
    if missing := report["missing_keys"]:
        raise BadDataError(
            f"the weights of '{spec}' lack {len(missing)} tensors of a {type(network).__name__}",
            "Give a model that was saved whole.",
        )
    if not hasattr(network, "get_text_features"):
        raise BadDataError(
            f"'{spec}' is a {type(network).__name__}, which embeds no texts",
            "Give a CLIP or SigLIP with both towers.",
        )
    # SigLIP was trained on texts of one length, and reads its last place; CLIP finds the end of each text.
    padding = "max_length" if str(network.config.model_type).startswith("siglip") else True
    length = network.config.text_config.max_position_embeddings
    with reading(spec, "tokenizer"), torch.inference_mode():
        tokens = tokenizer(
            list(texts), padding=padding, truncation=True, max_length=length, return_tensors="pt"
        )
        accepted = {name: tokens[name] for name in ("input_ids", "attention_mask") if name in tokens}
        output: Any = network.eval().get_text_features(**accepted)
    found: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return found.float().clone()
