"""`Report`: what was done to a model and how well it went, as `molae_report.json` beside the weights.

Everything in it follows from the recipe, the model and the text, except the timings (`Report.timings`,
`LayerReport.seconds`) and what was `Report.resumed`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from molae_compress.checkpoint import write_file
from molae_compress.errors import CheckpointError
from molae_compress.recipe.files import write_yaml

FORMAT = 1
FILE_NAME, RECIPE = "molae_report.json", "recipe.yaml"
# KL to the original is about twice err_h: above this, expect 0.1 nats per token or more.
HIGH_ERR_H = 0.05


@dataclass(frozen=True)
class LayerReport:
    """One experts module in a report.

    Attributes:
        name: module path.
        shape: its `LatentShape` as plain values; None if it stayed dense.
        err_h: mean over held-out tokens of |h' - h|^2 / |h|^2, h the residual stream after the layer and h' the same with
            this one module compressed; None if not measured.
        relative_error: sum of |dy|^2 over sum of |y|^2, y the output of the experts; None if not measured.
        tokens_measured: tokens that the two errors were measured on.
        tokens_per_expert: calibration tokens routed to each expert; empty without calibration.
        seconds: time of the fit.
        err_h_unhealed: err_h of the closed form, where training followed it and it was measured.
        err_h_predicted: err_h as it was predicted before the module was solved; None if it was not.
    """

    name: str
    shape: dict[str, Any] | None = None
    err_h: float | None = None
    relative_error: float | None = None
    tokens_measured: int = 0
    tokens_per_expert: tuple[int, ...] = ()
    seconds: float = 0.0
    err_h_unhealed: float | None = None
    err_h_predicted: float | None = None

    @property
    def unseen_experts(self) -> int:
        """Experts that no calibration token was routed to; 0 without calibration."""
        return sum(count == 0 for count in self.tokens_per_expert)


@dataclass(frozen=True)
class CalibrationReport:
    """The text a model was watched on.

    Attributes:
        tokens: how many.
        windows: in how many windows.
        sha256: of the documents, their order and boundaries; empty without text.
        sources: as the recipe names them; empty if the text was handed over in Python.
        self_generated: those of the windows that the model wrote itself.
    """

    tokens: int
    windows: int
    sha256: str
    sources: tuple[str, ...] = ()
    self_generated: int = 0


@dataclass(frozen=True)
class Report:
    """What a run did.

    Attributes:
        model: folder or hub id; None for a model handed over in Python.
        recipe: the whole recipe as plain values.
        recipe_fingerprint: its `Recipe.fingerprint()`.
        plan: the final plan, `Plan.to_dict()`.
        layers: one entry for every experts module.
        calibration: None for a data-free run.
        evaluation: `Evaluation.to_dict()`; None if nothing was compared.
        warnings: sentences for the reader, see `warnings_for`.
        versions: of the software, see `installed_versions`.
        timings: stage -> seconds, of the last run where an interrupted one was gone on with.
        resumed: how many measured or finished layers it found there.
        inputs: everything the weights follow from, as text: recipe keys, source, calibration text, versions.
        files: name -> sha256 of every file of the artifact that the report vouches for.
        source: `fingerprint` and `bytes` of the source checkpoint; if it is quantised, `bytes` are those after dequantising,
            and `quantization` and `stored_bytes` say how and in how many its files hold the tensors.
        artifact: `bytes` of the tensors of the result.
        routers: None unless they were trained; else `kl_before` and `kl_after`, on calibration windows that they were not
            trained on, and `changed`, the names of their tensors: none if the original ones stayed the best.
        finetuned: one entry for each training of the whole model after its compression: what was `trained`, its `settings`,
            how many `steps`, `examples`, learned `tokens` and `trained_parameters`, the loss on examples set aside before
            and after (`loss_before`, `loss_after`), the tensors it `changed`, and the `evaluation_before` it. `evaluation`
            is that of the result, and everything else that of the compression.
        prediction: `err_h`, `kl` and `perplexity_ratio` as they were predicted before anything was solved, for text like the
            calibration text; None if they were not.
    """

    model: str | None
    recipe: dict[str, Any]
    recipe_fingerprint: str
    plan: dict[str, Any]
    layers: tuple[LayerReport, ...]
    calibration: CalibrationReport | None
    evaluation: dict[str, Any] | None
    warnings: tuple[str, ...]
    versions: dict[str, str]
    timings: dict[str, float]
    resumed: int
    inputs: dict[str, str]
    files: dict[str, str]
    source: dict[str, Any]
    artifact: dict[str, Any]
    routers: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    finetuned: tuple[dict[str, Any], ...] = ()

    @property
    def err_h(self) -> float | None:
        """Sum over layers of their err_h; None if none was measured."""
        measured = [layer.err_h for layer in self.layers if layer.err_h is not None]
        return sum(measured) if measured else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; a figure that is not finite becomes None."""
        layers = [{**asdict(layer), "unseen_experts": layer.unseen_experts} for layer in self.layers]
        content: dict[str, Any] = plain({"format": FORMAT, **asdict(self), "layers": layers, "err_h": self.err_h})
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """The report that `to_dict` wrote.

        Raises:
            CheckpointError: another format, or an entry is missing or unknown.
        """
        if content.get("format") != FORMAT:
            raise CheckpointError(
                f"The report has format {content.get('format')!r}, this version of molae_compress reads {FORMAT}.",
                remedy="Install the version that wrote it; config.json names it.",
            )
        try:
            values = {
                field.name: content[field.name] for field in fields(cls) if field.name in content or field.default is MISSING
            }
            for name in ("recipe", "plan", "versions", "timings", "inputs", "files", "source", "artifact"):
                if not isinstance(values[name], Mapping):
                    raise TypeError(f"`{name}` is {json.dumps(values[name])}, not a mapping")
            for name in ("layers", "warnings"):
                if not isinstance(values[name], Sequence):
                    raise TypeError(f"`{name}` is {json.dumps(values[name])}, not a list")
            if not isinstance(values["artifact"].get("bytes"), int):
                raise TypeError("`artifact` holds no number of `bytes`")
            values["layers"] = tuple(_layer(entry) for entry in content["layers"])
            values["warnings"] = tuple(content["warnings"])
            values["finetuned"] = tuple(content.get("finetuned", ()))
            if (found := content["calibration"]) is not None:
                values["calibration"] = CalibrationReport(**{**found, "sources": tuple(found["sources"])})
        except (KeyError, TypeError) as error:
            problem = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(
                f"The report cannot be read: {problem}.",
                why="It was edited, or only a part of it is there.",
                remedy="Restore the file, or compress the model again.",
            ) from error
        return cls(**values)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads the report of an artifact.

        Raises:
            CheckpointError: the folder has none, or it cannot be read.
        """
        path = Path(folder) / FILE_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CheckpointError(
                f"'{folder}' has no {FILE_NAME}." if Path(folder).is_dir() else f"There is no folder '{folder}'.",
                remedy="Give a folder that `molae-compress apply`, `finetune` or `init` wrote, or one in which "
                "`Report.save` was called.",
            ) from error
        except (OSError, ValueError) as error:
            raise CheckpointError(f"'{path}' cannot be read ({error}).", remedy="Restore the file.") from error
        if not isinstance(content, dict):
            raise CheckpointError(f"'{path}' does not hold a report.", remedy="Restore the file.")
        return cls.from_dict(content)

    def save(self, folder: str | Path) -> Path:
        """Writes `molae_report.json` into `folder`, whole or not at all; returns its path.

        A report of `compress_`, saved beside what `save_pretrained` wrote, vouches for those files, and the recipe is
        written there too.

        Raises:
            CheckpointError: it cannot be written.
        """
        path = Path(folder) / FILE_NAME
        if not self.files and path.parent.is_dir():
            write_file(path.with_name(RECIPE), write_yaml(self.recipe).encode())
            return replace(self, files=file_hashes(path.parent)).save(folder)
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
        write_file(path, f"{text}\n".encode())
        return path


def file_hashes(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """sha256 of every file of an artifact but its report, by path inside the folder; `known` ones are not read again."""
    hashes = dict(known or {})
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != FILE_NAME and name not in hashes:
            with path.open("rb") as file:
                hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def warnings_for(
    layers: Sequence[LayerReport], calibration: CalibrationReport | None, *, samples: int | None = None
) -> tuple[str, ...]:
    """What a reader should know before trusting a result, one sentence or two each.

    Args:
        layers: the measured layers.
        calibration: the text; None for a data-free run.
        samples: windows that the recipe asked for, where it decides how many there are.
    """
    found: list[str] = []
    missed = [layer.name for layer in layers if layer.tokens_per_expert and not any(layer.tokens_per_expert)]
    if missed:
        found.append(
            f"{len(missed)} of {len(layers)} experts modules saw no calibration token (such as '{missed[0]}') and were "
            "fitted without data. The model sends them inputs of another kind than text, or none."
        )
    unseen = [layer for layer in layers if layer.unseen_experts and layer.name not in missed]
    if unseen:
        experts = sum(layer.unseen_experts for layer in unseen)
        found.append(
            f"{experts} experts in {len(unseen)} of {len(layers)} layers saw no calibration token and were fitted on "
            "the average of their layer. More calibration text, or text of more kinds, reaches them."
        )
    total = sum(layer.err_h or 0.0 for layer in layers)
    if total > HIGH_ERR_H:
        found.append(
            f"err_h is {total:.3f}, above {HIGH_ERR_H}: expect a KL divergence from the original of about "
            f"{2 * total:.2g} nats per token. A larger budget lowers it."
        )
    if calibration is not None and len(calibration.sources) == 1:
        found.append(
            f"The calibration text comes from one source, '{calibration.sources[0]}'. If that is text of one kind, "
            "text of other kinds loses more; a mixture costs little."
        )
    if calibration is not None and calibration.windows == 1:
        found.append(
            "err_h was not measured: there is one calibration window, and the weights were fitted on it. Give two or more "
            "(a larger `calibration.samples`, and text for it)."
        )
    text = calibration.windows - calibration.self_generated if calibration is not None else 0
    if calibration is not None and not text:
        found.append("The model wrote all calibration text itself: err_h, and what was predicted, hold for such text.")
    if calibration is not None and samples is not None and 0 < text < samples:
        filled = "The model wrote the others itself, which is not as good. " if calibration.windows >= samples else ""
        found.append(
            f"The calibration text gave {text} windows, fewer than the {samples} asked for. {filled}Add text, "
            "or lower `calibration.samples`."
        )
    return tuple(found)


def installed_versions() -> dict[str, str]:
    """Versions of what a result depends on: this package, torch, transformers and Python."""
    from molae_compress.modeling.quantizer import installed_version

    libraries = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {"molae_compress": installed_version(), **libraries, "python": platform.python_version()}


def _layer(entry: Mapping[str, Any]) -> LayerReport:
    given = {key: value for key, value in entry.items() if key != "unseen_experts"}
    return LayerReport(**{**given, "tokens_per_expert": tuple(given["tokens_per_expert"])})


def plain(value: Any) -> Any:
    """The values of JSON: lists for tuples, None for numbers that JSON has no word for."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
