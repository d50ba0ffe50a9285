"""Calibration tokens carried layer by layer: the same numbers as the model's own forward, in every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from molae_compress.calibration.walk import LayerArguments, RoutedTokens
from molae_compress.errors import ModelError
from molae_compress.source import DiskSource, LiveSource, Source
from molae_compress.stream import ResidualStream, forwarded, observed
from tests.conftest import CheckpointMaker
from tests.runs import distance, loaded
from tests.tiny import tiny_ids

WINDOWS, LENGTH, BATCH = 5, 21, 2  # longer than gpt_oss's sliding window of 4, and a last batch of one window


@pytest.fixture(params=["disk", "live"])
def place(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def source_of(place: str, folder: Any) -> Source:
    if place == "live":
        return LiveSource.of(loaded(folder))
    return DiskSource.open(str(folder), device=torch.device("cpu"))


def own_forward(model: PreTrainedModel, source: Source, ids_NL: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Logits of a whole model, and what its experts and decoder layers saw on the way."""
    seen: dict[str, Any] = {}
    handles = []
    for spec in source.specs:
        layer = model.get_submodule(f"{source.layers_path}.{spec.layer}")
        handles += [
            model.get_submodule(spec.name).register_forward_pre_hook(
                lambda _, args, kwargs, name=spec.name: seen.update({name: (*args, *kwargs.values())}), with_kwargs=True
            ),
            layer.register_forward_hook(
                lambda _, __, out, name=spec.name: seen.update({f"{name}.after": out[0] if isinstance(out, tuple) else out})
            ),
        ]
    with torch.no_grad():
        logits = model(input_ids=ids_NL).logits
    for handle in handles:
        handle.remove()
    return logits, seen


def test_the_stream_sees_what_the_model_sees(checkpoint: CheckpointMaker, family: str, place: str) -> None:
    folder = checkpoint(family)
    source, ids_NL = source_of(place, folder), tiny_ids(WINDOWS, LENGTH)
    modules = dict(source.model.named_modules())
    _, expected = own_forward(loaded(folder), source, ids_NL)
    stream = ResidualStream(source, ids_NL, BATCH, work=None, name="test", memory_limit=None)
    seen: dict[str, RoutedTokens] = {}
    with source.ends(head=False), torch.no_grad():
        stream.start(0)
        for layer in range(len(source.layers)):
            specs = [spec for spec in source.specs if spec.layer == layer]
            recorders = {spec.name: stream.recorder(spec) for spec in specs}
            with source.layer(layer) as module:
                seen |= stream.step(module, observed(source, specs, recorders), recorders)
    assert len(seen) == len(source.specs) == 2
    for name, found in seen.items():
        x_TH, index_TK, gate_TK = expected[name]
        assert distance(found.x_TH, x_TH.flatten(0, -2)) < 1e-5
        assert torch.equal(found.index_TK, index_TK)
        assert distance(found.gate_TK, gate_TK) < 1e-5
        assert distance(found.energy_T, expected[f"{name}.after"].flatten(0, 1).square().sum(1)) < 1e-5
    assert dict(source.model.named_modules()) == modules  # every stub and stand-in is gone again


def test_logits_layer_by_layer_are_those_of_the_model(checkpoint: CheckpointMaker, family: str, place: str) -> None:
    folder = checkpoint(family)
    source, ids_NL = source_of(place, folder), tiny_ids(WINDOWS, LENGTH)
    expected, _ = own_forward(loaded(folder), source, ids_NL)
    batches = ids_NL.split(BATCH)
    with source.ends(head=True), torch.no_grad():
        arguments = LayerArguments(source.model, source.layers, source.device)
        hidden = [arguments.embedded(ids_BL) for ids_BL in batches]
        for layer in range(len(source.layers)):
            hidden = list(forwarded(source, arguments, layer, zip(batches, hidden, strict=True)))
        logits = torch.cat([arguments.logits(*batch) for batch in zip(batches, hidden, strict=True)])
    assert distance(logits, expected) < 1e-5


def test_layers_of_a_hybrid_model_get_arguments_of_their_own(checkpoint: CheckpointMaker) -> None:
    source = LiveSource.of(loaded(checkpoint("gpt_oss")))
    arguments = LayerArguments(source.model, source.layers, source.device)
    masks = [arguments.of(layer, tiny_ids(1, LENGTH))[1]["attention_mask"] for layer in range(2)]
    assert source.model.config.layer_types == ["sliding_attention", "full_attention"]
    seen = [torch.as_tensor(mask)[0, 0, -1] for mask in masks]
    visible = [int((row if row.dtype == torch.bool else row == 0).sum()) for row in seen]
    assert visible == [4, LENGTH]


def test_a_token_that_passes_the_experts_by_is_an_error(checkpoint: CheckpointMaker) -> None:
    source = LiveSource.of(loaded(checkpoint("qwen3_moe")))
    stream = ResidualStream(source, tiny_ids(WINDOWS, LENGTH), BATCH, work=None, name="test", memory_limit=None)
    (spec, _) = source.specs
    recorders = {spec.name: stream.recorder(spec)}
    layer = source.layers[0]

    class Skipping(nn.Module):
        """A layer that looks at its experts once and never again."""

        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.mlp = layer.mlp

        def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
            self.calls += 1
            return layer(hidden_states, **kwargs) if self.calls == 1 else hidden_states

    with torch.no_grad():
        stream.start(0)
        with pytest.raises(ModelError, match=r"saw 42 of 105 calibration tokens.*ignore"):
            stream.step(Skipping(), observed(source, [spec], recorders), recorders)
