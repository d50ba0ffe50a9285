"""Proof that an artifact folder is what its report says: files, hashes, tensors, config, and that it loads and computes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from molae_compress.adapters.skeleton import model_class, read_config
from molae_compress.calibration.walk import LayerArguments, model_inputs
from molae_compress.compress import Progress, silent
from molae_compress.errors import MolaeError
from molae_compress.modeling.latent import LatentExperts
from molae_compress.recipe.files import read_yaml
from molae_compress.report import Report
from molae_compress.report.report import RECIPE
from molae_compress.source import DiskSource
from molae_compress.stream import forwarded

_PROBE_TOKENS = 16
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Check:
    """One thing that was checked, whether it holds, and what was found."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Verification:
    """All checks of a folder, in the order they were made; a failure ends them where the rest would make no sense."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether everything holds."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"passed": self.passed, "checks": [asdict(check) for check in self.checks]}


def verify(folder: str | Path, *, trust_remote_code: bool = False, progress: Progress | None = None) -> Verification:
    """Checks an artifact against its own report, and loads it.

    The model is loaded by `from_pretrained` if it fits into half of the free memory, and its logits are compared with
    those of the layer-by-layer forward; otherwise the latter alone runs.

    Args:
        folder: the artifact.
        trust_remote_code: allow code from the folder.
        progress: called with a stage, what is done of it, and of how much.
    """
    folder, progress = Path(folder), progress or silent
    checks: list[Check] = []

    def check(name: str, examine: Callable[[], tuple[bool, str]]) -> bool:
        try:
            passed, detail = examine()
        except MolaeError as error:
            passed, detail = False, str(error)
        except Exception as error:  # whatever a damaged folder makes other libraries raise is a finding
            passed, detail = False, f"{type(error).__name__}: {error}"
        checks.append(Check(name, passed, detail))
        progress("verify", len(checks), 5)
        return passed

    if not check("report", lambda: _report(folder)):
        return Verification(tuple(checks))
    report = Report.load(folder)
    check("files", lambda: _files(folder, report))
    sound = check("tensors", lambda: _tensors(folder, report, trust_remote_code))
    if sound and check("forward", lambda: _forward(folder, trust_remote_code)):
        check("loading", lambda: _loading(folder, trust_remote_code))
    return Verification(tuple(checks))


def _report(folder: Path) -> tuple[bool, str]:
    report = Report.load(folder)
    recipe = read_yaml(folder / RECIPE) if (folder / RECIPE).exists() else report.recipe
    if recipe != report.recipe:
        return False, f"{RECIPE} and the recipe in the report differ"
    return True, f"written by molae_compress {report.versions.get('molae_compress')} for {report.model}"


def _files(folder: Path, report: Report) -> tuple[bool, str]:
    weights = {path.name for path in folder.glob("*.safetensors*")}
    if strangers := sorted(({"config.json"} | weights) - report.files.keys()):
        return False, f"the report does not vouch for '{strangers[0]}'"
    for name, expected in report.files.items():
        if not (folder / name).exists():
            return False, f"'{name}' is missing"
        digest = hashlib.sha256()
        with (folder / name).open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        if digest.hexdigest() != expected:
            return False, f"'{name}' has sha256 {digest.hexdigest()[:16]}…, the report says {expected[:16]}…"
    return True, f"{len(report.files)} files have the sha256 of the report"


def _tensors(folder: Path, report: Report, trust_remote_code: bool) -> tuple[bool, str]:
    """Names and shapes against the model class, latent modules and bytes against the report."""
    source = _open(folder, trust_remote_code)
    found = {
        name: module.shape.to_dict() for name, module in source.model.named_modules() if isinstance(module, LatentExperts)
    }
    expected = {layer.name: layer.shape for layer in report.layers if layer.shape is not None}
    if found != expected:
        differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        return False, f"config.json and the report differ in {differing[0]} and {len(differing) - 1} more"
    stored = sum(entry.nbytes for entry in source.checkpoint.entries.values())
    if stored != report.artifact["bytes"]:
        return False, f"tensors take {stored} bytes, the report says {report.artifact['bytes']}"
    unknown = f", {len(source.keys.unknown)} of them unknown to the class" if source.keys.unknown else ""
    return True, f"{len(source.checkpoint.entries)} tensors{unknown}; {len(found)} latent modules; {stored:,} bytes"


def _forward(folder: Path, trust_remote_code: bool) -> tuple[bool, str]:
    logits_TV = probe(_open(folder, trust_remote_code))
    return bool(logits_TV.isfinite().all()), f"logits of {len(logits_TV)} tokens, layer by layer"


def _loading(folder: Path, trust_remote_code: bool) -> tuple[bool, str]:
    source = _open(folder, trust_remote_code)
    if 4 * sum(tensor.numel() for tensor in source.model.state_dict().values()) > psutil.virtual_memory().available // 2:
        return True, "skipped: the model is larger than half of the free memory"
    config = read_config(folder, trust_remote_code=trust_remote_code)
    loaded: Any = model_class(config).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=trust_remote_code
    )
    model, info = loaded
    wrong = {kind: sorted(keys) for kind, keys in info.items() if keys and kind != "unexpected_keys"}
    if wrong:
        kind, keys = next(iter(wrong.items()))
        return False, f"from_pretrained reports {kind}: {keys[0]} and {len(keys) - 1} more"
    with torch.no_grad():
        out = model.eval()(**model_inputs(model, _probe_ids(source)))
    loaded_TV = (out.logits if hasattr(out, "logits") else out[0])[0].float()
    streamed_TV = probe(source)
    off = float((loaded_TV - streamed_TV).abs().max() / streamed_TV.abs().max())
    return off < 1e-3, f"from_pretrained and the forward layer by layer differ by {off:.1e} of the largest logit"


def probe(source: DiskSource) -> Tensor:
    """[T,V] float32: logits of a few fixed tokens, one layer in memory at a time."""
    ids_1T = _probe_ids(source)
    arguments = LayerArguments(source.model, source.layers.paths, source.device)
    with source.ends(head=True), torch.no_grad():
        (passed,) = forwarded(source, arguments, [ids_1T], lambda _: None)
        return arguments.logits(ids_1T, passed)[0].float()


def _probe_ids(source: DiskSource) -> Tensor:
    return (torch.arange(_PROBE_TOKENS) * 7919 + 17).remainder(source.vocabulary)[None]


def _open(folder: Path, trust_remote_code: bool) -> DiskSource:
    read_config(folder, trust_remote_code=trust_remote_code)
    return DiskSource.open(str(folder), device=torch.device("cpu"), trust_remote_code=trust_remote_code, dense=False)
