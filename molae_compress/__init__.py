"""molae_compress: Mixture-of-Experts checkpoints rewritten as latent experts (MoLAE), smaller and loadable as before.

Importing the package registers its loader with transformers, so that `AutoModelForCausalLM.from_pretrained` understands a
compressed folder. Everything else is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from molae_compress.errors import MolaeError
from molae_compress.modeling.quantizer import installed_version, register

if TYPE_CHECKING:
    from molae_compress import theory
    from molae_compress.apply import plan, run
    from molae_compress.evaluation import Evaluation, evaluate
    from molae_compress.expansion import expand
    from molae_compress.finetuning import finetune
    from molae_compress.inplace import compress_
    from molae_compress.modeling.expand import expand_
    from molae_compress.planning import Plan
    from molae_compress.recipe import Recipe
    from molae_compress.report import Report
    from molae_compress.scratch import from_config, report_for
    from molae_compress.verification import Verification, verify

__version__ = installed_version()
_HOMES = {
    "Evaluation": "molae_compress.evaluation",
    "Plan": "molae_compress.planning",
    "Recipe": "molae_compress.recipe",
    "Report": "molae_compress.report",
    "Verification": "molae_compress.verification",
    "compress_": "molae_compress.inplace",
    "evaluate": "molae_compress.evaluation",
    "expand": "molae_compress.expansion",
    "expand_": "molae_compress.modeling.expand",
    "finetune": "molae_compress.finetuning",
    "from_config": "molae_compress.scratch",
    "plan": "molae_compress.apply",
    "report_for": "molae_compress.scratch",
    "run": "molae_compress.apply",
    "verify": "molae_compress.verification",
}
__all__ = [
    "Evaluation",
    "MolaeError",
    "Plan",
    "Recipe",
    "Report",
    "Verification",
    "compress_",
    "evaluate",
    "expand",
    "expand_",
    "finetune",
    "from_config",
    "plan",
    "report_for",
    "run",
    "theory",
    "verify",
]

register()


def __getattr__(name: str) -> Any:
    if name == "theory":
        return importlib.import_module("molae_compress.theory")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'molae_compress' has no attribute '{name}'")
    return getattr(importlib.import_module(home), name)
