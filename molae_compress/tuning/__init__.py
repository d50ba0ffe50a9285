"""Training of latent experts with PEFT and the `Trainer` of transformers.

`LatentTuningConfig` and `load_adapter` are imported when they are used, and PEFT with them, which then knows the method.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from molae_compress.tuning.dense_adapters import load_adapter
    from molae_compress.tuning.method import LatentTuningConfig

__all__ = ["LatentTuningConfig", "load_adapter"]


def __getattr__(name: str) -> Any:
    if name == "LatentTuningConfig":
        from molae_compress.tuning.method import LatentTuningConfig

        return LatentTuningConfig
    if name == "load_adapter":
        from molae_compress.tuning.dense_adapters import load_adapter

        return load_adapter
    raise AttributeError(f"module 'molae_compress.tuning' has no attribute '{name}'")
