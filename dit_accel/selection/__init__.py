"""Which key blocks are worth computing: scores, budgets, forced blocks and the choice itself.

A method that looks at queries and keys is a scorer and a budget; everything in which such methods differ is a parameter
here: the crossing block of top-p, the normalisation of scores, the scope of the budget, the rounding of counts, how
padding is treated, and which blocks are forced.
"""

from dit_accel.selection.budgets import Budget, Ranked, Rounding, Threshold, TopK, TopP, head_classes
from dit_accel.selection.choose import (
    Normalisation,
    adapt_heads,
    generator_for,
    plan_of_mask,
    routing_noise,
    select_blocks,
    select_plan,
    shares_of,
    top_k_plan,
)
from dit_accel.selection.forced import own_blocks, sink_blocks
from dit_accel.selection.pooling import (
    Padding,
    block_means,
    gather_blocks,
    pooled_scores,
    real_blocks,
    real_tokens,
    self_similarity,
    smooth_keys,
)

__all__ = [
    "Budget",
    "Normalisation",
    "Padding",
    "Ranked",
    "Rounding",
    "Threshold",
    "TopK",
    "TopP",
    "adapt_heads",
    "block_means",
    "gather_blocks",
    "generator_for",
    "head_classes",
    "own_blocks",
    "plan_of_mask",
    "pooled_scores",
    "real_blocks",
    "real_tokens",
    "routing_noise",
    "select_blocks",
    "select_plan",
    "self_similarity",
    "shares_of",
    "sink_blocks",
    "smooth_keys",
    "top_k_plan",
]
