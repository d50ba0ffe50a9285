"""What the quality benchmark compares, as plain data: recipes of this package, and the baselines.

A recipe is the default one with overrides, as `--set` takes them, several of them apart by a space. To add a row to the
table of single parts, add a line to `ABLATIONS`.
"""

from __future__ import annotations

from typing import NamedTuple

from baselines import BASELINES

PAPER_GROUPS = (1, 2, 4, 8)
PER_EXPERT = "basis.experts_per_input_group=1 basis.experts_per_output_group=1"


class Method(NamedTuple):
    """One row.

    Attributes:
        title: for a reader.
        recipes: overrides of the default recipe; of several the one of the lowest KL counts. Empty for a baseline.
        reads_text: it is calibrated.
        draws: something besides the choice of calibration windows is drawn at random.
        steps: it takes gradient steps.
    """

    title: str
    recipes: tuple[str, ...] = ()
    reads_text: bool = True
    draws: bool = False
    steps: bool = False


_PAPER = tuple(f"method=paper calibration=null budget.align=1 basis.experts_per_input_group={size}" for size in PAPER_GROUPS)
OURS = {
    "quality": Method("this package, `quality` (default)", ("",)),
    "one bank": Method("this package, one rank per layer and side", ("budget.banks=1",)),
    "serving": Method("this package, `serving` (layer form)", ("basis.profile=serving",)),
    "self-generated": Method(
        "this package, on text that the model wrote", ("calibration.self_generated=256",), reads_text=False, draws=True
    ),
    "data-free": Method("this package, data-free", ("calibration=null",), reads_text=False),
}
SHARING = {
    "per expert": Method("this package, no basis shared (per-expert factors, all other parts)", (PER_EXPERT,)),
    "pairs": Method("this package, input bases shared by 2 experts", ("basis.experts_per_input_group=2",)),
    "fours": Method("this package, input bases shared by 4 experts", ("basis.experts_per_input_group=4",)),
    "whole layer": Method("this package, one input basis a layer", ("basis.experts_per_input_group=all",)),
}
ABLATIONS = {
    "basis.metric=input": "errors measured right after the first projection",
    "basis.storage=orthonormal": "bases stored whole",
    "basis.gate_up=separate": "gate and up each with a basis",
    "basis.down=dense": "down projection left dense",
    "basis.experts_per_input_group=2": "input bases shared by 2 experts",
    "basis.experts_per_input_group=2 basis.cluster=false": "the same, of neighbours instead of experts that are alike",
    "basis.experts_per_input_group=4": "input bases shared by 4 experts",
    "basis.experts_per_input_group=all": "one input basis a layer",
    "basis.experts_per_output_group=2": "output bases shared by 2 experts",
    "basis.experts_per_output_group=4": "output bases shared by 4 experts",
    "basis.experts_per_output_group=all": "one output basis a layer",
    "basis.experts_per_output_group=all basis.output=combined": "the same, of the routed sum",
    "budget.banks=1": "one rank per layer and side",
    "budget.allocate=uniform": "uniform ranks",
    "budget.align=8": "ranks in steps of 8",
    "refit.cores=false": "cores not refitted to each expert's own tokens",
    "refit.down=false": "down projection not refitted",
    "refit.newton=0": "the input side as the closed form leaves it",
    "refit.newton=15": "three times the conjugate gradients",
    "heal.block_steps=200": "healed: experts distilled block by block",
    "heal.router_steps=50": "healed: routers distilled",
    "heal.block_steps=200 heal.router_steps=50": "healed: both",
    "refit.shrinkage=0": "experts trust their own tokens alone",
    "refit.shrinkage=10": "experts follow their layer more",
    "refit.sequential=true": "calibrated on what compressed layers deliver",
    "calibration.weighting=linear": "tokens weighted by the routing weight, not its square",
    "calibration.weighting=none": "tokens not weighted by the routing",
    "calibration.self_generated=0": "no windows that the model wrote itself, and stronger guards instead",
    "calibration.self_generated=64": "twice as many of them",
    "calibration=null": "no calibration",
}
_PEERS = {
    name: Method(
        title,
        reads_text=name not in ("mobe", "mobe-even", "slbf"),
        draws=name in ("mobe", "mobe-even", "slbf"),
        steps=name in ("mobe", "mobe-even", "slbf"),
    )
    for name, (title, _) in BASELINES.items()
}
PEERS = {"paper": Method("MoLAE, the paper's procedure (data-free)", _PAPER, reads_text=False), **_PEERS}
MAIN = OURS | SHARING | PEERS
_KNOWN = {method.recipes[0]: name for name, method in MAIN.items() if len(method.recipes) == 1}
METHODS = MAIN | {change: Method(text, (change,)) for change, text in ABLATIONS.items() if change not in _KNOWN}


def changed(change: str) -> str:
    """The method with a change of `ABLATIONS`: a row of its own, or the one of the main table that is the same."""
    return _KNOWN.get(change, change)


# Shown with calibration text of other kinds and of other amounts; the rest of the table is in the same file.
ROBUST = ("quality", "one bank", "self-generated", "data-free", "slbf", "mobe-even", "pifa", "channels", "paper")
# Gradient steps of the methods' own papers, the least they state.
TRAINED = {"mobe": 10_000, "mobe-even": 10_000, "slbf": 8_000}
TRAINED_KEEP = 0.5
ABLATION_KEEPS = (0.6, 0.5)
FEW = 32  # one of so many calibration windows, in the row that has few
