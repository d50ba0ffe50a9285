"""Latent experts as a transformers module: in place of stock experts, loaded, saved and expanded again."""

from molae_compress.modeling.expand import dense_module, dense_weights, expand_, to_dense
from molae_compress.modeling.latent import LatentExperts
from molae_compress.modeling.quantizer import MolaeConfig, MolaeQuantizer, attach_

__all__ = [
    "LatentExperts",
    "MolaeConfig",
    "MolaeQuantizer",
    "attach_",
    "dense_module",
    "dense_weights",
    "expand_",
    "to_dense",
]
