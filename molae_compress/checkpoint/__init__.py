"""Everything that touches disk: reading checkpoints, writing artifacts, and the resumable state of a run."""

from __future__ import annotations

from molae_compress.checkpoint.reader import Checkpoint, TensorEntry, check_finite, refuse_quantized
from molae_compress.checkpoint.source import companion_files, resolve_model
from molae_compress.checkpoint.work import WorkDirectory
from molae_compress.checkpoint.writer import (
    TensorSource,
    WrittenFile,
    WrittenShards,
    assert_accounted,
    check_free_space,
    check_output_folder,
    publish,
    write_file,
    write_safetensors,
    write_shards,
)

__all__ = [
    "Checkpoint",
    "TensorEntry",
    "TensorSource",
    "WorkDirectory",
    "WrittenFile",
    "WrittenShards",
    "assert_accounted",
    "check_finite",
    "check_free_space",
    "check_output_folder",
    "companion_files",
    "publish",
    "refuse_quantized",
    "resolve_model",
    "write_file",
    "write_safetensors",
    "write_shards",
]
