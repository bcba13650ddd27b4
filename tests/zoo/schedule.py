"""Which compilations a case gets: few enough for minutes in all, and together every combination that matters.

The full product is 3 clippings x 2 places of the loss x 4 batch sizes. A core case gets all six pairs of clipping and
place, an ordinary case four of them; batch size, clip function, reduction and divisor rotate along, so that each of
these sees every clipping, both places and all of its batch sizes. A look-alike, a case that may be refused, and a case
whose sizes are all 8 get one pair, a different one from case to case. With FLASHDP_EXHAUSTIVE=1 every case gets the
full product (about an hour).
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from zoo.case import Case

CLIPPINGS = ("flat", "per_layer", "groups")
EXHAUSTIVE = os.environ.get("FLASHDP_EXHAUSTIVE") == "1"

# The layers and models that the project promises by name
CORE = frozenset(
    """
    linear_2d linear_2d_no_bias linear_3d linear_3d_no_bias linear_4d linear_of_transpose linear_of_strided_input
    input_by_output_weights mlp query_key_value gated_mlp matmul_with_parameter weight_per_head dense_mixture_of_experts
    embedding embedding_with_padding embedding_of_repeated_ids position_table class_token_and_positions
    positions_without_batch_axis scalar_temperature scale_per_channel layer_norm layer_norm_without_bias rms_norm
    rms_norm_by_hand group_norm conv1d conv2d conv2d_grouped conv2d_circular_padding weight_used_twice tied_autoencoder
    tied_embedding_and_head tied_embedding_with_projection tied_embedding_read_twice first_layer_frozen
    only_biases_train lora causal_attention attention_with_padding multihead_attention multihead_attention_time_major
    encoder_layer gpt llama vision_transformer rnn_by_hand gru_by_hand
    """.split()
)

ONCE = frozenset({"equal", "lookalike", "may_refuse"})


@dataclass(frozen=True)
class Run:
    """One compilation of one case."""

    case: str
    clipping: str
    place: str
    size: int
    clip_fn: str = "hard"
    reduction: str = "mean"
    expected: int | None = None

    def __str__(self) -> str:
        divisor = "" if self.expected is None else f"/{self.expected}"
        return f"{self.case}-{self.clipping}-{self.place}-B{self.size}-{self.clip_fn}-{self.reduction}{divisor}"


# Every clipping meets both places; the first four hold every clipping and both places.
PAIRS = (
    ("flat", "outside"),
    ("per_layer", "inside"),
    ("groups", "outside"),
    ("flat", "inside"),
    ("per_layer", "outside"),
    ("groups", "inside"),
)


def clip_function(clipping: str, turn: int) -> str:
    """Others than hard only where no group is a single parameter whose gradient may be zero but for rounding."""
    if clipping == "flat":
        return ("hard", "automatic", "normalize")[turn % 3]
    return ("hard", "automatic")[turn % 2] if clipping == "per_layer" else "hard"


def runs_of(case: Case, index: int) -> Iterator[Run]:
    """The compilations of one case; `index` rotates what is not in the name of the pair."""
    if EXHAUSTIVE:
        pairs = [(pair, size) for pair, size in product(PAIRS, case.batch_sizes)]
    else:
        if case.name in CORE:
            chosen = list(PAIRS)
        elif case.tags & ONCE:
            chosen = [PAIRS[index % len(PAIRS)]]
        elif index % 2:
            chosen = list(PAIRS[:4])
        else:
            chosen = [PAIRS[3], PAIRS[4], PAIRS[5], PAIRS[0]]
        first = index % 3 if len(chosen) == 1 else 0  # a single run is at B = 5, 2 or 8
        pairs = [(pair, case.batch_sizes[(first + k) % len(case.batch_sizes)]) for k, pair in enumerate(chosen)]
    for turn, ((clipping, place), size) in enumerate(pairs):
        yield Run(
            case.name,
            clipping,
            "inside_reduced" if place == "inside" and (index + turn) % 3 == 0 else place,
            size,
            clip_function(clipping, index + turn),
            ("mean", "sum")[(index + turn) // 2 % 2],
            (None, 7)[(index + turn) % 2],
        )
