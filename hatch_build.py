"""Part of building the package: compiles the operator library into it, if there is a compiler."""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LIBRARY = "molae_compress/kernels/libmolae_ops.so"


class OperatorLibrary(BuildHookInterface):
    """Runs for wheels and editable installs alike; without a compiler the package is built without the library."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        # Loaded by its path: importing the package would take what is not installed yet.
        path = Path(self.root) / "molae_compress/kernels/compiling.py"
        spec = importlib.util.spec_from_file_location("compiling", path)
        assert spec is not None
        assert spec.loader is not None
        compiling = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(compiling)
        target = Path(self.root) / LIBRARY
        try:
            if not compiling.is_current(target):
                compiling.compile_library(target)
        except compiling.CompileError as error:
            target.unlink(missing_ok=True)
            self.app.display_warning(
                f"molae_compress is built without its ONNX operators: {error}. All else works; with a compiler, "
                "`python -c 'from molae_compress.kernels import build; build()'` adds them later."
            )
            return
        build_data["artifacts"].append(LIBRARY)
        build_data["pure_python"] = False
        # Any Python: the library does not know of it. Its platform is this one.
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
