"""What is minimised: how far predictions are from the original's, how unlikely they find the text, or both.

Shape suffixes: B examples of one batch, L tokens of one example, P learned ones, V vocabulary, k tokens kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from molae_compress.tuning.examples import IGNORED

# logits [V] of some places [P,V] -> sum over them of the divergence from the original's predictions there
Divergence = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """Weights of the two parts of the loss."""

    kl_weight: float
    language_weight: float

    def __call__(self, logits_BLV: Tensor, labels_BL: Tensor, divergences: list[Divergence] | None) -> Tensor:
        """The sum over learned tokens.

        One example at a time, and again in the backward pass: in float32 the predictions of a whole batch would take more
        memory than most of the rest.

        Args:
            logits_BLV: of the model; those of one place predict the token of the next.
            labels_BL: as in `Examples`.
            divergences: of each example, given the logits of its learned places; None without `kl_weight`.
        """
        total = logits_BLV.new_zeros((), dtype=torch.float32)
        for row, (logits_LV, labels_L) in enumerate(zip(logits_BLV, labels_BL, strict=True)):
            divergence = divergences[row] if divergences is not None else None
            total = total + checkpoint(self._of_example, logits_LV, labels_L, divergence, use_reentrant=False)
        return total

    def _of_example(self, logits_LV: Tensor, labels_L: Tensor, divergence: Divergence | None) -> Tensor:
        places = learned_places(labels_L)
        logits_PV = logits_LV[places].float()
        total = logits_PV.new_zeros(())
        if self.language_weight:
            loss = torch.nn.functional.cross_entropy(logits_PV, labels_L[places + 1], reduction="sum")
            total = total + self.language_weight * loss
        if divergence is not None:
            total = total + self.kl_weight * divergence(logits_PV)
        return total


def learned_places(labels_L: Tensor) -> Tensor:
    """[P] int64: the places before learned tokens, where they are predicted."""
    return (labels_L[1:] != IGNORED).nonzero()[:, 0]


def full_divergence(original_PV: Tensor, logits_PV: Tensor) -> Tensor:
    """Sum over places of KL(original || model), from the logits of both."""
    logp_PV = original_PV.float().log_softmax(-1)
    return (logp_PV.exp() * (logp_PV - logits_PV.log_softmax(-1))).sum()


def top_divergence(logp_Pk: Tensor, tokens_Pk: Tensor, logits_PV: Tensor) -> Tensor:
    """The same from the likeliest tokens of the original alone; all others count as one token, together.

    It is never more than the full divergence, and zero where that is.

    Args:
        logp_Pk: log probabilities of the original.
        tokens_Pk: of these tokens.
        logits_PV: of the model.
    """
    logq_PV = logits_PV.log_softmax(-1)
    logq_Pk = logq_PV.gather(-1, tokens_Pk.long())
    p_Pk = logp_Pk.exp()
    kept = (p_Pk * (logp_Pk - logq_Pk)).sum()
    if tokens_Pk.shape[-1] == logits_PV.shape[-1]:
        return kept
    rest_PV = logq_PV.scatter(-1, tokens_Pk.long(), float("-inf"))
    # what is left to the original is known as precisely as its other probabilities add up to one
    p_rest_P = (1.0 - p_Pk.sum(-1)).clamp(min=torch.finfo(torch.float32).eps)
    return kept + (p_rest_P * (p_rest_P.log() - rest_PV.logsumexp(-1))).sum()
