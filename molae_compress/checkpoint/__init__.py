"""Everything that touches disk: reading checkpoints, writing artifacts, and the resumable state of a run."""

from __future__ import annotations

from molae_compress.checkpoint.dequantize import open_source, without_quantization
from molae_compress.checkpoint.finite import check_finite
from molae_compress.checkpoint.reader import Checkpoint, StoredTensors, TensorEntry
from molae_compress.checkpoint.source import companion_files, resolve_model
from molae_compress.checkpoint.work import WorkDirectory
from molae_compress.checkpoint.writer import (
    TensorSource,
    WrittenFile,
    WrittenShards,
    assert_accounted,
    check_free_space,
    check_output_folder,
    check_place,
    check_places,
    publish,
    put_at,
    write_file,
    write_safetensors,
    write_shards,
)

__all__ = [
    "Checkpoint",
    "StoredTensors",
    "TensorEntry",
    "TensorSource",
    "WorkDirectory",
    "WrittenFile",
    "WrittenShards",
    "assert_accounted",
    "check_finite",
    "check_free_space",
    "check_output_folder",
    "check_place",
    "check_places",
    "companion_files",
    "open_source",
    "publish",
    "put_at",
    "resolve_model",
    "without_quantization",
    "write_file",
    "write_safetensors",
    "write_shards",
]
