"""Opening an exported model in ONNX Runtime, and generating text with onnxruntime-genai."""

from __future__ import annotations

import ctypes
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from molae_compress.errors import ExportError
from molae_compress.kernels import has_gpu_kernels
from molae_compress.source import load_tokenizer

if TYPE_CHECKING:
    import onnxruntime as ort

MODEL, WEIGHTS, GENAI, RECORD = "model.onnx", "model.onnx.data", "genai_config.json", "molae_export.json"
Device = Literal["auto", "cpu", "cuda"]
_log = logging.getLogger(__name__)
_CUDA, _CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


def onnxruntime() -> ModuleType:
    """The module `onnxruntime`. Raises `ExportError` if it is not installed."""
    try:
        import onnxruntime as found
    except ImportError as error:
        raise _missing("onnxruntime", error) from error
    return found  # type: ignore[no-any-return]  # an untyped module


def open_model(folder: str | Path, *, device: Device = "auto", options: Any = None) -> ort.InferenceSession:
    """Opens an exported model in ONNX Runtime, with the operator library that lies beside it, if there is one.

    Args:
        folder: what an export wrote.
        device: `cuda` insists on a GPU; `auto` takes one if it is there and the export has operators for it.
        options: `onnxruntime.SessionOptions`; defaults if not given.

    Raises:
        ExportError: the folder holds no exported model, CUDA was asked for and cannot be used, or the runtime refuses the
            model.
    """
    ort, folder = onnxruntime(), Path(folder).expanduser()
    check_exported(folder)
    with_cuda = _use_cuda(device, folder)
    session = open_file(ort, folder / MODEL, library_of(folder), with_cuda=with_cuda, options=options)
    # Asked for a provider that it cannot use, the runtime logs that and goes on without.
    if device == "cuda" and _CUDA not in session.get_providers():
        raise _no_cuda(f"ONNX Runtime {ort.__version__} runs the model on {', '.join(session.get_providers())} instead.")
    return session


def open_file(ort: ModuleType, path: Path, library: Path | None, *, with_cuda: bool = False, options: Any = None) -> Any:
    """A session of one file; see `open_model`."""
    options = options or ort.SessionOptions()
    with runtime_errors(f"'{path}' cannot be opened"):
        if library is not None:
            options.register_custom_ops_library(str(library))
        return ort.InferenceSession(str(path), options, providers=[_CUDA, _CPU] if with_cuda else [_CPU])


def _use_cuda(device: Device, folder: Path) -> bool:
    """Whether to ask for CUDA; raises `ExportError` where it is wanted and cannot be had."""
    if device == "cpu":
        return False
    problem = _cuda_problem()
    error = _export_problem(folder) if problem is None else _no_cuda(f"{problem}.")
    if error is None:
        return True
    if device == "cuda":
        raise error
    if problem is None:  # there is a GPU: whoever has one wonders why it idles
        _log.warning("'%s' runs on the CPU. %s %s", folder, error.why, error.remedy)
    return False


def _export_problem(folder: Path) -> ExportError | None:
    """Why the experts of an export would run on the CPU though there is a GPU, or the runtime refuse them; None if not."""
    library = library_of(folder)
    if library is None:
        return None
    if record_of(folder).get("dtype") == "float32":
        return _no_cuda(
            "The operators of the library in its folder run on a GPU in float16 and bfloat16 only; this export is float32.",
            "Export with --dtype float16 or bfloat16, or with --experts standard, or run with the device 'cpu'.",
        )
    if not has_gpu_kernels(library):
        return _no_cuda(
            "The operator library in its folder was built without GPU kernels.",
            "Run `make gpu-kernels` and `make kernels` and export again, or export with --experts standard.",
        )
    return None


def _cuda_problem() -> str | None:
    """Why CUDA cannot be used at all, found out on a model of one node; None if it can."""
    ort = onnxruntime()
    if _CUDA not in ort.get_available_providers():
        return f"This ONNX Runtime {ort.__version__} is a build without it"
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return "There is no CUDA driver"
    from onnx import TensorProto, helper

    face = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "probe", face[:1], face[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=[_CUDA, _CPU])
    return None if _CUDA in session.get_providers() else f"ONNX Runtime {ort.__version__} cannot start its CUDA provider"


@contextmanager
def runtime_errors(what: str) -> Iterator[None]:
    """Turns errors of ONNX Runtime, which has a class of its own for every status, into `ExportError`."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        raise ExportError(
            f"{what} by ONNX Runtime {onnxruntime().__version__}.",
            why=str(error).strip().split("\n")[0],
            remedy="Update onnxruntime, or export with another --experts or --dtype.",
        ) from error


def check_exported(folder: Path) -> None:
    """Raises `ExportError` unless `folder` is a finished export."""
    missing = [name for name in (RECORD, MODEL) if not (folder / name).is_file()]
    if missing:
        raise ExportError(
            f"'{folder}' is no exported model: it has no {' and no '.join(missing)}.",
            remedy="Make one with `molae-compress export onnx DIR --output OUT`.",
        )


def library_of(folder: Path) -> Path | None:
    """The operator library of an exported model, or None if it needs none."""
    name = record_of(folder).get("library")
    return folder / name if name else None


def record_of(folder: Path) -> dict[str, Any]:
    """What the export says of itself: the fields of `Export`."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(f"'{folder / RECORD}' is not valid JSON ({error}).", remedy="Export the model again.") from error
    return record


def generate(
    folder: str | Path,
    prompt: str | list[int],
    *,
    max_tokens: int = 64,
    device: Device = "auto",
    trust_remote_code: bool = False,
) -> Iterator[int]:
    """Yields tokens that an exported model puts after a prompt, by onnxruntime-genai, the likeliest each time.

    Args:
        folder: what an export wrote.
        prompt: text, or token ids.
        max_tokens: to generate at most; fewer if the model ends the text or its context is full.
        device: as for `open_model`.
        trust_remote_code: allow code of the tokenizer from the folder.

    Raises:
        ExportError: the folder holds no exported model, onnxruntime-genai is not installed or refuses it, CUDA was asked
            for and is not there, or the prompt is empty.
        ModelError: the prompt is text, and the tokenizer is missing or brings its own code.
    """
    import numpy as np

    folder = Path(folder).expanduser()
    check_exported(folder)
    genai = _genai()
    ids = (
        load_tokenizer(folder, trust_remote_code=trust_remote_code)(prompt)["input_ids"]
        if isinstance(prompt, str)
        else prompt
    )
    context = json.loads((folder / GENAI).read_text(encoding="utf-8"))["model"]["context_length"]
    if not 0 < len(ids) < context:
        raise ExportError(
            f"The prompt has {len(ids)} tokens; the model takes 1 to {context - 1}.", remedy="Give another prompt."
        )
    with_cuda = _use_cuda(device, folder)
    if device == "cuda" and not genai.is_cuda_available():
        raise _no_cuda(f"This onnxruntime-genai {genai.__version__} is a build without it.")
    try:
        config = genai.Config(str(folder))
        config.clear_providers()
        if with_cuda and genai.is_cuda_available():
            config.append_provider("cuda")
        model = genai.Model(config)
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=min(context, len(ids) + max_tokens), do_sample=False)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(np.array(ids, dtype=np.int32))
        while not generator.is_done():
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])
    except RuntimeError as error:  # all that onnxruntime-genai raises
        raise ExportError(
            f"onnxruntime-genai {genai.__version__} cannot run '{folder}'.",
            why=str(error).strip().split("\n")[0],
            remedy="Update onnxruntime-genai, or run the model with onnxruntime (see docs/onnx.md).",
        ) from error


def _genai() -> ModuleType:
    try:
        import onnxruntime_genai as found
    except ImportError as error:
        raise _missing("onnxruntime-genai", error) from error
    return found  # type: ignore[no-any-return]  # an untyped module


def _missing(package: str, error: ImportError) -> ExportError:
    return ExportError(
        f"The package {package} cannot be imported ({error}).",
        why="Exported models are run by it.",
        remedy="Install it with `pip install molae-compress[onnx]`.",
    )


def _no_cuda(why: str, remedy: str = "") -> ExportError:
    return ExportError(
        "CUDA was asked for and cannot be used.",
        why=why,
        remedy=remedy
        or "Run with the device 'cpu', or install a driver, the CUDA libraries and a CUDA build of the runtime.",
    )
