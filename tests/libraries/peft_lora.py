"""Low-rank adapters by peft on models of transformers: the base is frozen."""

from collections.abc import Callable

from torch import nn

from libraries.hugging_face import NO_GPT2_DROPOUT, SOME_TOKENS, TOKENS, gpt2, llama, padded, text
from libraries.whole import Whole, names_of

LIBRARY = "peft"
_named = names_of(LIBRARY)


def adapted(base: Callable[..., nn.Module], *targets: str, **settings) -> Callable[..., nn.Module]:
    """A model with adapters at all modules of these names; dropout before them unless told otherwise."""

    def build(lora_dropout: float = 0.1, **more) -> nn.Module:
        config = _named("LoraConfig")(
            r=4, target_modules=list(targets), lora_dropout=lora_dropout, task_type="CAUSAL_LM", **settings
        )
        return _named("get_peft_model")(base(**more), config)

    return build


gpt2_lora = adapted(gpt2, "c_attn", fan_in_fan_out=True)
llama_lora = adapted(llama, "q_proj", "v_proj")

MODELS = {
    "lora_gpt2": Whole("LoRA on GPT-2", LIBRARY, gpt2_lora, text, TOKENS, {"lora_dropout": 0.0, **NO_GPT2_DROPOUT}),
    "lora_llama": Whole("LoRA on Llama, padded", LIBRARY, llama_lora, padded, SOME_TOKENS, {"lora_dropout": 0.0}),
}
