"""Weights that are read or written must be numbers: a NaN or an infinity is refused, with the name of its tensor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from molae_compress.errors import CheckpointError


def decoded(values: Tensor) -> Tensor:
    """Flat one-byte floats in float32: looked up, which is several times faster than torch's conversion."""
    table = torch.arange(256, dtype=torch.uint8).view(values.dtype).float()
    return table.index_select(0, values.view(torch.uint8).int())


def check_finite(name: str, values: Tensor, *, where: str, single: bool = False) -> None:
    """Raises `CheckpointError` if the flat tensor `values` is of a floating type and holds a NaN or an infinity.

    Args:
        name: the tensor, for the message.
        values: [N], all of the tensor or a part of it.
        where: the place, for the message.
        single: the whole tensor is one number. That is no weight but a setting, and may be infinite: some models store
            limits for clipping so, and an open limit is an infinity.
    """
    if not values.is_floating_point():
        return
    for piece in values.split(2**22) if values.numel() else ():
        # One-byte floats have no reductions of their own. The extremes carry a NaN or an infinity of any element, and
        # cost a small fraction of an elementwise test.
        piece = decoded(piece) if piece.dtype.itemsize == 1 else piece
        low, high = torch.aminmax(piece)
        extremes = (float(low.item()), float(high.item()))
        if any(map(math.isnan, extremes)) or (not single and any(map(math.isinf, extremes))):
            raise CheckpointError(
                f"The tensor '{name}' {where} holds NaN or infinite values.",
                why="Everything computed from it would be NaN too, and the result a model that answers nonsense.",
                remedy="Download the checkpoint again and compare its hash, or repair the tensor before compressing.",
            )
