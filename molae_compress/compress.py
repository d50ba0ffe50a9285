"""The compression itself: calibrate a layer, extract its bases, refit its experts, go on to the next.

`run` works on a checkpoint, one layer in memory at a time, and resumes after the last finished layer; `compress_` works
on a model in memory. Both are the same loop, `solve_layers`; a budget that water-fills over layers needs a pass before
it, `observe_layers`, to measure how the error of every layer falls with rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor

from molae_compress.budget import Shapes, shapes_for, with_keep
from molae_compress.calibration.observed import RoutedTokens
from molae_compress.calibration.text import set_aside
from molae_compress.checkpoint import WorkDirectory
from molae_compress.effect import Effect, LatentRun
from molae_compress.ranks import has_clusters, template, tries_pairs
from molae_compress.recipe import Recipe
from molae_compress.solver.distill import distil
from molae_compress.solver.layer import LayerError, solve_layer
from molae_compress.solver.population import Calibrated, Uninformed
from molae_compress.solver.spectra import Fit, LayerSpectra, measure_spectra
from molae_compress.source import Source, chosen
from molae_compress.spectral import comparable
from molae_compress.stream import STAGE as HIDDEN
from molae_compress.stream import HeldOut, ResidualStream, StandIn, observed, return_memory, stand_in
from molae_compress.tensors import AnyShape, DenseExperts, ExpertsSpec

Progress = Callable[[str, int, int], None]
OBSERVE, SOLVE = "observe", "solve"
_MOST = 0.99  # of its parameters, that a compressed model may keep
_NEWTON = 8  # conjugate gradients: most of what many would find
# Of what an expert counts, that of the average one: for text that is routed otherwise, the more where the model writes none.
_EVEN = {True: 0.2, False: 0.45}


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def _routed(population: Calibrated | Uninformed, held_out: Calibrated | None) -> list[int]:
    """Calibration tokens routed to each expert, those that only measure included."""
    if not isinstance(population, Calibrated):
        return [0] * population.num_experts
    both = population.counts_E if held_out is None else population.counts_E + held_out.counts_E
    return [int(count) for count in both]


@dataclass(frozen=True)
class Solved:
    """One finished experts module: its tensors by name, what they were fitted on, and how well they fit.

    Attributes:
        error: measured on held-out calibration tokens; None if there are none.
        tokens_per_expert: calibration tokens routed to each expert; empty without calibration.
        seconds: time of the fit.
        unhealed: the error of the closed form, where training followed it.
    """

    tensors: dict[str, Tensor]
    error: LayerError | None
    tokens_per_expert: list[int]
    seconds: float
    unhealed: LayerError | None = None


@dataclass(frozen=True)
class Turn:
    """One experts module while its layer is at hand.

    Attributes:
        spec: the module.
        dense: its weights.
        population: what is known of its inputs, for the fit.
        held_out: the tokens that only measure; None without any.
        effect: what changes of the module do to its layer; None if it sees no tokens.
    """

    spec: ExpertsSpec
    dense: DenseExperts
    population: Calibrated | Uninformed
    held_out: Calibrated | None = None
    effect: Effect | None = None


Visit = Callable[[Turn], None]


@dataclass
class Run:
    """What one compression works with, and the loops over layers.

    Attributes:
        recipe: what to do.
        source: the dense model.
        windows_NL: calibration token ids, or None to fit without data.
        written, unwritten: which windows the model writes itself (`generation`), and whether it has yet to.
        notes: what a reader of the report should know of them.
        work: where finished layers go, or None to keep them in memory.
        memory_limit: bytes of calibration activations that may stay in memory; None is no limit.
        progress: told after every layer.
    """

    recipe: Recipe
    source: Source
    windows_NL: Tensor | None
    written: range = range(0)
    unwritten: bool = False
    notes: tuple[str, ...] = ()
    work: WorkDirectory | None = None
    memory_limit: int | None = None
    progress: Progress = silent
    finished: dict[str, Solved] = field(default_factory=dict)

    @cached_property
    def specs(self) -> list[ExpertsSpec]:
        """The modules to compress, in the order of layers."""
        return chosen(self.source.specs, self.recipe)

    @cached_property
    def fit(self) -> Fit:
        """The solver's options."""
        basis, refit = self.recipe.basis, self.recipe.refit
        closed = not refit.cores or basis.metric == "input"
        newton = (0 if closed else _NEWTON) if refit.newton == "auto" else refit.newton
        return Fit(metric=basis.metric, output=basis.output, cores=refit.cores, down=refit.down, newton=newton)

    def dtype(self, spec: ExpertsSpec) -> torch.dtype:
        """Type of a module's latent tensors."""
        asked = self.recipe.output.dtype
        return self.source.dtype(spec) if asked == "auto" else getattr(torch, asked)

    def needs_spectra(self) -> bool:
        """Whether ranks follow from measured spectra, so that all layers are looked at before any is solved."""
        budget = self.recipe.budget
        return budget.max_kl is not None or (budget.rank is None and budget.allocate == "spectrum")

    def shapes(self, copied_bytes: int = 0) -> Shapes:
        """Ranks of all modules under the budget; measures spectra first if the recipe asks for it.

        Those of `budget.max_kl` follow from a prediction: see `probes.final_shapes`.
        """
        assert self.recipe.budget.max_kl is None
        return self.shapes_by(self.observe_layers() if self.needs_spectra() else None, copied_bytes)

    def expected_shapes(self, copied_bytes: int = 0) -> Shapes:
        """Shapes known before anything is measured: final ones, or those of a uniform budget, the largest for `max_kl`."""
        return self.shapes_by(None, copied_bytes)

    def largest_share(self) -> float:
        """Share of the parameters that a compressed model may keep and be smaller, also in a wider type."""
        latent = sum(spec.dense_numel * self.dtype(spec).itemsize for spec in self.specs)
        return _MOST * min(1.0, sum(self.source.expert_bytes(spec) for spec in self.specs) / latent)

    def shapes_by(self, spectra: Mapping[str, LayerSpectra] | None, copied_bytes: int = 0) -> Shapes:
        """Ranks of all modules under the budget, by these spectra if the recipe goes by any."""
        searched = self.recipe.budget.max_kl is not None
        return shapes_for(
            with_keep(self.recipe, self.largest_share()) if searched else self.recipe,
            self.specs,
            dtypes={spec.name: self.dtype(spec) for spec in self.specs},
            dense_bytes={spec.name: self.source.expert_bytes(spec) for spec in self.specs},
            copied_bytes=copied_bytes,
            spectra=spectra,
        )

    def observe_layers(self) -> dict[str, LayerSpectra]:
        """First pass: how the error of every layer and side falls with rank."""
        spectra: dict[str, LayerSpectra] = {}
        unseen: set[str] = set()
        for name in self.work.done(OBSERVE) if self.work is not None else ():
            assert self.work is not None
            tensors, info = self.work.load(OBSERVE, name)
            unseen |= {name} if info["unseen"] else set()
            spectra[name] = LayerSpectra.of_tensors(tensors)

        def observe(turn: Turn) -> None:
            spec = turn.spec
            pairs, output_pairs = tries_pairs(self.recipe, spec)
            found = measure_spectra(
                turn.dense,
                turn.population,
                template(self.recipe, spec),
                self.fit,
                cluster=has_clusters(self.recipe),
                pairs=pairs,
                output_pairs=output_pairs,
            )
            found = found.scaled(turn.effect.gain() if turn.effect is not None else 1.0).on_cpu()
            spectra[spec.name] = found
            unseen.update({spec.name} if isinstance(turn.population, Uninformed) else ())
            if self.work is not None:
                self.work.commit(OBSERVE, spec.name, found.tensors(), {"unseen": spec.name in unseen})
            self.progress(OBSERVE, len(spectra), len(self.specs))

        self.progress(OBSERVE, len(spectra), len(self.specs))
        self.each_layer(OBSERVE, set(spectra), observe)
        return comparable(spectra, unseen)

    def solve_layers(self, shapes: Shapes) -> None:
        """Second pass: bases, then cores, layer by layer; finished modules go to the work directory or to `finished`."""
        return_memory()  # that of the spectra, and of what chose the ranks
        latent = {name: shape for name, shape in shapes.items() if shape is not None}
        done = set(self.work.done(SOLVE)) & set(latent) if self.work is not None else set()
        idle = {spec.name for spec in self.specs if spec.name not in latent}

        def solve(turn: Turn) -> None:
            spec = turn.spec
            started, shape = time.monotonic(), latent[spec.name]
            tensors, error, unhealed = self.fitted(turn, shape)
            counts = _routed(turn.population, turn.held_out) if self.windows_NL is not None else []
            tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
            self._finish(spec, Solved(tensors, error, counts, time.monotonic() - started, unhealed))
            done.add(spec.name)
            self.progress(SOLVE, len(done), len(latent))

        self.progress(SOLVE, len(done), len(latent))
        self.each_layer(SOLVE, done | idle, solve, latent)

    def fitted(self, turn: Turn, shape: AnyShape) -> tuple[dict[str, Tensor], LayerError | None, LayerError | None]:
        """Latent tensors of a module, their error on held-out tokens, and that of the closed form if training followed."""
        tensors = solve_layer(turn.dense, turn.population, shape, self.fit, self.dtype(turn.spec))
        effect = turn.effect if turn.held_out is not None else None
        unhealed = None
        if self.recipe.heal.block_steps and isinstance(turn.population, Calibrated):
            unhealed = effect.error(tensors, shape) if effect is not None else None
            tensors = distil(turn.dense, turn.population, shape, tensors, self.recipe.heal.block_steps).tensors
        return tensors, effect.error(tensors, shape) if effect is not None else None, unhealed

    def solved(self, spec: ExpertsSpec, *, tensors: bool = True) -> Solved:
        """A finished module, from the work directory or from memory."""
        if self.work is None:
            return self.finished[spec.name]
        stored, info = self.work.load(SOLVE, spec.name)
        error, unhealed = (LayerError(**info[key]) if info[key] is not None else None for key in ("error", "unhealed"))
        return Solved(stored if tensors else {}, error, info["tokens_per_expert"], info["seconds"], unhealed)

    def _finish(self, spec: ExpertsSpec, solved: Solved) -> None:
        if self.work is None:
            self.finished[spec.name] = solved
            return
        info = {
            "error": vars(solved.error) if solved.error is not None else None,
            "tokens_per_expert": solved.tokens_per_expert,
            "seconds": solved.seconds,
            "unhealed": vars(solved.unhealed) if solved.unhealed is not None else None,
        }
        self.work.commit(SOLVE, spec.name, solved.tensors, info)

    def each_layer(
        self, stage: str, done: set[str], visit: Visit, latent: Mapping[str, AnyShape] = MappingProxyType({})
    ) -> None:
        """Visits every module not yet done with its weights, what it saw of the fitted tokens, and of the held-out ones.

        The tokens go on through the dense layer, or, in the solving pass of a sequential recipe, through the layer as
        compressed in the meantime, in the shapes `latent`. Nothing of a layer outlives its turn.
        """
        pending = [spec for spec in self.specs if spec.name not in done]
        if self.windows_NL is None:
            for spec in pending:
                uninformed = Uninformed(spec.num_experts, spec.hidden, self.source.device)
                visit(Turn(spec, self.source.dense(spec), uninformed))
            return
        if not pending:
            return
        assert self.recipe.calibration is not None
        assert not self.unwritten
        stream = ResidualStream(
            self.source,
            self.windows_NL,
            self.recipe.calibration.batch_size,
            work=self.work,
            name=stage,
            memory_limit=self.memory_limit,
        )
        numbers = {spec.name: self.source.layers.of(spec.name) for spec in pending}
        last = max(numbers.values())
        with self.source.ends(head=False), torch.no_grad():
            stream.start(min(numbers.values()))
            for layer in range(stream.layer, last + 1):
                here = [spec for spec in pending if numbers[spec.name] == layer]
                self._one_layer(stream, here, latent, visit, stage, goes_on=layer < last)
                stream.forget(layer)
                return_memory()
        if self.work is not None:
            self.work.discard(HIDDEN)

    def _one_layer(
        self,
        stream: ResidualStream,
        pending: Sequence[ExpertsSpec],
        latent: Mapping[str, AnyShape],
        visit: Visit,
        stage: str,
        *,
        goes_on: bool,
    ) -> None:
        """Sends the tokens through one layer and visits its pending modules."""
        layer = stream.layer
        here = [spec for spec in self.source.specs if self.source.layers.of(spec.name) == layer]
        sequential = self.recipe.refit.sequential and stage == SOLVE
        recorders = {spec.name: stream.recorder(spec) for spec in pending}
        experts = observed(self.source, here, recorders)
        held_out = stream.held_out(self._windows_held_out)
        with self.source.layer(layer) as module:
            past = self._compressed(experts, latent) if sequential and not pending else experts
            seen = stream.step(module, past, recorders, advance=goes_on and not (sequential and pending))
        self._visit(pending, experts, seen, held_out, visit)
        del held_out
        if goes_on and sequential and pending:
            with self.source.layer(layer) as module:
                stream.step(module, self._compressed(experts, latent), {})

    def _compressed(self, experts: Mapping[str, StandIn], latent: Mapping[str, AnyShape]) -> dict[str, StandIn]:
        """Stand-ins for the modules of a layer, those that are finished in their latent form."""
        past = dict(experts)
        for spec in (spec for spec in self.specs if spec.name in latent and spec.name in experts):
            finished = LatentRun.of(experts[spec.name].dense, self.solved(spec).tensors, latent[spec.name])
            past[spec.name] = stand_in(self.source, spec, finished)
        return past

    def _visit(
        self,
        pending: Sequence[ExpertsSpec],
        experts: Mapping[str, StandIn],
        seen: dict[str, RoutedTokens | None],
        held_out: HeldOut,
        visit: Visit,
    ) -> None:
        """Visits modules of one layer; all its `experts` are stand-ins for dense ones."""
        dense = {name: experts[name].dense for name in experts}
        for spec in pending:
            population, measuring = self._split(seen.pop(spec.name), spec)
            effect = None
            if isinstance(population, Calibrated):
                # of a single window, what is fitted on can still tell what the layer makes of errors
                effect = Effect(self.source, held_out, spec, dense, population if measuring is None else measuring)
            visit(Turn(spec, dense[spec.name], population, measuring, effect))

    @property
    def generated(self) -> int:
        """Windows that the model writes itself."""
        return len(self.written)

    @property
    def fitted_NL(self) -> Tensor:
        """The windows that are fitted on, all of a single one."""
        assert self.windows_NL is not None
        return self.windows_NL[: -self._windows_held_out] if len(self.windows_NL) > 1 else self.windows_NL

    @property
    def held_out_NL(self) -> Tensor:
        """The windows that only measure."""
        assert self.windows_NL is not None
        return self.windows_NL[-self._windows_held_out :]

    @property
    def _windows_held_out(self) -> int:
        """How many windows, the last ones, only measure: of the text, if it has several."""
        assert self.windows_NL is not None
        text = len(self.windows_NL) - self.generated
        return set_aside(text if text > 1 else len(self.windows_NL))

    def _split(self, seen: RoutedTokens | None, spec: ExpertsSpec) -> tuple[Calibrated | Uninformed, Calibrated | None]:
        """What is fitted on, and the last windows, which only measure; a single window is fitted on, and nothing measured.

        A module that the model does not call for these tokens (the experts of another modality) is fitted without data.
        """
        if seen is None:
            return Uninformed(spec.num_experts, spec.hidden, self.source.device), None
        assert self.windows_NL is not None
        assert self.recipe.calibration is not None
        weighting, shrinkage = self.recipe.calibration.weighting, self.recipe.refit.shrinkage
        windows = len(self.windows_NL)
        rows = len(seen.x_TH) // windows  # of a window; more than its tokens where one has several
        kept, even = (windows - self._windows_held_out) * rows, _EVEN[self.recipe.calibration.writes]
        # a token of hardly any residual stream would outweigh all others
        weight_T = 1.0 / seen.energy_T.clamp_min(1e-6 * float(seen.energy_T.mean()))

        def part(rows: slice) -> Calibrated:
            return Calibrated(
                seen.x_TH[rows],
                seen.index_TK[rows],
                seen.gate_TK[rows],
                weight_T[rows],
                spec.num_experts,
                weighting,
                shrinkage,
                self.source.device,
                even,
            )

        return (part(slice(kept)), part(slice(kept, None))) if windows > 1 else (part(slice(None)), None)
