"""From a model folder to a folder that ONNX Runtime and onnxruntime-genai run: written and checked, or not there."""

from __future__ import annotations

import ctypes
import gc
import json
import re
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from molae_compress.adapters.skeleton import fill_
from molae_compress.artifact import copy_companions
from molae_compress.checkpoint import check_free_space, check_output_folder, put_at, write_file
from molae_compress.checkpoint.writer import check_place, disk_errors
from molae_compress.compress import Progress, silent
from molae_compress.errors import ExportError, ResumeError
from molae_compress.export.banks import ExpertTensors, expert_tensors
from molae_compress.export.checks import (
    HALF_TOLERANCE,
    TOLERANCE,
    WIDENED_TOLERANCE,
    Run,
    check,
    reference_runs,
    write_widened,
)
from molae_compress.export.genai import genai_config
from molae_compress.export.graph import CacheShape, cache_shape, trace
from molae_compress.export.lowering import LOWERINGS, Lowering, lower_, prepare
from molae_compress.export.runtime import GENAI, MODEL, RECORD, WEIGHTS, onnxruntime, open_file
from molae_compress.export.slots import experts_of, layout_and_spec
from molae_compress.modeling.latent import LatentExperts
from molae_compress.modeling.quantizer import installed_version
from molae_compress.source import DiskSource

if TYPE_CHECKING:
    import onnx_ir as ir

Dtype = Literal["float32", "float16", "bfloat16"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FORMAT = 1
_PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir")
_INLINE_BYTES = 256  # weights up to this size lie in the graph's own file


@dataclass(frozen=True)
class Export:
    """What was exported, as `molae_export.json` holds it.

    Attributes:
        format: of this record.
        molae_compress: version that wrote it.
        architecture: class of the model.
        experts: the lowering.
        dtype: of weights and activations.
        library: file name of the operator library beside the model, or None.
        opsets: domain -> version.
        nodes: number of nodes of the graph, bodies of loops included.
        nbytes: size of graph and weights on disk.
        checks: run -> largest difference from torch; of the file with float32 arithmetic, where it is a 16-bit one.
        checks_in_dtype: the same in the export's own 16-bit arithmetic; None where the runtime here has no kernels for it.
        packages: versions of what took part.
    """

    format: int
    molae_compress: str
    architecture: str
    experts: str
    dtype: str
    library: str | None
    opsets: dict[str, int]
    nodes: int
    nbytes: int
    checks: dict[str, float]
    checks_in_dtype: dict[str, float] | None
    packages: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def export_onnx(
    folder: str | Path,
    output: str | Path,
    *,
    experts: Lowering = "molae",
    dtype: Dtype = "float32",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Export:
    """Exports a model, compressed or not, to ONNX, and proves that it computes what the model computes.

    Args:
        folder: model folder or hub id.
        output: folder to write; it appears when it is complete and checked.
        experts: what experts become: `molae`, nodes of this package's operator library; `ort-moe`, ONNX Runtime's own
            MoE operator; `standard`, operators of the ONNX standard.
        dtype: of weights and activations.
        overwrite: replace an earlier export at `output`.
        trust_remote_code: allow code from the model's folder.
        progress: called with a stage, what is done of it, and of how much.

    Raises:
        ExportError: the model cannot be exported in this form, or the result differs from it.
        ModelError: the model cannot be used.
        CheckpointError: it cannot be read, or the disk is full.
        ResumeError: `output` holds something else than an earlier export.
    """
    _check_choice("lowering", experts, LOWERINGS)
    _check_choice("dtype", dtype, tuple(DTYPES))
    onnxruntime()
    _check_exporter()
    output, report = Path(output).expanduser().resolve(), progress or silent
    if is_export(output) and not overwrite:
        raise ResumeError(
            f"The output folder '{output}' holds an earlier export and is not empty.",
            remedy="Give another output folder, or --overwrite (in Python `overwrite=True`) to replace it.",
        )
    check_output_folder(output, ours=is_export)
    library = _library() if experts == "molae" else None
    source = DiskSource.open(str(folder), device=torch.device("cpu"), trust_remote_code=trust_remote_code, dense=False)
    check_place(output, "output folder", source.folder.resolve(), ours=is_export)
    experts_of(source.model)  # refuses before anything is read
    needed = sum(tensor.numel() for tensor in source.model.parameters()) * DTYPES[dtype].itemsize
    check_free_space(output.parent, needed, "the exported model")
    report("load", 0, 1)
    model = _load(source, DTYPES[dtype])
    report("load", 1, 1)
    staging = output.with_name(f".{output.name}.partial")

    def write() -> Export:
        with disk_errors(staging):
            staging.mkdir(parents=True)
            copy_companions(staging, source.folder)
        found = _write_and_check(model, source.folder, staging, experts, dtype, library, report)
        write_file(staging / RECORD, _json(found.to_dict()))
        return found

    return put_at(output, staging, write)


def is_export(folder: Path) -> bool:
    """Whether a folder is a finished export."""
    return (folder / RECORD).is_file() and (folder / MODEL).is_file()


def _write_and_check(
    model: PreTrainedModel,
    source: Path,
    staging: Path,
    experts: Lowering,
    dtype: Dtype,
    library: Path | None,
    report: Progress,
) -> Export:
    kind = DTYPES[dtype]
    prepared = prepare(_tensors(model), experts)
    report("reference", 0, 1)
    shape, architecture = cache_shape(model), type(model).__name__
    runs = reference_runs(model)
    report("reference", 1, 1)
    report("trace", 0, 1)
    graph = trace(model, shape)
    lower_(graph, prepared, experts, kind)
    graph.producer_name, graph.producer_version = "molae_compress", installed_version()
    graph.metadata_props.update({"molae_compress": installed_version(), "molae_experts": experts, "molae_dtype": dtype})
    opsets, nodes = dict(graph.opset_imports), sum(1 for _ in graph.graph.all_nodes())
    report("trace", 1, 1)
    report("write", 0, 1)
    _save(graph, staging)
    name = None
    if library is not None:
        name = library.name
        shutil.copyfile(library, staging / name)
    write_file(staging / GENAI, _json(genai_config(model, _generation(source, model), shape, MODEL, name)))
    write_file(staging / "config.json", _json(_plain_config(source, dtype)))
    report("write", 1, 1)
    _drop_(model, graph)
    del graph, prepared
    _free()
    report("check", 0, 1)
    first, own = _checked(staging, shape, runs, kind, None if name is None else staging / name)
    report("check", 1, 1)
    return Export(
        format=FORMAT,
        molae_compress=installed_version(),
        architecture=architecture,
        experts=experts,
        dtype=dtype,
        library=name,
        opsets=opsets,
        nodes=nodes,
        nbytes=sum((staging / file).stat().st_size for file in (MODEL, WEIGHTS)),
        checks=first,
        checks_in_dtype=own,
        packages={package: version(package) for package in _PACKAGES} | {"onnxruntime": onnxruntime().__version__},
    )


def _tensors(model: PreTrainedModel) -> list[ExpertTensors]:
    modules = experts_of(model)
    return [expert_tensors(module, *layout_and_spec(model, name, module)) for name, module in modules.items()]


def _save(graph: ir.Model, folder: Path) -> None:
    """Weights are written one after the other; none is copied as a whole but the one being written."""
    import onnx_ir as ir

    with disk_errors(folder):
        ir.save(graph, folder / MODEL, external_data=WEIGHTS, size_threshold_bytes=_INLINE_BYTES)


def _checked(
    folder: Path, shape: CacheShape, runs: list[Run], dtype: torch.dtype, library: Path | None
) -> tuple[dict[str, float], dict[str, float] | None]:
    """Errors with float32 arithmetic, and in the export's own type if that is another and can be run here."""
    if dtype == torch.float32:
        return check(_session(folder / MODEL, library), shape, runs, TOLERANCE, typical=False), None
    widened = folder / "widened.onnx"
    write_widened(folder / MODEL, widened)
    first = check(_session(widened, library), shape, runs, WIDENED_TOLERANCE[dtype], typical=True)
    widened.unlink()
    if dtype == torch.bfloat16:  # the CPU kernels of ONNX Runtime know no bfloat16
        return first, None
    return first, check(_session(folder / MODEL, library), shape, runs, HALF_TOLERANCE[dtype], typical=True)


def _session(path: Path, library: Path | None) -> Any:
    """A session that holds no second copy of the weights: neither packed nor folded."""
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    return open_file(ort, path, library, options=options)


def _load(source: DiskSource, dtype: torch.dtype) -> PreTrainedModel:
    """The model with all its weights in a type, but for those that its class wants in float32.

    They are read one after the other: `from_pretrained` would hold all experts twice that it puts together.
    """
    model = source.model
    model.set_attn_implementation("eager")
    kept = [re.compile(name.replace("*", ".*")) for name in model._get_dtype_plan(dtype)]

    def cast(name: str, tensor: Tensor) -> Tensor:
        wide = any(pattern.search(name) for pattern in kept)
        return tensor.to(torch.float32 if wide else dtype) if tensor.is_floating_point() else tensor

    for target in source.keys.targets:
        read = source.keys.materialise(target, source.checkpoint.read)
        fill_(model, {name: cast(name, tensor) for name, tensor in read.items()}, source.device, keep_dtype=True)
    model.tie_weights(recompute_mapping=False)  # the skeleton knows what is left to tie
    for module in model.modules():
        if isinstance(module, LatentExperts):
            module.finish_loading_()
    model.config.dtype = model.config.get_text_config().dtype = dtype
    return model


def _generation(folder: Path, model: PreTrainedModel) -> GenerationConfig:
    """How the model wants to be sampled: its folder says it, or what its configuration says stands in."""
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return model.generation_config or GenerationConfig()


def _drop_(model: PreTrainedModel, graph: ir.Model) -> None:
    """Lets go of the weights, though others still hold model and graph: tracer and optimiser keep parts of both."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.new_empty(0)
    for value in graph.graph.initializers.values():
        value.const_value = None


def _free() -> None:
    """Gives memory that is no longer used back to the system: glibc keeps blocks below 32 MB, those of small layers."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:  # None: another C library
            trim(0)


def _library() -> Path:
    """The operator library; raises `ExportError` where it is not built."""
    from molae_compress.kernels import library_path

    return Path(library_path())


def _plain_config(source: Path, dtype: str) -> dict[str, Any]:
    """The model's configuration without its compression, for tokenizers and other programs that read it."""
    content = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for key in ("quantization_config", "torch_dtype"):  # the latter is what files of earlier transformers say
        content.pop(key, None)
    return {**content, "dtype": dtype}


def _check_choice(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ExportError(f"There is no {what} '{value}'.", remedy=f"There are: {', '.join(known)}.")


def _check_exporter() -> None:
    """Raises `ExportError` if the packages that write ONNX are not installed."""
    missing = []
    for package in ("onnx", "onnxscript", "onnx-ir"):
        try:
            version(package)
        except PackageNotFoundError:
            missing.append(package)
    if missing:
        raise ExportError(
            f"The packages {', '.join(missing)} are not installed.",
            why="The export is written with them.",
            remedy="Install them with `pip install molae-compress[onnx]`.",
        )


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
