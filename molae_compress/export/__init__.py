"""Models as ONNX files: written, checked against torch, and run."""

from molae_compress.export.exporter import Export, export_onnx
from molae_compress.export.lowering import Lowering
from molae_compress.export.runtime import generate, open_model

__all__ = ["Export", "Lowering", "export_onnx", "generate", "open_model"]
