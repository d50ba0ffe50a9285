"""Experts that a model takes out of a list and calls itself: their routing is found out, or they are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from molae_compress import compress_
from molae_compress.errors import ModelError
from molae_compress.source import LiveSource
from molae_compress.stream import ResidualStream, observed
from tests.tiny import HIDDEN, INTERMEDIATE, TOP_K, tiny_ids, tiny_model

HALF = {"molae": 1, "budget": {"rank": 8}}
EXPERTS = 40  # more than the hidden size


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(HIDDEN, INTERMEDIATE, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Sends tokens to experts slot by slot, so that an expert's rows are in no simple order."""

    def __init__(self, has_keys: bool) -> None:
        super().__init__()
        self.top_k = TOP_K
        self.gate, self.shared = nn.Linear(HIDDEN, EXPERTS, bias=False), MLP()
        experts = {f"expert_{e}": MLP() for e in range(EXPERTS)}
        self.experts = nn.ModuleDict(experts) if has_keys else nn.ModuleList(experts.values())

    def routing(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate(x_TH).softmax(-1).topk(TOP_K, dim=-1)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        x_TH = x.reshape(-1, HIDDEN)
        weight_TK, index_TK = self.routing(x_TH)
        y_TH = 3 * self.shared(x_TH)
        for e, name in enumerate(self.experts):
            slots, tokens = torch.where(index_TK.T.eq(e))
            expert = self.experts[name] if isinstance(name, str) else self.experts[e]
            y_TH.index_add_(0, tokens, expert(x_TH[None, tokens])[0] * weight_TK[tokens, slots, None])
        return y_TH.view_as(x), None


def one_by_one(has_keys: bool = False) -> PreTrainedModel:
    model = tiny_model("olmoe")
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp = Block(has_keys)
        for parameter in layer.mlp.parameters():
            nn.init.normal_(parameter, 0.0, 0.3)
        layer.mlp.register_forward_hook(lambda _, __, out: out[0])  # as the layer wants it
    return model.eval().requires_grad_(False)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_ids(seed=1)).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_keys", [False, True], ids=["list", "dictionary"])
def test_the_routing_is_found_out(has_keys: bool, dtype: torch.dtype) -> None:
    model = one_by_one(has_keys).to(dtype)
    block, read = model.model.layers[0].mlp, []
    handle = block.register_forward_pre_hook(lambda _, args: read.append(args[0].reshape(-1, HIDDEN)))
    logits_before = logits(model)
    handle.remove()
    source = LiveSource.of(model)
    stream = ResidualStream(source, tiny_ids(seed=1), 1, work=None, name="test", memory_limit=None)
    spec = source.specs[0]
    recorders = {spec.name: stream.recorder(spec)}
    with torch.no_grad():
        (found,) = stream.step(model.model.layers[0], observed(source, [spec], recorders), recorders).values()
        weight_TK, index_TK = block.routing(read[0])
    assert found is not None
    close = {"rtol": 2e-2, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found.x_TH, read[0].float(), **close)
    order = index_TK.argsort(1)
    torch.testing.assert_close(found.index_TK.sort(1).values, index_TK.gather(1, order))
    gates_TK = found.gate_TK.gather(1, found.index_TK.argsort(1))
    torch.testing.assert_close(gates_TK, weight_TK.gather(1, order).float(), **close)
    assert torch.equal(logits(model), logits_before)
    assert not block._forward_pre_hooks


def test_they_are_calibrated() -> None:
    model, blind = one_by_one(), one_by_one()
    dense = logits(model)
    recipe = {**HALF, "calibration": {"samples": 40, "sequence_length": 24}, "refit": {"sequential": True}}
    report = compress_(model, recipe, data=tiny_ids(40, 24))
    # and an eighth more, which the model wrote
    assert [sum(layer.tokens_per_expert) for layer in report.layers] == [45 * 24 * TOP_K] * 2
    compress_(blind, HALF)
    assert (logits(model) - dense).square().mean() < (logits(blind) - dense).square().mean()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda forward, x: forward(x.exp()), "something else than rows"),
        (lambda forward, x: (forward(x)[0].tanh(), None), "does not add up|do not add up"),
        (lambda forward, x: (forward(x)[0].mean(), None), "does not return hidden states"),
    ],
)
def test_other_blocks_are_refused(spoil: Callable[..., object], reason: str) -> None:
    model = one_by_one()
    for layer in model.model.layers:
        layer.mlp.forward = lambda x, forward=layer.mlp.forward: spoil(forward, x)
    recipe = {**HALF, "calibration": {"samples": 2, "sequence_length": 9}}
    with pytest.raises(ModelError, match=reason):
        compress_(model, recipe, data=tiny_ids())
