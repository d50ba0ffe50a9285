"""Calibration tokens carried layer by layer: the same numbers as the model's own forward, in every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import molae_compress as molae
from molae_compress.calibration.observed import RoutedTokens
from molae_compress.calibration.replay import Given, Gone, Passed, packed, unpacked
from molae_compress.calibration.walk import LayerArguments, pass_through
from molae_compress.checkpoint import WorkDirectory
from molae_compress.errors import ModelError
from molae_compress.solver.spectra import LayerSpectra
from molae_compress.source import DiskSource, LiveSource, Source
from molae_compress.spectral import comparable
from molae_compress.stream import ResidualStream, forwarded, observed
from tests.conftest import CheckpointMaker
from tests.runs import distance, loaded, recipe_for
from tests.tiny import HIDDEN, tiny_ids
from tests.zoo import zoo_model

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
        layer = model.get_submodule(source.layers.paths[source.layers.of(spec.name)])
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


def walked(stream: ResidualStream, source: Source, layer: int) -> dict[str, RoutedTokens | None]:
    """Sends the tokens through the next layer; what its experts saw."""
    specs = [spec for spec in source.specs if source.layers.of(spec.name) == layer]
    recorders = {spec.name: stream.recorder(spec) for spec in specs}
    with source.layer(layer) as module:
        return stream.step(module, observed(source, specs, recorders), recorders)


def test_the_stream_sees_what_the_model_sees(checkpoint: CheckpointMaker, family: str, place: str) -> None:
    folder = checkpoint(family)
    source, ids_NL = source_of(place, folder), tiny_ids(WINDOWS, LENGTH)
    modules = dict(source.model.named_modules())
    _, expected = own_forward(loaded(folder), source, ids_NL)
    stream = ResidualStream(source, ids_NL, BATCH, work=None, name="test", memory_limit=None)
    seen: dict[str, RoutedTokens | None] = {}
    with source.ends(head=False), torch.no_grad():
        stream.start(0)
        for layer in range(len(source.layers)):
            seen |= walked(stream, source, layer)
    assert len(seen) == len(source.specs) == 2
    for name, found in seen.items():
        x_TH, index_TK, gate_TK = expected[name]
        assert found is not None
        assert distance(found.x_TH, x_TH.flatten(0, -2)) < 1e-5
        assert torch.equal(found.index_TK, index_TK)
        assert distance(found.gate_TK, gate_TK) < 1e-5
        assert distance(found.energy_T, expected[f"{name}.after"].flatten(0, 1).square().sum(1)) < 1e-5
    assert dict(source.model.named_modules()) == modules  # every stub and stand-in is gone again


def test_logits_layer_by_layer_are_those_of_the_model(checkpoint: CheckpointMaker, family: str, place: str) -> None:
    folder = checkpoint(family)
    source, ids_NL = source_of(place, folder), tiny_ids(WINDOWS, LENGTH)
    expected, _ = own_forward(loaded(folder), source, ids_NL)
    with source.ends(head=True), torch.no_grad():
        arguments = LayerArguments(source.model, source.layers.paths, source.device)
        batches = ids_NL.split(BATCH)
        carried = forwarded(source, arguments, batches, lambda _: None)
        logits = torch.cat([arguments.logits(*batch) for batch in zip(batches, carried, strict=True)])
    assert distance(logits, expected) < 1e-5


def test_layers_of_a_hybrid_model_get_arguments_of_their_own(checkpoint: CheckpointMaker) -> None:
    source, ids_1L = LiveSource.of(loaded(checkpoint("gpt_oss"))), tiny_ids(1, LENGTH)
    arguments = LayerArguments(source.model, source.layers.paths, source.device)
    first = arguments.of(ids_1L, ())
    with source.layer(0) as module, torch.no_grad():
        second = arguments.of(ids_1L, (arguments.call(module, ids_1L, ()),))
    assert first is not None
    assert second is not None
    assert source.model.config.layer_types == ["sliding_attention", "full_attention"]
    seen = [torch.as_tensor(found[1]["attention_mask"])[0, 0, -1] for found in (first, second)]
    visible = [int((row if row.dtype == torch.bool else row == 0).sum()) for row in seen]
    assert visible == [4, LENGTH]


def test_rows_of_experts_that_read_weighted_inputs_are_kept_by_token() -> None:
    source = LiveSource.of(zoo_model("Llama4ForCausalLM"))
    stream = ResidualStream(source, tiny_ids(WINDOWS, LENGTH) % 96, BATCH, work=None, name="test", memory_limit=None)
    with torch.no_grad():
        (found,) = walked(stream, source, 0).values()
    assert found is not None
    assert len(found.x_TH) == len(found.energy_T) == 2 * WINDOWS * LENGTH
    first_TH, second_TH = found.x_TH[::2], found.x_TH[1::2]
    torch.testing.assert_close(torch.cosine_similarity(first_TH, second_TH), torch.ones(WINDOWS * LENGTH))
    assert torch.equal(found.energy_T[::2], found.energy_T[1::2])
    assert (found.index_TK[::2] != found.index_TK[1::2]).all()


def test_a_token_that_passes_the_experts_by_is_an_error(checkpoint: CheckpointMaker) -> None:
    source = LiveSource.of(loaded(checkpoint("qwen3_moe")))
    stream = ResidualStream(source, tiny_ids(WINDOWS, LENGTH), BATCH, work=None, name="test", memory_limit=None)
    (spec, _) = source.specs
    recorders = {spec.name: stream.recorder(spec)}
    layer = source.model.model.layers[0]

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


class Layer(nn.Module):
    """Adds to the hidden states, and returns and writes down more than them."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, h_BLH: Tensor, heard: Tensor | None, notes: dict[str, Any], *, past: Tensor | None = None) -> Any:
        h_BLH = h_BLH + torch.tanh(self.linear(h_BLH if past is None else h_BLH + past))
        if heard is not None:
            h_BLH = h_BLH + heard.double().sin().float()
        if "key" in notes:
            h_BLH = h_BLH * notes["key"]
        if self.number == 1:
            notes["key"] = h_BLH.mean(-1, keepdim=True).cos()
        return h_BLH, (h_BLH[..., :1] * 7).int(), {"unused": h_BLH.exp()}


class Talkative(nn.Module):
    """A model whose layers tell each other things in every way there is."""

    def __init__(self, turns: tuple[int, ...] = (0, 1, 2, 3, 4)) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(300, HIDDEN), nn.ModuleList([Layer(number) for number in range(5)])
        self.turns = turns

    def forward(self, input_ids: Tensor, use_cache: bool) -> tuple[Tensor]:
        h_BLH, heard, notes, skipped, total = self.embed(input_ids), None, {}, None, 0.0
        for number in self.turns:
            h_BLH, heard = self.layers[number](h_BLH, heard, notes, past=skipped if number == 4 else None)[:2]
            if number == 0:
                skipped = h_BLH * 0.5
            total = total + h_BLH.mean(-1, keepdim=True)
        return (h_BLH + total,)


def talk(model: nn.Module, ids_BL: Tensor) -> Passed:
    arguments = LayerArguments(model, [f"layers.{number}" for number in range(5)], torch.device("cpu"))
    passed: Passed = ()
    for number in range(5):
        ((passed, _),) = pass_through(arguments, model.layers[number], {}, iter([(ids_BL, passed)]))
        passed = unpacked(*packed(passed))
    assert distance(arguments.logits(ids_BL, passed), model(ids_BL, use_cache=False)[0]) < 1e-6
    return passed


@torch.no_grad()
def test_whatever_layers_tell_each_other_is_carried_and_nothing_else_kept() -> None:
    torch.manual_seed(0)
    ids_BL = tiny_ids(3, 7)
    talk(Talkative(), ids_BL)
    model = Talkative((0, 1, 2, 3))  # the last layer is not called
    passed = talk(model, ids_BL)
    assert passed[4] is None
    model.embed.weight.data.fill_(float("nan"))
    arguments = LayerArguments(model, [f"layers.{number}" for number in range(5)], torch.device("cpu"))
    with pytest.raises(ModelError, match="NaN or infinite hidden states"):
        list(pass_through(arguments, model.layers[0], {}, iter([(ids_BL, ())])))


@torch.no_grad()
def test_only_what_the_rest_of_the_forward_can_use_is_kept() -> None:
    torch.manual_seed(0)
    ids_BL, model = tiny_ids(3, 7), Talkative()
    arguments = LayerArguments(model, [f"layers.{number}" for number in range(5)], torch.device("cpu"))
    passed: Passed = ()
    kept = []
    for number in range(4):
        ((passed, _),) = pass_through(arguments, model.layers[number], {}, iter([(ids_BL, passed)]))
        kept.append(
            {(n, i) for n, given in enumerate(passed) for i, leaf in enumerate(given.leaves()) if torch.is_tensor(leaf)}
        )
    # every layer's hidden states are in a running sum; of the rest, what the last layer says, and the notes of layer 1
    assert kept[0] == {(0, 0), (0, 1)}
    assert kept[1] == {(0, 0), (1, 0), (1, 1), (1, 3)}
    assert kept[3] == {(0, 0), (1, 0), (1, 3), (2, 0), (3, 0), (3, 1)}


@pytest.mark.parametrize("turns", [(0, 1, 1, 2, 3, 4), (0, 2, 1, 3, 4), (1, 0, 2, 3, 4)])
def test_layers_called_out_of_turn_are_refused(turns: tuple[int, ...]) -> None:
    with torch.no_grad(), pytest.raises(ModelError, match="out of turn"):
        talk(Talkative(turns), tiny_ids(1, 5))


def test_what_is_stored_comes_back_bit_for_bit() -> None:
    numbers = torch.tensor([[float("nan"), float("-inf"), 0.5]])
    returned = (torch.randn(2, 3), [numbers, numbers.bool(), None, "text", 3], Gone((4, 5), torch.int32))
    passed: Passed = (
        Given(numbers.bfloat16()[:, 1:], {"notes": {"key": numbers, 7: (torch.tensor(1),)}}),
        None,
        Given(returned, {}),
    )
    tensors, info = packed(passed)
    assert [tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()] == [torch.float32]
    found = unpacked(tensors, json.loads(json.dumps(info)))
    assert found[1] is None
    for before, after in zip((passed[0], passed[2]), (found[0], found[2]), strict=True):
        assert str(before) == str(after)


@pytest.mark.parametrize("limit", [None, 0], ids=["in memory", "on disk"])
@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_a_stream_goes_on_from_what_was_stored_last(
    checkpoint: CheckpointMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None, seconds: float
) -> None:
    monkeypatch.setattr("molae_compress.stream.CHECKPOINT_SECONDS", seconds)
    source, ids_NL = LiveSource.of(loaded(checkpoint("deepseek_v3"))), tiny_ids(WINDOWS, LENGTH)

    def stream() -> ResidualStream:
        return ResidualStream(source, ids_NL, BATCH, work=work, name="test", memory_limit=limit)

    def stored() -> set[int]:
        return {int(item.split("-")[1]) for item in work.done("hidden")}

    with WorkDirectory.open(tmp_path / "work", stage_inputs={"hidden": {}}) as work, torch.no_grad():
        first = stream()
        first.start(2)
        assert first.layer == 0
        seen = []
        for layer in range(2):
            seen.append(walked(first, source, layer))
            # until the modules of the layer are done, it may have to be walked again
            assert stored() == (set() if limit is None and seconds else set(range(max(1, layer), layer + 2)))
            first.forget(layer)
        assert stored() == (set() if limit is None and seconds else {2})
        last = walked(first, source, 2)
        second = stream()
        second.start(2)
        assert second.layer == (0 if limit is None and seconds else 2)
        for layer in range(second.layer, 3):
            again = walked(second, source, layer)
    for name, found in last.items():
        assert found is not None
        assert all(
            torch.equal(one, other) for one, other in zip(vars(found).values(), vars(again[name]).values(), strict=True)
        )


def test_what_was_stored_last_stays_until_something_newer_is(
    checkpoint: CheckpointMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = LiveSource.of(loaded(checkpoint("deepseek_v3")))
    with WorkDirectory.open(tmp_path / "work", stage_inputs={"hidden": {}}) as work, torch.no_grad():
        stream = ResidualStream(source, tiny_ids(1, LENGTH), 1, work=work, name="test", memory_limit=None)
        for layer, seconds in enumerate((0.0, 1e9)):
            monkeypatch.setattr("molae_compress.stream.CHECKPOINT_SECONDS", seconds)
            walked(stream, source, layer)
            stream.forget(layer)
        assert work.done("hidden") == {"test-0001-00000"}


@pytest.mark.parametrize("overrides", [[], ["refit.sequential=true"]], ids=" ".join)
def test_nothing_is_computed_or_stored_after_the_last_layer(
    checkpoint: CheckpointMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    stored: list[str] = []
    real = WorkDirectory.commit
    monkeypatch.setattr(WorkDirectory, "commit", lambda *args: (stored.append(args[2]), real(*args))[1])
    folder = checkpoint("qwen3_moe")
    molae.run(recipe_for(folder, *overrides), tmp_path / "one", max_memory=0)
    assert {item for item in stored if item.startswith("solve-")} == {f"solve-0001-{batch:05d}" for batch in range(3)}
    stored.clear()
    molae.run(recipe_for(folder, "ignore=['model.layers.1.mlp.experts']", *overrides), tmp_path / "two", max_memory=0)
    assert not [item for item in stored if item.startswith(("solve-", "observe-"))]


def test_a_module_measured_without_data_counts_as_an_average_one() -> None:
    def spectra(size: float) -> LayerSpectra:
        return LayerSpectra((torch.full((2, 4), size), torch.full((2, 4), size)), torch.full((1, 8), size), torch.arange(2))

    found = comparable({"a": spectra(1.0), "b": spectra(3.0), "c": spectra(100.0)}, {"c"})
    assert {name: float(one.output_GM.sum() + sum(part.sum() for part in one.input_GM)) for name, one in found.items()} == {
        "a": 24.0,
        "b": 72.0,
        "c": pytest.approx(48.0),
    }
    assert comparable({"c": spectra(100.0)}, {"c"})["c"].output_GM.sum() == 800
