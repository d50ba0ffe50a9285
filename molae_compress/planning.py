"""Plan: what a recipe will do to a model, from its config and the headers of its files, before any weight is read.

Sizes are exact. Where ranks follow from spectra that only calibration can measure, the plan shows the ranks of a uniform
budget and says so, with the total that the measured ranks will keep to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from molae_compress.budget import Shapes
from molae_compress.efficiency import Cost, compare_costs, cost_lines
from molae_compress.engines import engines
from molae_compress.errors import human_bytes
from molae_compress.operations import active_bytes, operations, sent_numbers
from molae_compress.prediction import Choice, Prediction
from molae_compress.solver.distill import BATCH as TRAINED_TOKENS
from molae_compress.solver.newton import KEPT
from molae_compress.solver.population import ROWS
from molae_compress.tensors import AnyShape, BankedShape, ExpertsSpec

LIBRARIES = 64_000_000  # bytes that torch and the allocator take for themselves in the course of a run, measured


@dataclass(frozen=True)
class LayerPlan:
    """One experts module in a plan.

    Attributes:
        name: module path.
        shape: latent shape, or None if the module stays dense.
        dense_parameters, parameters: numbers stored before and after.
        dense_bytes, bytes: the same in bytes.
        dense_flops, flops: floating-point operations for one token, two per multiply-add, routed experts only.
        dense_active_bytes, active_bytes: bytes of weights of routed experts that one token alone reads, each weight once.
        dense_traffic, traffic: numbers sent between devices for one token under expert parallelism (dispatch and combine).
    """

    name: str
    shape: AnyShape | None
    dense_parameters: int
    parameters: int
    dense_bytes: int
    bytes: int
    dense_flops: int
    flops: int
    dense_active_bytes: int
    active_bytes: int
    dense_traffic: int
    traffic: int


@dataclass(frozen=True)
class Plan:
    """What a recipe does to a model. `print(plan)` shows it as a table; `to_dict()` is what `--json` prints.

    Attributes:
        model: folder or hub id; None for a model in memory without a name.
        model_type: architecture, as transformers calls it.
        layers: one entry for every routed-experts module of the model.
        source_bytes, artifact_bytes: tensor bytes of the checkpoint (quantised weights as they are read) and of the result.
        limit_bytes: what the result takes at most; more than `artifact_bytes` where measured ranks may spend what the steps
            of uniform ones leave of the budget.
        stored_bytes: what the tensors of the checkpoint take in its files, if weights in them are quantised.
        measured: the ranks follow from measured spectra (or from no spectra at all) and are final.
        memory_bytes: upper estimate of the memory of a run: layer, ends of the model (embedding and head), experts, the
            solver's working matrices (`solver_bytes`), and the activations unless they are spilled to disk.
        activation_bytes: calibration activations of one layer, in memory or spilled to disk.
        disk_bytes: free disk the run needs, work directory included.
        tokens: calibration tokens.
        self_generated: calibration windows that the model is to write itself, with two more passes over the checkpoint.
        has_text: whether there are others.
        max_kl: limit by which the ranks are chosen, if the recipe gives one; unless `measured`, those shown are the largest.
        prediction: quality at these ranks; None unless it was measured what it follows from.
        choices: other budgets, with their predictions.
        unpredictable: why there is no prediction, where one was asked for.
        costs: what all routed experts cost as dense ones, in the paper's form of as many parameters (where it can be so
            small), and in this plan.
    """

    model: str | None
    model_type: str
    layers: tuple[LayerPlan, ...]
    source_bytes: int
    artifact_bytes: int
    limit_bytes: int
    measured: bool
    memory_bytes: int
    activation_bytes: int
    disk_bytes: int
    tokens: int
    stored_bytes: int | None = None
    max_kl: float | None = None
    prediction: Prediction | None = None
    choices: tuple[Choice, ...] = ()
    unpredictable: str | None = None
    costs: tuple[Cost, ...] = ()
    self_generated: int = 0
    has_text: bool = True

    @property
    def dense_parameters(self) -> int:
        """Numbers in the routed experts before."""
        return sum(layer.dense_parameters for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Numbers in the routed experts after."""
        return sum(layer.parameters for layer in self.layers)

    def per_token(self) -> dict[str, int]:
        """Operations and bytes that one token takes in all routed experts, before and after; see `LayerPlan`."""
        keys = ("dense_flops", "flops", "dense_active_bytes", "active_bytes")
        return {key: sum(getattr(layer, key) for layer in self.layers) for key in keys}

    def engines(self) -> dict[str, str]:
        """What runs the result, and how; see `engines.engines`."""
        return engines(self.model_type, [layer.shape for layer in self.layers if layer.shape is not None])

    def warnings(self) -> tuple[str, ...]:
        """What a reader should know before running it, one sentence each."""
        found = []
        if self.stored_bytes is not None and self.limit_bytes > self.stored_bytes:
            found.append(
                f"The result takes {human_bytes(self.limit_bytes)}, more than the {human_bytes(self.stored_bytes)} of the "
                "quantised original: its tensors are not quantised."
            )
        work = self.per_token()
        if work["flops"] > work["dense_flops"]:
            found.append(
                f"The routed experts take {work['flops'] / work['dense_flops']:.3f} times as many operations per token as "
                "the dense ones."
            )
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, totals and warnings included."""
        layers = [
            {**asdict(layer), "shape": layer.shape.to_dict() if layer.shape is not None else None} for layer in self.layers
        ]
        costs = [cost.to_dict() for cost in self.costs]
        totals = {
            "costs": costs,
            "dense_parameters": self.dense_parameters,
            "parameters": self.parameters,
            **self.per_token(),
            "engines": self.engines(),
        }
        return {**asdict(self), "layers": layers, **totals, "warnings": list(self.warnings())}

    def __str__(self) -> str:
        errors = self.prediction.layers if self.prediction is not None else {}
        lines = [f"{'module':40} {'form':8} {'groups':>9} {'ranks':>11} {'parameters':>14} {'kept':>6} {'flops':>6}"]
        lines[0] += f" {'err_h':>9}" if errors else ""
        for layer in self.layers:
            if layer.shape is None:
                form, groups, ranks = "dense", "", ""
            else:
                form, groups, ranks = described(layer.shape)
            kept, flops = layer.parameters / layer.dense_parameters, layer.flops / layer.dense_flops
            lines.append(
                f"{layer.name:40} {form:8} {groups:>9} {ranks:>11} {layer.parameters:>14,} {kept:>6.3f} {flops:>6.3f}"
                + (f" {errors[layer.name]:>9.3g}" if layer.name in errors else "")
            )
        work = self.per_token()
        packed = f" ({human_bytes(self.stored_bytes)} quantised)" if self.stored_bytes is not None else ""
        lines += [
            "",
            f"routed experts  {self.dense_parameters:,} -> {self.parameters:,} parameters "
            f"({self.parameters / self.dense_parameters:.4f} kept)",
            f"per token       {work['dense_flops']:,} -> {work['flops']:,} operations "
            f"({work['flops'] / work['dense_flops']:.4f}), {human_bytes(work['dense_active_bytes'])} -> "
            f"{human_bytes(work['active_bytes'])} of weights read "
            f"({work['active_bytes'] / work['dense_active_bytes']:.4f})",
            f"at most         {work['dense_active_bytes'] / work['active_bytes']:.2f} times as fast as dense for one token "
            f"(bytes of experts), {work['dense_flops'] / work['flops']:.2f} for a prompt (operations)",
            *(
                f"{'runs in' if not number else '':16}{name}: {how}"
                for number, (name, how) in enumerate(self.engines().items())
            ),
            f"checkpoint      {human_bytes(self.source_bytes)}{packed} -> {human_bytes(self.artifact_bytes)}",
            f"of the run      memory up to {human_bytes(self.memory_bytes)}, of which activations "
            f"{human_bytes(self.activation_bytes)}; free disk {human_bytes(self.disk_bytes)}; "
            f"{self.tokens:,} calibration tokens",
        ]
        if self.self_generated:
            own = f"{self.self_generated:,} windows of them are written by the model first"
            lines.append(f"{'':16}{own}, in two more passes over the checkpoint")
        if self.prediction is not None:
            of = "text like the calibration text" if self.has_text else "text that the model wrote itself"
            lines.append(f"predicted       {_in_words(self.prediction)}, on {of}")
        if self.unpredictable is not None:
            lines.append(f"no prediction: {self.unpredictable}")
        if self.choices:
            lines += ["", *_choice_lines(self.choices)]
        if self.costs:
            lines += ["", *cost_lines(self.costs), ""]
        if not self.measured and self.max_kl is not None:
            lines.append(
                "ranks shown are the largest; the run, or `plan --measured`, finds the smallest predicted to satisfy "
                f"`budget.max_kl: {self.max_kl}`"
            )
        elif not self.measured:
            mover = "calibration" if self.tokens else "the weights"
            lines.append(
                f"ranks shown are those of a uniform budget; {mover} will move them within "
                f"{human_bytes(self.limit_bytes)} for the whole"
            )
        lines += [f"warning: {warning}" for warning in self.warnings()]
        return "\n".join(lines)


def _in_words(found: Prediction) -> str:
    return f"err_h {found.err_h:.3g}, KL {found.kl:.3g} nats per token, perplexity x{found.perplexity_ratio:.4f}"


def _choice_lines(choices: Sequence[Choice]) -> list[str]:
    """The table of budgets."""
    lines = [f"{'budget.keep':>11} {'parameters':>15} {'checkpoint':>12} {'err_h':>9} {'KL':>9} {'perplexity':>11}"]
    for choice in choices:
        found = choice.prediction
        lines.append(
            f"{choice.keep:>11} {choice.parameters:>15,} {human_bytes(choice.artifact_bytes):>12} {found.err_h:>9.3g} "
            f"{found.kl:>9.3g} {f'x{found.perplexity_ratio:.4f}':>11}"
        )
    return lines


def described(shape: AnyShape) -> tuple[str, str, str]:
    """Form, groups and ranks of a module in words; where banks differ in rank, the lowest and the highest."""
    shapes = shape.shapes if isinstance(shape, BankedShape) else (shape,)
    ranks_in, ranks_out = {part.rank_in for part in shapes}, {part.rank_out or 0 for part in shapes}
    both = (f"{min(ranks)}" if len(ranks) == 1 else f"{min(ranks)}-{max(ranks)}" for ranks in (ranks_in, ranks_out))
    first = shapes[0]
    return (
        first.form,
        f"{first.input_group}/{first.output_group}",
        "/".join(both if ranks_out != {0} else (next(both), "dense")),
    )


def layer_plan(spec: ExpertsSpec, shape: AnyShape | None, *, dense_bytes: int, dtype: torch.dtype) -> LayerPlan:
    """Adds up one module; `dense_bytes` are those of the checkpoint's tensors, `dtype` that of the latent ones."""
    dense_active = round(dense_bytes * spec.top_k / spec.num_experts)
    return LayerPlan(
        name=spec.name,
        shape=shape,
        dense_parameters=spec.dense_numel,
        parameters=spec.dense_numel if shape is None else shape.numel(spec),
        dense_bytes=dense_bytes,
        bytes=dense_bytes if shape is None else shape.nbytes(spec, dtype),
        dense_flops=operations(spec, None),
        flops=operations(spec, shape),
        dense_active_bytes=dense_active,
        active_bytes=dense_active if shape is None else active_bytes(spec, shape, dtype),
        dense_traffic=sent_numbers(spec, None),
        traffic=sent_numbers(spec, shape),
    )


def solver_bytes(spec: ExpertsSpec) -> int:
    """What the solver holds of one expert at most, beside its weights as they are stored.

    Slope moments and metric [J,J] in float64 and float32, the metric of the other expert of a pair, and two moments of
    intermediates [I,I] in float64, or the eight [I,I] of a refit of the second projection (more if there is no gate), or
    eight vectors of a Gauss-Newton step with the cores of two experts and their basis in float32; input moments [H,H] in
    float64, of both of a pair; the expert's first projection twice in float32; one part of its tokens with what is computed
    from them on the way to the slopes; rows kept between iterations.
    """
    H, I, J = spec.hidden, spec.intermediate, spec.rows
    matrices = max(J * J * (8 + 2 * 4) + 2 * I * I * 8, 8 * I * I * 8, 8 * min(H, 2 * J) * (H + 2 * J) * 4) + 6 * H * H * 8
    return matrices + 2 * J * H * 4 + ROWS * (6 * J + 2 * H) * 4 + KEPT


def training_bytes(spec: ExpertsSpec, shape: AnyShape | None) -> int:
    """What distillation holds of one module: values, gradient and two moments in float32, and the graph of one step.

    The graph has what each slot of a batch computes: inputs and outputs in full width, latent rows, intermediates.
    """
    if shape is None:
        return 0
    slots = TRAINED_TOKENS * spec.top_k
    return 4 * 4 * shape.numel(spec) + slots * (4 * spec.hidden + 4 * spec.rows) * 4


def make_plan(
    model: str | None,
    specs: Sequence[ExpertsSpec],
    shapes: Shapes,
    *,
    model_type: str,
    dense_bytes: dict[str, int],
    dtypes: dict[str, torch.dtype],
    source_bytes: int,
    largest_layer_bytes: int,
    tokens: int,
    measured: bool,
    most_bytes: int | None = None,
    stored_bytes: int | None = None,
    ends_bytes: int = 0,
    evaluated: bool = False,
    distilled: bool = False,
    routers: bool = False,
    memory_limit: int | None = None,
    max_kl: float | None = None,
    self_generated: int = 0,
    has_text: bool = True,
) -> Plan:
    """Adds up a whole model.

    Args:
        model: folder or hub id.
        specs: all of its routed-experts modules.
        shapes: of those that are compressed.
        model_type: see `Plan`.
        dense_bytes: of the checkpoint's tensors, by module.
        dtypes: type of the latent tensors, by module.
        source_bytes: tensors of the checkpoint.
        largest_layer_bytes: one decoder layer without its experts in float32.
        tokens: calibration tokens.
        self_generated, has_text: see `Plan`.
        measured: see `Plan`.
        most_bytes: what the latent modules may take in all within the budget, if their ranks are not final.
        ends_bytes: what comes before and after the decoder layers (embedding, last norm, head), in float32.
        evaluated: the result is compared with the original at the end.
        distilled: experts are trained, module by module.
        routers: they are trained, which holds the streams of the original and the compressed model in memory.
        memory_limit: activations above it are spilled to disk; None is no limit.
        max_kl: see `Plan`.
    """
    layers = tuple(
        layer_plan(spec, shapes.get(spec.name), dense_bytes=dense_bytes[spec.name], dtype=dtypes[spec.name])
        for spec in specs
    )
    hidden = max(spec.hidden for spec in specs)
    activations = tokens * (2 * hidden * 4 + max(spec.top_k for spec in specs) * 12 + 4)
    held = activations if memory_limit is None or 2 * tokens * hidden * 4 <= memory_limit else 0
    experts = max(layer.dense_bytes for layer in layers)
    latent = max(layer.bytes for layer in layers)
    artifact = source_bytes + sum(layer.bytes - layer.dense_bytes for layer in layers)
    limit = artifact
    if not measured and most_bytes is not None:
        limit += max(0, most_bytes - sum(layer.bytes for layer in layers if layer.shape is not None))
    # the dense experts twice while they are joined, or once beside their latent form and a refitted projection
    working = max(2 * experts, experts + 2 * latent) + max(solver_bytes(spec) for spec in specs)
    if distilled:
        working = max(working, experts + 2 * latent + max(training_bytes(spec, shapes.get(spec.name)) for spec in specs))
    if routers:
        held = max(held, 3 * tokens * hidden * 4)
    # the ends of both models at once
    compared = ends_bytes if evaluated else 0
    return Plan(
        model=model,
        model_type=model_type,
        layers=layers,
        source_bytes=source_bytes,
        artifact_bytes=artifact,
        limit_bytes=limit,
        measured=measured,
        memory_bytes=LIBRARIES + largest_layer_bytes + ends_bytes + max(working + held, compared),
        activation_bytes=activations,
        disk_bytes=2 * limit + 2 * activations,  # finished layers and the artifact; streams of two layers
        tokens=tokens,
        stored_bytes=stored_bytes,
        max_kl=max_kl,
        costs=compare_costs(specs, shapes, dtypes),
        self_generated=self_generated,
        has_text=has_text,
    )
