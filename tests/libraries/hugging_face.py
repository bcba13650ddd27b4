"""Models of transformers as their config makes them: keyword inputs, a dataclass as output, no position ids.

`use_cache` and the attention are left as they are; where there is padding, it is given as a mask [B, T].
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from libraries.whole import Task, Whole, names_of
from zoo.problems import class_cross_entropy, mask_of_lengths, masked_cross_entropy, squared_error, token_cross_entropy

VOCAB, TIME, WIDTH, HIDDEN, CLASSES, SIDE, MELS = 97, 9, 32, 48, 7, 16, 6

LIBRARY = "transformers"
_named = names_of(LIBRARY)


def pretrained(model: str, config: str, **settings) -> Callable[..., nn.Module]:
    """The model of a config, with more settings."""
    return lambda **more: _named(model)(_named(config)(**settings, **more)).train()


def text(size: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, VOCAB, (size, TIME))}


def padded(size: int) -> dict[str, Tensor]:
    """Texts of different lengths, the padding at the end."""
    mask = mask_of_lengths(size, TIME).long()
    return {"input_ids": text(size)["input_ids"] * mask, "attention_mask": mask}


def padded_in_front(size: int) -> dict[str, Tensor]:
    return {name: tensor.flip(1) for name, tensor in padded(size).items()}


def two_sentences(size: int) -> dict[str, Tensor]:
    return {**padded(size), "token_type_ids": torch.randint(0, 2, (size, TIME))}


def two_texts(size: int) -> dict[str, Tensor]:
    return {**padded(size), "decoder_input_ids": text(size)["input_ids"]}


def pixels(size: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(size, 3, SIDE, SIDE)}


def sounds(size: int) -> dict[str, Tensor]:
    return {"input_features": torch.randn(size, MELS, 2 * TIME)}


def some_labels(size: int) -> Tensor:
    """Labels of some tokens, -100 for the others."""
    return torch.where(torch.rand(size, TIME) < 0.4, text(size)["input_ids"], -100)


TOKENS = Task(lambda size: text(size)["input_ids"], lambda output, targets: token_cross_entropy(output.logits, targets))
SOME_TOKENS = Task(some_labels, lambda output, targets: masked_cross_entropy(output.logits, targets))
CLASS = Task(
    lambda size: torch.randint(0, CLASSES, (size,)),
    lambda output, targets: class_cross_entropy(output.logits, targets),
)


def features(name: str, *shape: int) -> Task:
    """The squared error of one of the outputs."""
    return Task(
        lambda size: torch.randn(size, *shape), lambda output, targets: squared_error(getattr(output, name), targets)
    )


LAYERS = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": HIDDEN}
TEXTS = {"vocab_size": VOCAB, "max_position_embeddings": 2 * TIME, **LAYERS}
GROUPED = {**TEXTS, "num_key_value_heads": 2}
VISION = {**LAYERS, "image_size": SIDE, "patch_size": 8}
OPT = {
    **{"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4},
    **{"ffn_dim": HIDDEN, "word_embed_proj_dim": WIDTH, "max_position_embeddings": 2 * TIME},
}
DISTILBERT = {"vocab_size": VOCAB, "dim": WIDTH, "n_layers": 1, "n_heads": 4, "hidden_dim": HIDDEN}
T5 = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": HIDDEN,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "num_heads": 4,
}
WHISPER = {
    **{"d_model": WIDTH, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": HIDDEN},
    **{"decoder_layers": 1, "decoder_attention_heads": 4, "num_mel_bins": MELS, "max_source_positions": TIME},
}

# the two tokens that GPT-2 has by default are no ids of so small a vocabulary
GPT2 = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 2 * TIME}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}

NO_GPT2_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
NO_BERT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0}

gpt2 = pretrained("GPT2LMHeadModel", "GPT2Config", **GPT2)
llama = pretrained("LlamaForCausalLM", "LlamaConfig", **GROUPED)
mistral = pretrained("MistralForCausalLM", "MistralConfig", **GROUPED, sliding_window=4)
qwen2 = pretrained("Qwen2ForCausalLM", "Qwen2Config", **GROUPED)
gemma = pretrained("GemmaForCausalLM", "GemmaConfig", **GROUPED, head_dim=8)
opt = pretrained("OPTForCausalLM", "OPTConfig", **OPT)
bert = pretrained("BertForMaskedLM", "BertConfig", **TEXTS)
bert_classifier = pretrained("BertForSequenceClassification", "BertConfig", **TEXTS, num_labels=CLASSES)
roberta = pretrained("RobertaForMaskedLM", "RobertaConfig", **TEXTS)
distilbert = pretrained("DistilBertForMaskedLM", "DistilBertConfig", **DISTILBERT)
t5 = pretrained("T5ForConditionalGeneration", "T5Config", **T5, decoder_start_token_id=0)
vit = pretrained("ViTForImageClassification", "ViTConfig", **VISION, num_labels=CLASSES)
clip = pretrained("CLIPVisionModel", "CLIPVisionConfig", **VISION)
whisper = pretrained("WhisperModel", "WhisperConfig", **WHISPER, vocab_size=VOCAB, pad_token_id=0)

MODELS = {
    "gpt2": Whole("GPT-2: Conv1D, tied head", LIBRARY, gpt2, text, TOKENS, NO_GPT2_DROPOUT),
    "gpt2_padded": Whole("GPT-2, padded", LIBRARY, gpt2, padded, SOME_TOKENS, NO_GPT2_DROPOUT),
    "llama": Whole("Llama: grouped queries", LIBRARY, llama, text, TOKENS),
    "llama_padded": Whole("Llama, padded in front", LIBRARY, llama, padded_in_front, SOME_TOKENS),
    "mistral": Whole("Mistral: sliding window", LIBRARY, mistral, text, TOKENS),
    "qwen2": Whole("Qwen2", LIBRARY, qwen2, text, TOKENS),
    "gemma": Whole("Gemma", LIBRARY, gemma, text, TOKENS),
    "opt": Whole("OPT", LIBRARY, opt, text, TOKENS, NO_DROPOUT),
    "bert": Whole("BERT, masked words", LIBRARY, bert, text, SOME_TOKENS, NO_BERT_DROPOUT),
    "bert_padded": Whole("BERT, padded, two sentences", LIBRARY, bert, two_sentences, SOME_TOKENS, NO_BERT_DROPOUT),
    "bert_classifier": Whole("BERT, classes of texts", LIBRARY, bert_classifier, padded, CLASS, NO_BERT_DROPOUT),
    "roberta": Whole("RoBERTa, masked words", LIBRARY, roberta, padded, SOME_TOKENS, NO_BERT_DROPOUT),
    "distilbert": Whole("DistilBERT, masked words", LIBRARY, distilbert, padded, SOME_TOKENS, NO_DROPOUT),
    "t5": Whole("T5: encoder and decoder, relative positions", LIBRARY, t5, two_texts, TOKENS, {"dropout_rate": 0.0}),
    "vit": Whole("ViT, classes of images", LIBRARY, vit, pixels, CLASS),
    "clip_vision": Whole("CLIP, its vision tower", LIBRARY, clip, pixels, features("pooler_output", WIDTH)),
    "whisper_encoder": Whole(
        "Whisper, its encoder",
        LIBRARY,
        lambda: whisper().get_encoder(),
        sounds,
        features("last_hidden_state", TIME, WIDTH),
    ),
}

LABELS = ("llama", "bert_classifier", "vit")  # given labels=, these return a loss themselves
