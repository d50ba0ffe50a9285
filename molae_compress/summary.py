"""What a run did, added up: its plan, and the report of an artifact."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import yaml

from molae_compress.adapters import unproven_experts
from molae_compress.budget import Shapes, most_bytes
from molae_compress.compress import Run
from molae_compress.evaluation import Evaluation
from molae_compress.generation import wanted
from molae_compress.layouts import LAYER_NUMBER, weight_names
from molae_compress.planning import Plan, make_plan
from molae_compress.prediction import Prediction
from molae_compress.report import CalibrationReport, LayerReport, Report, installed_versions, warnings_for
from molae_compress.routers import Trained


def plan_of(run: Run, shapes: Shapes, *, model: str | None, measured: bool) -> Plan:
    """What the shapes mean for the run's model."""
    source, calibration, quantized = run.source, run.recipe.calibration, run.source.quantized()
    tokens = self_generated = 0
    has_text = True
    if run.windows_NL is not None:
        tokens, self_generated = run.windows_NL.numel(), run.generated
        has_text = self_generated < len(run.windows_NL)
    elif calibration is not None:
        # without a source text may be handed over, unless the model is to write it
        text = calibration.samples if calibration.data is not None or calibration.self_generated == "auto" else 0
        self_generated = sum(wanted(calibration, text, text))
        tokens = (text + self_generated) * calibration.sequence_length
    experts = {weight for spec in source.specs for weight in weight_names(source.model, spec.name)}
    by_layer: dict[str, int] = {}
    ends = 0
    for name, tensor in source.model.state_dict().items():
        number = LAYER_NUMBER.search(name)
        if number is None:
            ends += 4 * tensor.numel()
        elif name not in experts:
            layer = name[: number.end()]
            by_layer[layer] = by_layer.get(layer, 0) + 4 * tensor.numel()
    compressed = [spec for spec in source.specs if spec.name in shapes]
    dtypes = {spec.name: run.dtype(spec) for spec in source.specs}
    copied = source.nbytes() - sum(source.expert_bytes(spec) for spec in compressed)
    return make_plan(
        model,
        source.specs,
        shapes,
        model_type=source.model.config.model_type,
        dense_bytes={spec.name: source.expert_bytes(spec) for spec in source.specs},
        dtypes=dtypes,
        source_bytes=source.nbytes(),
        largest_layer_bytes=max(by_layer.values()),
        tokens=tokens,
        self_generated=self_generated,
        has_text=has_text,
        measured=measured,
        most_bytes=most_bytes(run.recipe, compressed, dtypes, copied),
        stored_bytes=quantized[1] if quantized is not None else None,
        ends_bytes=ends,
        evaluated=run.recipe.evaluate is not None,
        distilled=run.recipe.heal.block_steps > 0,
        routers=run.recipe.heal.router_steps > 0,
        memory_limit=run.memory_limit,
        max_kl=run.recipe.budget.max_kl,
    )


def summarise(
    run: Run,
    shapes: Shapes,
    *,
    model: str | None,
    timings: Mapping[str, float],
    data_sha256: str = "",
    evaluation: Evaluation | None = None,
    source_fingerprint: str = "",
    unknown: Collection[str] = (),
    unknown_experts: Collection[str] = (),
    resumed: int = 0,
    routers: Trained | None = None,
    prediction: Prediction | None = None,
) -> Report:
    """The report of a finished run.

    Args:
        run: all of whose modules are solved.
        shapes: of its modules.
        model: folder or hub id.
        timings: seconds by stage.
        data_sha256: of the calibration text.
        evaluation: comparison with the original.
        source_fingerprint: of the checkpoint.
        unknown: its tensors that the model class does not know.
        unknown_experts: those of them that are weights of routed experts.
        resumed: items that an earlier, interrupted run had finished.
        routers: as they were trained.
    """
    recipe, plan = run.recipe, plan_of(run, shapes, model=model, measured=True)
    source: dict[str, Any] = {"fingerprint": source_fingerprint, "bytes": plan.source_bytes}
    if (quantized := run.source.quantized()) is not None:
        source |= {"quantization": quantized[0], "stored_bytes": quantized[1]}
    used = None
    if run.windows_NL is not None and recipe.calibration is not None:
        windows, length = run.windows_NL.shape
        used = CalibrationReport(
            windows * length, windows, data_sha256, recipe.calibration.data or (), self_generated=run.generated
        )
    layers = _layer_reports(run, shapes, prediction.layers if prediction is not None else {})
    warnings = warnings_for(layers, used, samples=recipe.calibration.samples if recipe.calibration else None)
    warnings += plan.warnings() + run.notes
    warnings += tuple(
        f"'{path}' looks like routed experts and was left alone: that a router sends tokens to it cannot be told."
        for path in unproven_experts(run.source.model)
    )
    if run.windows_NL is None and recipe.method != "paper" and recipe.budget.rank != "full":
        warnings += (
            "No calibration text was used: at the same size, quality is far lower than with some. Where there is none, the "
            "model can write it: `calibration: {self_generated: 256}`.",
        )
    if unknown:
        dense = f" {len(unknown_experts)} of them are routed experts, which so stay dense." if unknown_experts else ""
        warnings += (
            f"{len(unknown)} tensors of the checkpoint are unknown to {type(run.source.model).__name__} and were copied as "
            f"they are, for example '{min(unknown)}'.{dense}",
        )
    return Report(
        model=model,
        recipe=yaml.safe_load(recipe.dump()),
        recipe_fingerprint=recipe.fingerprint(),
        plan=plan.to_dict(),
        layers=layers,
        calibration=used,
        evaluation=evaluation.to_dict() if evaluation is not None else None,
        warnings=warnings,
        versions=installed_versions(),
        timings={stage: round(seconds, 3) for stage, seconds in timings.items()},
        resumed=resumed,
        inputs={},
        files={},
        source=source,
        artifact={"bytes": plan.artifact_bytes},
        routers=None
        if routers is None
        else {"kl_before": routers.before, "kl_after": routers.after, "changed": sorted(routers.tensors)},
        prediction=None
        if prediction is None
        else {"err_h": prediction.err_h, "kl": prediction.kl, "perplexity_ratio": prediction.perplexity_ratio},
    )


def _layer_reports(run: Run, shapes: Shapes, predicted: Mapping[str, float]) -> tuple[LayerReport, ...]:
    reports = []
    for spec in run.specs:
        shape = shapes[spec.name]
        if shape is None:
            reports.append(LayerReport(spec.name))
            continue
        solved = run.solved(spec, tensors=False)
        reports.append(
            LayerReport(
                name=spec.name,
                shape=shape.to_dict(),
                err_h=solved.error.err_h if solved.error else None,
                relative_error=solved.error.relative if solved.error else None,
                tokens_measured=solved.error.tokens if solved.error else 0,
                tokens_per_expert=tuple(solved.tokens_per_expert),
                seconds=round(solved.seconds, 3),
                err_h_unhealed=solved.unhealed.err_h if solved.unhealed else None,
                err_h_predicted=predicted.get(spec.name),
            )
        )
    return tuple(reports)
