"""Probes: what a few budgets really do to a model, measured on the way through its layers; and what follows from it.

Every module is solved as a run would solve it, its err_h is measured, and the held-out windows go on through the layer: as
it is, and as compressed at each budget. Their logits at the end give what the errors of all layers do to predictions. One
layer and its latent tensors are in memory at a time; the windows between two layers lie in the work directory.
Shape suffixes: N windows, B windows of one batch, L tokens; the rest as in `tensors`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from molae_compress.budget import Shapes, with_keep
from molae_compress.calibration.replay import Passed, of_window, packed, unpacked
from molae_compress.calibration.walk import LayerArguments, pass_through
from molae_compress.compress import Run, Turn
from molae_compress.effect import LatentRun
from molae_compress.errors import DataError, ModelError, RecipeError
from molae_compress.evaluation import check_predicts, compared, predicted
from molae_compress.planning import Plan
from molae_compress.prediction import Choice, Forecast, Prediction, Probe, spectral_error
from molae_compress.ranks import has_clusters, template
from molae_compress.solver.spectra import LayerSpectra
from molae_compress.stream import stand_in
from molae_compress.summary import plan_of
from molae_compress.tensors import DenseExperts, ExpertsSpec

STAGE = "probe"  # of the work directory
# Wide apart, for a line between two of them; the first also shows what rounding and other text leave at the highest ranks.
BUDGETS = (0.9, 0.7, 0.5)
KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # of the table of a measured plan
_REMEDY = "Use another budget than `max_kl`, such as `keep`, and `plan` without `--measured`."
_END = "end"  # item with the figures of the whole model
_STEPS = 12  # of a bisection over shares


def unpredictable(run: Run) -> str | None:
    """Why nothing can be predicted for a run, as a sentence; None if it can.

    Known before a weight is read, once the calibration windows are.
    """
    if run.windows_NL is None:
        return "There is no calibration text to measure on."
    if len(run.windows_NL) < 2:
        return "There is one calibration window, which is fitted on, and none to measure on."
    try:
        check_predicts(run.source.model)
    except ModelError as error:
        return f"{error.what} {error.why}"
    if run.recipe.budget.rank is not None and has_clusters(run.recipe) and any(_has_parts(run, spec) for spec in run.specs):
        return "With a given rank, neighbouring experts share a basis; errors are known of experts that are alike."
    if any(shapes is None for shapes in _probed_shapes(run, None)):
        return f"The lowest ranks need more than {min(BUDGETS):.0%} of the parameters, so there is nothing to compare with."
    return None


def _has_parts(run: Run, spec: ExpertsSpec) -> bool:
    """Whether experts of a module share bases, but not all of them one."""
    shape = template(run.recipe, spec)
    return any(1 < size < spec.num_experts for size in (shape.input_group, shape.output_group))


def check_max_kl(run: Run) -> None:
    """Raises `DataError` if the recipe sets `budget.max_kl` and nothing can be predicted."""
    limit = run.recipe.budget.max_kl
    reason = unpredictable(run) if limit is not None else None
    if reason is not None:
        raise DataError(f"`budget.max_kl: {limit}` cannot be met.", why=reason, remedy=_REMEDY)


def final_shapes(run: Run, copied_bytes: int = 0) -> tuple[Shapes, Prediction | None]:
    """Ranks of all modules, and their quality where it can be predicted without more work.

    That is: with `budget.max_kl`, which needs the prediction, or where the work directory holds probes already.

    Raises:
        RecipeError: the largest model considered is not predicted to satisfy `budget.max_kl`.
    """
    if not run.needs_spectra():
        return run.shapes(copied_bytes), None
    spectra = run.observe_layers()
    if run.recipe.budget.max_kl is not None:
        return smallest(run, spectra, forecast(run, spectra))
    shapes = run.shapes_by(spectra, copied_bytes)
    probed = run.work is not None and _END in run.work.done(STAGE)
    return shapes, forecast(run, spectra).of(shapes) if probed else None


def forecast(run: Run, spectra: Mapping[str, LayerSpectra]) -> Forecast:
    """What predicts the quality of any budget: probes that the work directory holds, or new ones."""
    probing = Probing(run, spectra)
    probing.measure()
    found = []
    for number, shapes in enumerate(probing.shapes):
        spectral = {spec.name: spectral_error(run.recipe, spec, spectra[spec.name], shapes[spec.name]) for spec in run.specs}
        err_h = {name: errors[number] for name, errors in probing.errors.items()}
        found.append(Probe(spectral, err_h, probing.kl[number], probing.log_perplexity[number]))
    return Forecast(run.recipe, run.specs, spectra, found)


def smallest(run: Run, spectra: Mapping[str, LayerSpectra], found: Forecast) -> tuple[Shapes, Prediction]:
    """The smallest model that is predicted to satisfy `budget.max_kl`.

    Raises:
        RecipeError: the largest one is not.
    """
    limit = run.recipe.budget.max_kl
    assert limit is not None
    most = run.largest_share()

    def at(share: float) -> tuple[Shapes, Prediction] | None:
        try:
            shapes = replace(run, recipe=with_keep(run.recipe, share)).shapes_by(spectra)
        except RecipeError:  # too small for any ranks
            return None
        return shapes, found.of(shapes)

    best = at(most)
    if best is None or not best[1].kl <= limit:
        gives = f"a KL divergence of {best[1].kl:.3g}" if best is not None else "nothing"
        raise RecipeError(
            f"`budget.max_kl: {limit}` cannot be met: at a share of {most:.2f} of the parameters {gives} is predicted.",
            remedy="Raise it, or use `budget.rank: full`, which changes the form alone.",
        )
    low, high = 0.0, most
    for _ in range(_STEPS):
        share = (low + high) / 2
        tried = at(share)
        if tried is not None and tried[1].kl <= limit:
            best, high = tried, share
        else:
            low = share
    return best


def measured_plan(run: Run, copied_bytes: int, *, model: str | None) -> Plan:
    """The plan at the ranks that a run would choose, with predictions wherever there can be any."""
    check_max_kl(run)
    reason = unpredictable(run)
    spectra = run.observe_layers() if reason is None or run.needs_spectra() else {}
    found = forecast(run, spectra) if reason is None else None
    if found is not None and run.recipe.budget.max_kl is not None:
        shapes, _ = smallest(run, spectra, found)
    else:
        shapes = run.shapes_by(spectra or None, copied_bytes)
    plan = plan_of(run, shapes, model=model, measured=True)
    if found is None:
        return replace(plan, unpredictable=reason)
    return replace(plan, prediction=found.of(shapes), choices=choices(run, spectra, found))


def choices(run: Run, spectra: Mapping[str, LayerSpectra], found: Forecast) -> tuple[Choice, ...]:
    """Other budgets of the same recipe, and what they would give; those that the model cannot have are left out."""
    options = []
    for keep in KEEPS:
        asked = replace(run, recipe=with_keep(run.recipe, keep))
        try:
            shapes = asked.shapes_by(spectra)
        except RecipeError:
            continue
        plan = plan_of(asked, shapes, model=None, measured=True)
        options.append(Choice(keep, plan.parameters, plan.artifact_bytes, found.of(shapes)))
    return tuple(options)


def _probed_shapes(run: Run, spectra: Mapping[str, LayerSpectra] | None) -> list[Shapes | None]:
    """Shapes at the probes' budgets, as those of the run will be chosen; None where the lowest ranks are too large."""
    found: list[Shapes | None] = []
    for share in BUDGETS:
        try:
            found.append(replace(run, recipe=with_keep(run.recipe, share)).shapes_by(spectra))
        except RecipeError:
            found.append(None)
    return found


class Probing:
    """The probes of one run, layer by layer.

    Attributes:
        shapes: of all modules, for each probe.
        errors: err_h of a module at each probe; no entry for one that the model does not call.
        kl: of the whole model, for each probe.
        log_perplexity: increase of the mean negative log likelihood.
    """

    def __init__(self, run: Run, spectra: Mapping[str, LayerSpectra]) -> None:
        self.shapes = [shapes for shapes in _probed_shapes(run, spectra) if shapes is not None]
        assert len(self.shapes) == len(BUDGETS)
        self.errors: dict[str, list[float]] = {}
        self.kl: list[float] = []
        self.log_perplexity: list[float] = []
        self._run = run
        self._specs = {layer: [s for s in run.specs if run.source.layers.of(s.name) == layer] for layer in self._layers}
        self._windows = Carried(run, variants=1 + len(self.shapes))
        # of the layer at hand
        self._dense: dict[str, DenseExperts] = {}
        self._latent: list[dict[str, LatentRun]] = [{} for _ in self.shapes]
        self._visited: set[str] = set()

    @property
    def _layers(self) -> range:
        return range(len(self._run.source.layers.paths))

    def measure(self) -> None:
        """Measures what is not measured yet, in the order of layers."""
        run, work = self._run, self._run.work
        done = work.done(STAGE) if work is not None else set()
        finished = [layer for layer in self._layers if self._specs[layer] and _layer_item(layer) in done]
        for layer in finished:
            self._take(layer)
        if _END in done:
            assert work is not None
            _, info = work.load(STAGE, _END)
            self.kl, self.log_perplexity = info["kl"], info["log_perplexity"]
            return
        pending = [layer for layer in self._layers if self._specs[layer] and layer not in finished]
        self._windows.start(min(pending, default=len(self._layers)))
        self._progress()
        run.each_layer(STAGE, {spec.name for layer in finished for spec in self._specs[layer]}, self._visit)
        with run.source.ends(head=True), torch.no_grad():
            self._carry_to(len(self._layers))
            means = torch.stack(list(self._compared())).sum(0) / self._windows.tokens
        self.kl = means[:, 2].tolist()
        self.log_perplexity = (means[:, 0] - means[:, 1]).tolist()
        if work is not None:
            work.commit(STAGE, _END, {}, {"kl": self.kl, "log_perplexity": self.log_perplexity})
        self._windows.forget()

    def _take(self, layer: int) -> None:
        """Errors of a finished layer."""
        assert self._run.work is not None
        _, info = self._run.work.load(STAGE, _layer_item(layer))
        self.errors |= info["errors"]
        self._visited |= {spec.name for spec in self._specs[layer]}

    def _progress(self) -> None:
        self._run.progress(STAGE, len(self._visited), len(self._run.specs))

    def _visit(self, turn: Turn) -> None:
        """Solves one module at every budget; with the last one of its layer, the windows go on through it."""
        spec = turn.spec
        layer = self._run.source.layers.of(spec.name)
        self._carry_to(layer)
        self._dense |= turn.effect.layer if turn.effect is not None else {spec.name: turn.dense}
        self._visited.add(spec.name)
        complete = all(other.name in self._visited for other in self._specs[layer])
        errors = []
        for number in range(len(self.shapes)):
            if turn.effect is not None:  # else the model does not call it
                errors.append(self._tried(turn, number))
            if complete:  # one form of the experts is in memory at a time
                self._pass_on(number + 1, self._latent[number])
                self._latent[number] = {}
        self.errors |= {spec.name: errors} if errors else {}
        if complete:
            self._pass_on(0, {})
            self._finish_layer()
        self._progress()

    def _tried(self, turn: Turn, number: int) -> float:
        """Error of a module solved at one budget; 0 if it stays dense there."""
        shape = self.shapes[number][turn.spec.name]
        if shape is None:
            return 0.0
        tensors, error, _ = self._run.fitted(turn, shape)
        assert error is not None
        self._latent[number][turn.spec.name] = LatentRun.of(turn.dense, tensors, shape)
        return error.err_h

    def _carry_to(self, layer: int) -> None:
        """Sends the windows through all layers before `layer` that they have not passed; nothing in these is solved."""
        while self._windows.layer < layer:
            for variant in range(1 + len(self.shapes)):
                self._pass_on(variant, {})
            self._finish_layer()

    def _pass_on(self, variant: int, latent: Mapping[str, LatentRun]) -> None:
        """Sends the windows of one variant through the next layer, with these experts and dense ones."""
        source, here = self._run.source, self._windows.layer
        specs = [spec for spec in source.specs if source.layers.of(spec.name) == here]
        self._dense |= {spec.name: source.dense(spec) for spec in specs if spec.name not in self._dense}
        experts = {spec.name: stand_in(source, spec, latent.get(spec.name) or self._dense[spec.name]) for spec in specs}
        with source.layer(here) as module:
            self._windows.pass_on(variant, module, experts)

    def _finish_layer(self) -> None:
        """Goes on to the next layer, which all variants of the windows have reached."""
        here, work = self._windows.layer, self._run.work
        if work is not None and self._specs[here]:
            errors = {spec.name: self.errors[spec.name] for spec in self._specs[here] if spec.name in self.errors}
            work.commit(STAGE, _layer_item(here), {}, {"errors": errors})
        self._windows.layer += 1
        self._windows.forget(before=here + 1)
        self._dense = {}

    def _compared(self) -> Iterator[Tensor]:
        """For every window, one row for each probe: sums against the original, see `evaluation.compared`."""
        for ids_1L, passed in self._windows.at_end():
            try:
                original, *others = (predicted(self._windows.arguments, ids_1L, each) for each in passed)
            except ModelError as error:
                raise ModelError(error.what, why=error.why, remedy=_REMEDY) from error
            yield torch.stack([compared(other, original, ids_1L[0].to(self._run.source.device)) for other in others])


class Carried:
    """The held-out windows of a run on their way through the layers, in several variants of the model.

    What lies between two layers is in the work directory, or in memory where there is none.

    Args:
        run: whose calibration windows are split into fitted and held-out ones.
        variants: how many.
    """

    def __init__(self, run: Run, variants: int) -> None:
        assert run.recipe.calibration is not None
        held_out_NL = run.held_out_NL
        self.layer = 0
        self.tokens = held_out_NL.numel() - len(held_out_NL)  # that are predicted
        self._work = run.work
        self._ids = held_out_NL.split(run.recipe.calibration.batch_size)
        self._prefix = [f"{path}." for path in run.source.layers.paths]
        self.arguments = LayerArguments(run.source.model, run.source.layers.paths, run.source.device)
        self._variants = range(variants)
        self._kept: dict[str, Passed] = {}

    def start(self, layer: int) -> None:
        """Goes to the last layer up to `layer` before which an earlier run left all of them, or stays before the first."""
        done = self._work.done(STAGE) if self._work is not None else set()
        places = [(variant, batch) for variant in self._variants for batch in range(len(self._ids))]
        whole = (there for there in range(layer, 0, -1) if all(_windows_item(there, *place) in done for place in places))
        self.layer = next(whole, 0)

    def pass_on(self, variant: int, module: nn.Module, experts: Mapping[str, nn.Module]) -> None:
        """Sends one variant through layer `layer`, which is `module`, with stand-ins by full path."""
        prefix = self._prefix[self.layer]
        inside = {path.removeprefix(prefix): stand_in for path, stand_in in experts.items()}
        batches = ((ids_BL, self._read(variant, batch)) for batch, ids_BL in enumerate(self._ids))
        for batch, (passed, _) in enumerate(pass_through(self.arguments, module, inside, batches)):
            self._store(self.layer + 1, variant, batch, passed)

    def at_end(self) -> Iterator[tuple[Tensor, list[Passed]]]:
        """Every window [1,L], with what all layers gave for it in each variant."""
        for batch, ids_BL in enumerate(self._ids):
            passed = [self._read(variant, batch) for variant in self._variants]
            for row, ids_1L in enumerate(ids_BL.split(1)):
                yield ids_1L, [of_window(each, row, len(ids_BL)) for each in passed]

    def forget(self, before: int | None = None) -> None:
        """Removes what lies before layers up to `before`, or all."""
        last = self.layer + 1 if before is None else before
        if self._work is None:
            self._kept = {item: passed for item, passed in self._kept.items() if int(item.split("-")[1]) >= last}
            return
        for item in self._work.done(STAGE):
            if item.startswith("windows-") and int(item.split("-")[1]) < last:
                self._work.path(STAGE, item).unlink(missing_ok=True)

    def _read(self, variant: int, batch: int) -> Passed:
        if self.layer == 0:
            return ()
        item = _windows_item(self.layer, variant, batch)
        if self._work is None:
            return self._kept[item]
        tensors, info = self._work.load(STAGE, item)
        return unpacked(tensors, info["passed"])

    def _store(self, layer: int, variant: int, batch: int, passed: Passed) -> None:
        item = _windows_item(layer, variant, batch)
        if self._work is None:
            self._kept[item] = passed
            return
        tensors, info = packed(passed)
        self._work.commit(STAGE, item, tensors, {"passed": info})


def _layer_item(layer: int) -> str:
    return f"layer-{layer:04d}"


def _windows_item(layer: int, variant: int, batch: int) -> str:
    return f"windows-{layer:04d}-{variant}-{batch:05d}"
