"""What routed-experts classes store and how they are called; everything else of the package is free of both."""

from molae_compress.layouts.base import FLAGS, Call, Layout, Traits, Weights, bare_copy, gated
from molae_compress.layouts.registry import (
    LAYER_NUMBER,
    dense_experts,
    describe_in,
    layout_of,
    layouts,
    routed_layout,
    weight_names,
)

__all__ = [
    "FLAGS",
    "LAYER_NUMBER",
    "Call",
    "Layout",
    "Traits",
    "Weights",
    "bare_copy",
    "dense_experts",
    "describe_in",
    "gated",
    "layout_of",
    "layouts",
    "routed_layout",
    "weight_names",
]
