"""Whole models as users take them from libraries, by name: MODELS. Importing this imports none of the libraries."""

from libraries import hugging_face, peft_lora, plain, timm_models

MODELS = {**hugging_face.MODELS, **peft_lora.MODELS, **timm_models.MODELS, **plain.MODELS}
# of the others, which are near relatives of these or take long, one test runs unless all are asked for
CORE = frozenset(
    """
    gpt2 llama_padded bert_padded vit clip_vision whisper_encoder lora_llama timm_vit timm_convnext
    """.split()
)
LIMIT = 1e-5  # of the relative error of a gradient in float32

__all__ = ["CORE", "LIMIT", "MODELS"]
