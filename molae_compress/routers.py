"""Routers trained on the predictions of the whole compressed model, one layer of which is in memory at a time.

Only routers change; all experts stay as they were solved.
Shape suffixes: N windows, B windows of one batch, L tokens of one window, V vocabulary; the rest as in `tensors`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from molae_compress.backward import Experts, Kept, StreamedModel
from molae_compress.budget import Shapes
from molae_compress.calibration.replay import Passed, of_window
from molae_compress.calibration.walk import LayerArguments
from molae_compress.compress import Run
from molae_compress.effect import LatentRun
from molae_compress.errors import DataError, ModelError
from molae_compress.evaluation import check_predicts
from molae_compress.layouts import weight_names
from molae_compress.layouts.lists import router_parameters
from molae_compress.solver.distill import Moving, schedule
from molae_compress.source import DiskSource, Source
from molae_compress.stream import STAGE as HIDDEN
from molae_compress.stream import StandIn, forwarded, stand_in
from molae_compress.tensors import DenseExperts, ExpertsSpec

STAGE = "routers"  # of the work directory
_ASIDE, _LEAST_ASIDE = 8, 2  # one fitted window in this many, and so many at least, decide which state is kept
# Step of a number at the height of the schedule, relative to the root mean square of its tensor, for a start that is one nat
# per token away from the original.
_RATE = 0.01
_MEASUREMENTS = 4
_PROBE_TOKENS = 32
_REMEDY = "Leave `heal.router_steps` out of the recipe."


@dataclass(frozen=True)
class Trained:
    """Routers as they are to be written.

    Attributes:
        tensors: by full name, in the types they are stored in; empty if no state was better than the start.
        before, after: mean KL divergence from the original on the windows set aside.
    """

    tensors: dict[str, Tensor]
    before: float
    after: float


def routers_of(source: Source, specs: Sequence[ExpertsSpec]) -> dict[str, str]:
    """Full names of the parameters of the routers of some experts modules, and the module of each.

    Raises:
        ModelError: a module has none that is found.
    """
    found: dict[str, str] = {}
    for spec in specs:
        above, _, leaf = spec.name.rpartition(".")
        weights = [name.removeprefix(f"{above}.") for name in weight_names(source.model, spec.name)]
        own = router_parameters(source.model.get_submodule(above), leaf, spec.num_experts, weights)
        if not own:
            raise ModelError(
                f"No router was found beside the experts '{spec.name}'.",
                why="There is no parameter there that makes one logit for each expert.",
                remedy=_REMEDY,
            )
        found |= {f"{above}.{name}": spec.name for name in own}
    return found


def stored(source: Source, name: str) -> Tensor:
    """One parameter, in the precision it is stored in."""
    if isinstance(source, DiskSource):
        return source.keys.materialise(name, source.checkpoint.read)[name]
    return source.model.get_parameter(name).detach()


def trainable_routers(source: Source, specs: Sequence[ExpertsSpec]) -> tuple[str, ...]:
    """Full names of the routers' parameters that predictions depend on, found by a backward pass of a few tokens.

    Experts give multiples of what they read there, so that no weight of theirs is read.

    Raises:
        ModelError: a module has no router that is found, or none that a gradient reaches though it sees text; or the model
            predicts nothing.
    """
    try:
        check_predicts(source.model)
    except ModelError as error:
        raise ModelError(error.what, why=error.why, remedy=_REMEDY) from error
    owners = routers_of(source, specs)

    multiples = {spec.name: _Multiples.of(source, spec) for spec in source.specs}

    def experts(layer: int) -> dict[str, StandIn]:
        here = [spec for spec in source.specs if source.layers.of(spec.name) == layer]
        return {spec.name: stand_in(source, spec, multiples[spec.name]) for spec in here}

    ids_1L = (torch.arange(_PROBE_TOKENS) * 7919 + 17).remainder(_vocabulary(source))[None]
    model = StreamedModel(source, experts, {name: stored(source, name).float() for name in owners})
    kept = Kept(None, None)
    try:
        with source.ends(head=True):
            (passed,) = model.forward([ids_1L], keep=kept)
            _, gradients = model.loss(ids_1L, passed, lambda logits_1LV, _: logits_1LV.float().square().mean(), train=True)
            found = model.backward([ids_1L], kept, [gradients])
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ModelError(
            f"{type(source.model).__name__} cannot be differentiated layer by layer.",
            why=f"torch says: {str(error).splitlines()[0].rstrip('.')}.",
            remedy=_REMEDY,
        ) from error
    reached = tuple(name for name, gradient in found.items() if gradient.any() and gradient.isfinite().all())
    for spec in specs:
        if multiples[spec.name].used and not any(owners[name] == spec.name for name in reached):
            raise ModelError(
                f"No gradient reaches the router of '{spec.name}'.",
                why="The model computes its routing without gradient, or routing weights there do not depend on it.",
                remedy=_REMEDY,
            )
    return reached


def check_windows(run: Run) -> None:
    """Raises `DataError` unless there are windows to train on besides those that only measure."""
    if run.windows_NL is not None and len(run.fitted_NL) <= _LEAST_ASIDE:
        raise DataError(
            f"`heal.router_steps` needs four calibration windows, and there are {len(run.windows_NL)}.",
            why="One is held out to measure errors, and two decide whether the routers got better.",
            remedy="Give more text, or shorter windows (`calibration.sequence_length`).",
        )


def heal_routers(run: Run, shapes: Shapes, names: Sequence[str]) -> Trained:
    """Trains routers towards the original's predictions; all modules of the run are solved.

    Args:
        run: with calibration windows; the last ones of those fitted on only measure here.
        shapes: of its modules.
        names: of the routers' parameters, as `trainable_routers` finds them.

    Returns:
        the routers of the lowest KL divergence on the windows set aside, rounded to the types they are stored in.
    """
    if run.work is not None and STAGE in run.work.done(STAGE):
        tensors, info = run.work.load(STAGE, STAGE)
        return Trained(tensors, info["before"], info["after"])
    if run.work is not None:
        run.work.discard(HIDDEN)
    with run.source.ends(head=True):
        trained = _train(run, _compressed(run, shapes), {name: stored(run.source, name).cpu() for name in names})
    if run.work is not None:
        run.work.discard(HIDDEN)
        run.work.commit(STAGE, STAGE, trained.tensors, {"before": trained.before, "after": trained.after})
    return trained


def _train(run: Run, experts: Experts, original: Mapping[str, Tensor]) -> Trained:
    assert run.recipe.calibration is not None
    source, steps = run.source, run.recipe.heal.router_steps
    room = run.memory_limit // 2 if run.memory_limit is not None else None
    aside = max(_LEAST_ASIDE, len(run.fitted_NL) // _ASIDE)
    size = run.recipe.calibration.batch_size
    batches, measuring = (part.split(size) for part in (run.fitted_NL[:-aside], run.fitted_NL[-aside:]))
    order = _order(len(batches), steps)
    used = sorted(set(order))
    every = [*(batches[batch] for batch in used), *measuring]
    stages = len(source.layers) + steps
    run.progress(STAGE, 0, stages)
    with torch.no_grad():
        arguments = LayerArguments(source.model, source.layers.paths, source.device)
        exact = forwarded(source, arguments, every, lambda done: run.progress(STAGE, done, stages))
    values = {name: tensor.to(torch.float32, copy=True) for name, tensor in original.items()}
    model = StreamedModel(source, experts, values)
    moving = {name: Moving(tensor, torch.zeros_like(tensor)) for name, tensor in values.items()}
    divergence = {id(ids_BL): _Divergence(arguments, ids_BL, passed) for ids_BL, passed in zip(every, exact, strict=True)}

    def measured(candidate: Mapping[str, Tensor]) -> Tensor:
        """[N]: mean divergence in each window."""
        compressed = replace(model, routers=candidate)
        found = zip(measuring, compressed.forward(measuring), strict=True)
        sums = [torch.tensor(compressed.loss(ids, passed, divergence[id(ids)], train=False)[0]) for ids, passed in found]
        return torch.cat(sums) / run.fitted_NL.shape[1]

    best: dict[str, Tensor] = {}
    start_N = measured(original)
    before = after = float(start_N.mean())
    for step, batch in enumerate(order, start=1):
        if before <= 0:  # nothing but rounding
            break
        ids_BL, kept = batches[batch], Kept(run.work, room)
        (passed,) = model.forward([ids_BL], keep=kept)
        _, gradients = model.loss(ids_BL, passed, divergence[id(ids_BL)], train=True)
        for name, gradient in model.backward([ids_BL], kept, [gradients]).items():
            moving[name].gradient.copy_(gradient)
            moving[name].step_(step, _RATE * before**0.5 * schedule(step, steps))
        candidate = {name: tensor.to(original[name].dtype, copy=True) for name, tensor in values.items()}
        if not all(tensor.isfinite().all() for tensor in candidate.values()):
            break
        if step == steps or step % max(1, steps // _MEASUREMENTS) == 0:
            found_N = measured(candidate)
            if float(found_N.mean()) < after and _is_better(found_N - start_N):
                best, after = candidate, float(found_N.mean())
        run.progress(STAGE, len(source.layers) + step, stages)
    return Trained(best, before, after)


def _is_better(change_N: Tensor) -> bool:
    """Whether windows improve by more than chance: by twice the standard error of their mean.

    A step of a router sends tokens to other experts, for better or worse, so that most of a small change is chance.
    """
    return bool(change_N.mean() + 2 * change_N.std() / len(change_N) ** 0.5 < 0)


def _order(batches: int, steps: int) -> list[int]:
    """The batch of every step: all of them in an order of chance, then again in another."""
    generator, order = torch.Generator().manual_seed(0), list[int]()
    while len(order) < steps:
        order += torch.randperm(batches, generator=generator).tolist()
    return order[:steps]


@dataclass(frozen=True)
class _Divergence:
    """KL divergence from the original's predictions, summed over the tokens of a window.

    Of the original the hidden states after its last layer are kept; its head makes the logits of them again, all of them,
    in less memory than the largest few of a window would take.
    """

    arguments: LayerArguments
    ids_BL: Tensor
    passed: Passed

    def __call__(self, logits_1LV: Tensor, window: int) -> Tensor:
        with torch.no_grad():
            passed = of_window(self.passed, window, len(self.ids_BL))
            exact_1LV = self.arguments.logits(self.ids_BL[window, None], passed).float().log_softmax(-1)
        return (exact_1LV.exp() * (exact_1LV - logits_1LV.float().log_softmax(-1))).sum()


def _compressed(run: Run, shapes: Shapes) -> Experts:
    """The experts of a layer as they were solved."""
    bare: dict[str, DenseExperts] = {}

    def one(spec: ExpertsSpec) -> DenseExperts:
        shape = shapes.get(spec.name)
        if shape is None:
            return run.source.dense(spec)
        if spec.name not in bare:
            bare[spec.name] = _without_weights(run.source.dense(spec))
        return LatentRun.of(bare[spec.name], run.solved(spec).tensors, shape)

    def experts(layer: int) -> dict[str, StandIn]:
        here = [spec for spec in run.source.specs if run.source.layers.of(spec.name) == layer]
        return {spec.name: stand_in(run.source, spec, one(spec)) for spec in here}

    return experts


def _without_weights(dense: DenseExperts) -> DenseExperts:
    """What is left of experts for their latent form: activation, biases, device."""
    nothing = dense.w_in_EJH.new_empty(0)
    bias_in_EJ = None if dense.bias_in_EJ is None else dense.bias_in_EJ.clone()
    bias_out_EH = None if dense.bias_out_EH is None else dense.bias_out_EH.clone()
    return replace(dense, w_in_EJH=nothing, w_out_EHI=nothing, bias_in_EJ=bias_in_EJ, bias_out_EH=bias_out_EH)


@dataclass
class _Multiples(DenseExperts):
    """Experts that give a multiple each of what they read; `used` tells whether a token was sent to any."""

    used: bool = False

    @classmethod
    def of(cls, source: Source, spec: ExpertsSpec) -> _Multiples:
        nothing = torch.empty(0, device=source.device)
        return cls(spec, nothing, nothing, lambda h_NJ: h_NJ)

    def intermediate(self, expert: int, x_NH: Tensor) -> Tensor:
        """See `DenseExperts`."""
        self.used = True
        return x_NH * (0.5 + expert / self.spec.num_experts)

    def output(self, expert: int, z_NI: Tensor) -> Tensor:
        """See `DenseExperts`."""
        return z_NI


def _vocabulary(source: Source) -> int:
    embedding: Any = source.model.get_input_embeddings()
    return int(embedding.weight.shape[0])
