"""Calibration tokens carried through a model, one layer at a time.

Each layer is called outside the model's own forward, with the arguments the model itself gives it: the model runs with
stubs in place of its layers, those already passed giving again what they gave, the next one handing its arguments over.
Masks, rotary tables, what layers tell each other and what lies between two stacks of them (the end of an encoder, say) are
so the model's own, without knowing any of it. Recording costs one embedding and one mask.
Shape suffixes: N windows, B windows of one batch, L tokens of one window; T = N*L; the rest as in `molae_compress.tensors`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from molae_compress.calibration.one_by_one import ObservedList
from molae_compress.calibration.replay import (
    Follower,
    Given,
    Gone,
    Passed,
    Slot,
    leaves,
    resting,
    write_again,
    writing,
)
from molae_compress.errors import ModelError

REMEDY = "Compress data-free (no `calibration` section), or report the architecture."


class _Captured(Exception):
    """Carries what is wanted of a layer's arguments out of the model's forward."""


class _Stub(nn.Module):
    """Stands for a layer in the model's own forward; what it does when called is up to `call`."""

    def __init__(self, layer: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self._layer, self._call = (layer,), call

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)  # models read attributes such as attention_type

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(args, kwargs)


class LayerArguments:
    """What the model itself gives its layers, and makes of what they give.

    Args:
        model: whose parts outside the layers have their weights whenever this is used.
        layers: paths of the layers, in the order in which the model calls them.
        device: where the model is.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], device: torch.device) -> None:
        self._model, self._layers, self._device = model, layers, device

    @property
    def shifted(self) -> bool:
        """Whether the model predicts each token at its own place, being given the one before; else at the place before."""
        return has_decoder(self._model)

    def of(self, ids_BL: Tensor, passed: Passed) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Positional and keyword arguments of the next layer for these tokens; None if the model does not call it."""

        def take(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return (args, kwargs) if index == len(passed) else None

        found: tuple[tuple[Any, ...], dict[str, Any]] | None = self._captured(ids_BL, self._again(passed), take)
        return found

    def call(self, module: nn.Module, ids_BL: Tensor, passed: Passed) -> Given | None:
        """Calls `module`, which is the next layer, as the model would; None if the model does not.

        Args:
            module: the layer.
            ids_BL: token ids.
            passed: what the layers before gave for them.
        """
        found = self.of(ids_BL, passed)
        if found is None:
            return None
        with writing(*found) as written:
            returned = module(*found[0], **found[1])
        return Given(returned, written)

    def needed(self, ids_BL: Tensor, passed: Passed) -> set[Slot]:
        """Which tensors of `passed` the rest of the forward can still use, where it calls the next layer, or the head."""
        again, follower = self._again(passed), Follower()
        _follow(follower, again, passed)
        with follower:
            found: set[Slot] | None = self._captured(ids_BL, again, lambda *_: follower.needed())
        if found is None:  # without a head nobody can tell
            return {(layer, i) for layer, given in enumerate(passed) if given for i in range(len(given.leaves()))}
        return found

    def logits(self, ids_BL: Tensor, passed: Passed) -> Tensor:
        """[B,L,V]: what the model makes of its last layer: final norm, head and any scaling; [B,L,H] without a head."""
        with self._stubbed(self._again(passed), lambda *_: None):
            out = self._model(**model_inputs(self._model, ids_BL.to(self._device)))
        logits: Tensor = out.logits if hasattr(out, "logits") else out[0]
        return logits

    def some_logits(self, ids_1L: Tensor, passed: Passed, positions: int) -> Iterator[Tensor]:
        """The same of one window in parts [P,V] of so many positions, so that not all are in memory; or in one part.

        A part takes another call of what comes after the layers. It is one where the model cannot be asked for some logits.
        """
        length = ids_1L.shape[1]
        forward = type(self._model).forward
        known = forward.__module__.startswith("transformers.")  # elsewhere the name may mean another thing
        if not known or "logits_to_keep" not in inspect.signature(forward).parameters:
            positions = length
        for start in range(0, length, positions):
            kept = torch.arange(start, min(start + positions, length), device=self._device)
            asked = {} if len(kept) == length else {"logits_to_keep": kept}
            with self._stubbed(self._again(passed), lambda *_: None):
                out = self._model(**model_inputs(self._model, ids_1L.to(self._device)), **asked)
            logits: Tensor = out.logits if hasattr(out, "logits") else out[0]
            del out
            if logits.dim() != 3 or logits.shape[:2] != (1, len(kept)):
                raise ModelError(
                    f"{type(self._model).__name__} gives figures of shape {tuple(logits.shape)} for {len(kept)} tokens.",
                    why="These are no predictions of tokens.",
                    remedy="Set `calibration.self_generated: 0`, and give text.",
                )
            yield logits[0]
            del logits

    def _captured(
        self, ids_BL: Tensor, again: list[Given | None], take: Callable[[int, tuple[Any, ...], dict[str, Any]], Any]
    ) -> Any:
        """What `take` makes of the next layer that is called and its arguments, or of the head, inside the forward."""

        def called(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            raise _Captured(take(index, args, kwargs))

        def ends(*_: Any) -> Any:
            raise _Captured(take(len(self._layers), (), {}))

        head = self._model.get_output_embeddings() if isinstance(self._model, PreTrainedModel) else None
        hook = head.register_forward_pre_hook(ends) if head is not None else None
        try:
            with self._stubbed(again, called):
                self._model(**model_inputs(self._model, ids_BL.to(self._device)))
        except _Captured as captured:
            return captured.args[0]
        except (AttributeError, TypeError, IndexError, KeyError, ValueError) as error:
            raise ModelError(
                f"The arguments of layer '{self._layers[len(again)]}' could not be recorded from "
                f"{type(self._model).__name__}.",
                why=f"Its forward ends with {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                remedy=REMEDY,
            ) from error
        finally:
            if hook is not None:
                hook.remove()
        return None

    @contextmanager
    def _stubbed(
        self, again: list[Given | None], called: Callable[[int, tuple[Any, ...], dict[str, Any]], Any]
    ) -> Iterator[None]:
        """The model with a stub for every layer: those passed give again what they gave, once; any other is `called`."""
        place, passed = 0, len(again)

        def answer(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal place
            while place < min(index, passed) and again[place] is None:
                place += 1
            if index >= passed and place == passed:
                return called(index, args, kwargs)
            given = again[index] if index == place else None
            if given is None:
                raise ModelError(
                    f"{type(self._model).__name__} calls its layer '{self._layers[index]}' out of turn.",
                    why="Layers are walked one by one, each once and in one order.",
                    remedy=REMEDY,
                )
            place += 1
            again[index] = None  # nothing but the model may hold what it is given
            write_again(given.written, args, kwargs)
            return given.returned

        originals = {path: self._model.get_submodule(path) for path in self._layers}
        try:
            for index, (path, original) in enumerate(originals.items()):
                set_submodule(self._model, path, _Stub(original, partial(answer, index)))
            yield
        finally:
            for path, original in originals.items():
                set_submodule(self._model, path, original)

    def _again(self, passed: Passed) -> list[Given | None]:
        """What layers gave, on the device, in tensors that nothing else uses; zeros for those that are gone."""
        zeros: dict[Gone, Tensor] = {}

        def live(leaf: Tensor | Gone) -> Tensor:
            if isinstance(leaf, Tensor):
                return leaf.to(self._device, copy=True)
            if leaf not in zeros:
                zeros[leaf] = torch.zeros(leaf.shape, dtype=leaf.dtype, device=self._device)
            return zeros[leaf]

        return [given.mapped(live) if given is not None else None for given in passed]


def _follow(follower: Follower, again: Sequence[Given | None], passed: Passed) -> None:
    """Follows what is not gone already."""
    for layer, (copied, given) in enumerate(zip(again, passed, strict=True)):
        if copied is not None and given is not None:
            for i, (leaf, kept) in enumerate(zip(copied.leaves(), given.leaves(), strict=True)):
                if isinstance(kept, Tensor) and isinstance(leaf, Tensor):
                    follower.follow(leaf, frozenset({(layer, i)}))


def model_inputs(model: nn.Module, ids_BL: Tensor) -> dict[str, Any]:
    """Keyword arguments for a model's forward on windows of tokens.

    What has a decoder of its own gets the same windows there, shifted right behind the token that it starts with. They are
    not shifted where there is no such token, or where the model refines all tokens in place.
    """
    inputs: dict[str, Any] = {"input_ids": ids_BL, "use_cache": False}
    if has_decoder(model):
        start = None if denoises(model) else decoder_start(model)
        first_B1 = ids_BL[:, :1] if start is None else torch.full_like(ids_BL[:, :1], start)
        inputs["decoder_input_ids"] = ids_BL if start is None else torch.cat([first_B1, ids_BL[:, :-1]], dim=1)
    return inputs


def has_decoder(model: nn.Module) -> bool:
    """Whether a model reads tokens twice: those that it is given, and those that it writes."""
    return "decoder_input_ids" in inspect.signature(model.forward).parameters


def denoises(model: nn.Module) -> bool:
    """Whether a model reads a whole canvas of tokens to write that canvas again, each token at its own place."""
    return getattr(getattr(model, "config", None), "canvas_length", None) is not None


def decoder_start(model: nn.Module) -> int | None:
    """The token that stands before all that a decoder writes: its own, else padding, else the start of text."""
    config: Any = getattr(model, "config", None)
    names = ("decoder_start_token_id", "pad_token_id", "bos_token_id")
    found = (getattr(config, name, None) for name in names)
    return next((token for token in found if isinstance(token, int) and token >= 0), None)


def pass_through(
    arguments: LayerArguments,
    module: nn.Module,
    experts: Mapping[str, nn.Module],
    batches: Iterator[tuple[Tensor, Passed]],
    *,
    advance: bool = True,
) -> Iterator[tuple[Passed, Tensor]]:
    """Runs batches through the next layer.

    Args:
        module: the layer.
        experts: stand-ins for experts modules, by path inside the layer; in place only while a batch runs.
        batches: token ids, and what the layers before gave for them.
        advance: whether anything comes after; otherwise what this layer gives is not kept.

    Yields:
        what all layers up to this one gave, as far as it is needed, on the CPU; and the squared norms [B*L] of the
        residual stream after the layer, float32 on the CPU. It is empty where the model does not call the layer.

    Raises:
        ModelError: the layer does not return hidden states of every token.
    """
    needed: set[Slot] | None = None
    for ids_BL, passed in batches:
        with in_place(module, experts):
            given = arguments.call(module, ids_BL, passed)
        energy_T = torch.zeros(0) if given is None else _energy(given, ids_BL.numel())
        if not advance:
            yield passed, energy_T
            continue
        passed = (*passed, given)
        needed = arguments.needed(ids_BL, passed) if needed is None else needed
        yield resting(passed, needed), energy_T


def hidden_after(
    arguments: LayerArguments, module: nn.Module, experts: Mapping[str, nn.Module], ids_BL: Tensor, passed: Passed
) -> Tensor:
    """[B*L,S,H]: the residual stream after the next layer, of S streams where it carries several side by side.

    Args and raises: as `pass_through`; the model calls the layer.
    """
    with in_place(module, experts):
        given = arguments.call(module, ids_BL, passed)
    assert given is not None
    return _hidden(given, ids_BL.numel())


@contextmanager
def in_place(module: nn.Module, experts: Mapping[str, nn.Module]) -> Iterator[None]:
    """The layer with stand-ins for its experts."""
    originals = {path: module.get_submodule(path) for path in experts}
    with ExitStack() as stack:
        for path, stand_in in experts.items():
            stack.callback(set_submodule, module, path, originals[path])
            set_submodule(module, path, stand_in)
            if isinstance(stand_in, ObservedList):
                stack.enter_context(stand_in.watching(module.get_submodule(path.rpartition(".")[0])))
        yield


def _hidden(given: Given, tokens: int) -> Tensor:
    """[T,S,H]: hidden states of each token in each stream, the first thing that a layer returns."""
    hidden = next((leaf for leaf in leaves(given.returned) if isinstance(leaf, Tensor)), None)
    rows = 0 if hidden is None or not hidden.dim() else hidden.numel() // hidden.shape[-1]
    if hidden is None or not hidden.is_floating_point() or not rows or rows % tokens:
        found = "nothing" if hidden is None else f"a tensor of shape {tuple(hidden.shape)}"
        raise ModelError(f"A layer returns {found} for {tokens} tokens.", why="These are no hidden states.", remedy=REMEDY)
    return hidden.reshape(tokens, -1, hidden.shape[-1])


def _energy(given: Given, tokens: int) -> Tensor:
    """[T] float32 on the CPU: |h|^2 of each token, the mean over streams where a layer carries several side by side."""
    energy_T = _hidden(given, tokens).float().square().sum(-1).mean(1).cpu()
    if not energy_T.isfinite().all():
        raise ModelError(
            "A layer returns NaN or infinite hidden states for calibration tokens.",
            why="Its weights are damaged, or the model does not work in the type it is computed in.",
            remedy="Fetch the checkpoint again.",
        )
    return energy_T


def set_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    """Replaces the submodule at `path`."""
    parent, _, leaf = path.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)
