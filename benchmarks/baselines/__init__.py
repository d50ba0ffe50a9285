"""Other published methods, from the formulas of their papers, under one accounting; see `baselines.common`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel

from .channels import channels
from .common import Setting
from .d2_moe import d2_moe
from .hc_smoe import hc_smoe
from .mobe import mobe, mobe_even
from .reap import reap
from .slbf import slbf
from .svd_llm import pifa, svd_llm

__all__ = ["BASELINES", "Baseline", "Setting"]

Baseline = Callable[[PreTrainedModel, Tensor, Setting], int]
BASELINES: dict[str, tuple[str, Baseline]] = {
    "svd-llm": ("SVD-LLM v2, per expert", svd_llm),
    "pifa": ("SVD-LLM v2, per expert, PIFA storage", pifa),
    "mobe": ("MoBE, gate and up (data-free)", mobe),
    "mobe-even": ("MoBE, gate, up and down (data-free)", mobe_even),
    "slbf": ("SLBF (data-free)", slbf),
    "d2-moe": ("D2-MoE, base and deltas", d2_moe),
    "hc-smoe": ("HC-SMoE, merged experts", hc_smoe),
    "reap": ("REAP, pruned experts", reap),
    "channels": ("channel pruning, leverage and Nystrom", channels),
}
