"""Reading and writing checkpoints: bit for bit, and what damaged or foreign files get."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from molae_compress.checkpoint import (
    Checkpoint,
    TensorSource,
    assert_accounted,
    check_free_space,
    check_output_folder,
    publish,
    write_safetensors,
    write_shards,
)
from molae_compress.checkpoint.reader import DTYPES
from molae_compress.errors import CheckpointError, ResumeError
from tests.runs import bits, tensor_of

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Three shards with an index, as transformers writes them."""
    folder = tmp_path / "model"
    folder.mkdir()
    weight_map = {}
    for number in (1, 2, 3):
        name = f"model-{number:05d}-of-00003.safetensors"
        tensors = {f"layers.{number}.{part}": torch.randn(8, 4).to(torch.bfloat16) for part in ("a", "b")}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return folder


# ---------------------------------------------------------------- reading


def test_headers_and_tensors_agree_with_the_safetensors_library(sharded: Path) -> None:
    checkpoint = Checkpoint.open(sharded)
    assert len(checkpoint.entries) == 6
    assert checkpoint.total_bytes == 6 * 8 * 4 * 2
    for file in checkpoint.files:
        for name, tensor in load_file(file).items():
            entry = checkpoint.entries[name]
            assert (entry.file, entry.shape, entry.torch_dtype) == (file, tuple(tensor.shape), tensor.dtype)
            assert torch.equal(checkpoint.read(name), tensor)
            assert file.read_bytes()[entry.start : entry.end] == bits(tensor)
            for size in (1, 7, 64, 10**6):
                assert b"".join(checkpoint.chunks(name, size)) == bits(tensor)


def test_reading_keeps_no_handle_and_shares_no_memory(sharded: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    checkpoint = Checkpoint.open(sharded)
    first = checkpoint.read("layers.1.a")
    first.zero_()
    assert checkpoint.read("layers.1.a").abs().sum() > 0
    assert len(os.listdir("/proc/self/fd")) == before


def test_only_the_shards_of_the_index_are_read(sharded: Path) -> None:
    save_file({"layers.1.a": torch.ones(2)}, sharded / "consolidated.safetensors")
    assert len(Checkpoint.open(sharded).files) == 3


def test_tensors_that_the_index_forgets_are_part_of_the_checkpoint(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    del index["weight_map"]["layers.2.b"]
    (sharded / INDEX).write_text(json.dumps(index))
    assert "layers.2.b" in Checkpoint.open(sharded).entries


def refused(folder: Path, *fragments: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    refused(sharded, "lacks 1 of the 3", "model-00002-of-00003.safetensors")


def test_a_tensor_stored_twice_is_refused(sharded: Path) -> None:
    shutil.copy(sharded / "model-00001-of-00003.safetensors", sharded / "model-00003-of-00003.safetensors")
    refused(sharded, "'layers.1.a' is stored twice", "model-00001", "model-00003")


def test_an_index_that_disagrees_with_its_shards_is_refused(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    for name, file in {
        "layers.9.a": "model-00001-of-00003.safetensors",
        "layers.1.a": "model-00002-of-00003.safetensors",
    }.items():
        changed = index | {"weight_map": index["weight_map"] | {name: file}}
        (sharded / INDEX).write_text(json.dumps(changed))
        refused(sharded, name, file, "does not hold it")


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../x"}}']
)
def test_a_malformed_index_is_refused(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    refused(sharded, INDEX, "cannot be read")


@pytest.mark.parametrize("keep", [0, 5, 8, 30, -1, -40])
def test_a_truncated_shard_is_refused(sharded: Path, keep: int) -> None:
    file = sharded / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(sharded, str(file), "truncated")


def safetensors_bytes(header: Any, data: bytes) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


@pytest.mark.parametrize(
    ("header", "data", "fragment"),
    [
        (b"{nonsense", b"", "malformed"),
        (b"[]", b"", "malformed"),
        ({"a": 1}, b"", "malformed"),
        ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4), "malformed"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4), "cannot have 4 bytes"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}, bytes(4), "malformed"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8), "leaves a gap"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(8), "4 bytes more"),
        (
            {n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"},
            bytes(4),
            "overlaps another",
        ),
        ({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, bytes(1), "data type 'F4'"),
        ({"a": {"dtype": "Q9", "shape": [2], "data_offsets": [0, 4]}}, bytes(4), "data type 'Q9'"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, header: Any, data: bytes, fragment: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(safetensors_bytes(header, data))
    refused(tmp_path, str(file), fragment)


def test_folders_without_readable_weights_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "does not exist")
    refused(tmp_path, "holds no weights")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    refused(tmp_path, "pytorch_model.bin", "pickle", "save_pretrained")
    for name in ("one", "two"):
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    refused(tmp_path, "2 safetensors files", INDEX)
    (tmp_path / "two.safetensors").unlink()
    assert list(Checkpoint.open(tmp_path).entries) == ["one"]


def holds(code: str, number: float) -> bool:
    return DTYPES[code].is_floating_point and not torch.isfinite(torch.tensor(number).to(DTYPES[code]).float())


@pytest.mark.parametrize(
    ("code", "bad"),
    [(code, bad) for code in DTYPES for bad in (float("nan"), float("inf"), float("-inf")) if holds(code, bad)],
)
@pytest.mark.parametrize("position", [0, 17, -1])
def test_nan_and_infinity_are_refused_by_name(tmp_path: Path, code: str, bad: float, position: int) -> None:
    tensor = tensor_of(code, 37)
    tensor[position] = bad
    write_raw(tmp_path / "model.safetensors", "bad.weight", tensor)
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match=r"'bad\.weight' in .* NaN or infinite"):
        checkpoint.read("bad.weight")
    with pytest.raises(CheckpointError, match=r"'bad\.weight' in .* NaN or infinite"):
        list(checkpoint.chunks("bad.weight", 8))
    with pytest.raises(CheckpointError, match=r"'bad\.weight' computed by this run"):
        write_safetensors(tmp_path / "out", [TensorSource.of("bad.weight", tensor)])


def write_raw(path: Path, name: str, tensor: Tensor) -> None:
    """A file with any contents; the package itself writes no NaN."""
    code = next(code for code, dtype in DTYPES.items() if dtype == tensor.dtype)
    data = bits(tensor)
    header = {name: {"dtype": code, "shape": list(tensor.shape), "data_offsets": [0, len(data)]}}
    path.write_bytes(safetensors_bytes(header, data))


def test_a_single_number_may_be_infinite_but_not_nan(tmp_path: Path) -> None:
    """Open limits for clipping are stored as infinities; the last piece of a large tensor is no single number."""
    write_raw(tmp_path / "limit.safetensors", "limit", torch.tensor(float("inf")))
    limit = Checkpoint.open(tmp_path / "limit.safetensors")
    assert limit.read("limit").item() == float("inf")
    written = write_safetensors(tmp_path / "copy", [TensorSource.copied(limit, "limit")])
    assert written.nbytes > 0
    write_raw(tmp_path / "nan.safetensors", "nan", torch.tensor(float("nan")))
    with pytest.raises(CheckpointError, match="'nan'"):
        Checkpoint.open(tmp_path / "nan.safetensors").read("nan")
    write_raw(tmp_path / "tail.safetensors", "tail", torch.tensor([1.0, 1.0, float("inf")]))
    with pytest.raises(CheckpointError, match="'tail'"):
        list(Checkpoint.open(tmp_path / "tail.safetensors").chunks("tail", 4))


def test_fingerprint_follows_the_contents_and_not_the_place(sharded: Path, tmp_path: Path) -> None:
    original = Checkpoint.open(sharded).fingerprint()
    shutil.copytree(sharded, tmp_path / "copy", copy_function=shutil.copyfile)
    assert Checkpoint.open(tmp_path / "copy").fingerprint() == original
    file = tmp_path / "copy" / "model-00002-of-00003.safetensors"
    tensors = load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    retrained = Checkpoint.open(tmp_path / "copy").fingerprint()
    save_file({name: tensor.view(4, 8) for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
    reshaped = Checkpoint.open(tmp_path / "copy").fingerprint()
    assert len({original, retrained, reshaped}) == 3


def test_a_file_that_goes_away_meanwhile_is_a_plain_error(sharded: Path) -> None:
    checkpoint = Checkpoint.open(sharded)
    file = checkpoint.entries["layers.2.b"].file
    os.truncate(file, file.stat().st_size - 8)
    with pytest.raises(CheckpointError, match=r"ended inside the tensor 'layers\.2\.b'"):
        checkpoint.read("layers.2.b")
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        list(checkpoint.chunks("layers.2.a"))


# ---------------------------------------------------------------- writing


def test_written_files_are_read_by_the_safetensors_library(tmp_path: Path) -> None:
    """Every type, odd sizes, scalars and empty tensors, in one file: alignment is what the library is strict about."""
    tensors = {
        f"t.{code}.{'x'.join(map(str, shape))}": tensor_of(code, *shape)
        for code in reversed(DTYPES)
        for shape in ((3,), (), (0, 4), (5, 7))
    }
    written = write_shards(
        tmp_path, [TensorSource.of(name, tensor) for name, tensor in tensors.items()], max_shard_size=10**9
    )
    assert [file.name for file in written.files] == ["model.safetensors"]
    assert not (tmp_path / INDEX).exists()
    checkpoint = Checkpoint.open(tmp_path)
    for name, tensor in tensors.items():
        assert bits(checkpoint.read(name)) == bits(tensor)
        assert checkpoint.read(name).shape == tensor.shape
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float8_e8m0fnu:
                assert bits(file.get_tensor(name)) == bits(tensor)


def test_a_file_equals_the_one_the_library_writes(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(7), "A": tensor_of("U8", 3), "aa": tensor_of("BF16", 3)}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    write_safetensors(tmp_path / "ours", [TensorSource.of(name, tensors[name]) for name in sorted(tensors)])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_shards_copy_bit_for_bit_and_say_what_was_written(sharded: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(sharded)
    limit = 3 * 64
    runs = []
    for out in (tmp_path / "one", tmp_path / "two"):
        out.mkdir()
        sources = [TensorSource.copied(source, name) for name in source.entries]
        sources.append(TensorSource.of("large", torch.ones(1000)))
        sources.append(TensorSource.stored(source.files[0], "layers.1.a", "renamed"))
        runs.append(write_shards(out, sources, max_shard_size=limit))
    written = runs[0]
    assert runs[1] == written
    assert [file.name for file in written.files[:-1]] == [f"model-{n:05d}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    for file in written.files:
        content = (tmp_path / "one" / file.name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file.nbytes, file.sha256)
        assert content == (tmp_path / "two" / file.name).read_bytes()
    index = json.loads((tmp_path / "one" / INDEX).read_text())
    assert index == {"metadata": {"total_size": written.total_size}, "weight_map": written.weight_map}
    copy = Checkpoint.open(tmp_path / "one")
    assert copy.total_bytes == written.total_size == source.total_bytes + 4000 + 64
    for name in source.entries:
        assert bits(copy.read(name)) == bits(source.read(name))
    assert torch.equal(copy.read("renamed"), source.read("layers.1.a"))
    for file in copy.files:
        sizes = [entry.nbytes for entry in copy.entries.values() if entry.file == file]
        assert sum(sizes) <= limit or len(sizes) == 1


def test_writing_and_copying_hold_one_chunk(tmp_path: Path) -> None:
    """64 MiB through a process that may grow by less than half of that."""
    program = """
import re, sys, torch
from pathlib import Path
from molae_compress.checkpoint import Checkpoint, TensorSource, write_shards
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
folder = Path(sys.argv[1])
zeros = bytes(2**20)
(folder / "a").mkdir(); (folder / "b").mkdir()
before = peak()
made = TensorSource("x", "BF16", (2**25,), lambda: (zeros for _ in range(64)))
write_shards(folder / "a", [made], max_shard_size=10**9)
source = Checkpoint.open(folder / "a")
write_shards(folder / "b", [TensorSource.copied(source, "x")], max_shard_size=10**9)
print(peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 60
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_plain_error_and_leaves_no_file(tmp_path: Path) -> None:
    target = tmp_path / "model.safetensors"
    target.symlink_to("/dev/full")
    sources = [TensorSource.of("x", torch.ones(2**20))]
    with pytest.raises(CheckpointError, match=r"Disk full while writing '.*model\.safetensors'.*free.*resumes"):
        write_shards(tmp_path, sources, max_shard_size=10**9)
    assert not target.is_symlink()
    write_shards(tmp_path, sources, max_shard_size=10**9)
    assert torch.equal(Checkpoint.open(tmp_path).read("x"), torch.ones(2**20))


def test_other_write_errors_are_plain_too(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_shards(tmp_path / "absent", [TensorSource.of("x", torch.ones(1))], max_shard_size=10**9)


def test_publish_moves_a_folder_once(tmp_path: Path) -> None:
    def finished(name: str) -> Path:
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "file").write_text(name)
        return tmp_path / name

    final = tmp_path / "final"
    publish(finished("first"), final)
    assert (final / "sub/file").read_text() == "first"
    assert not (tmp_path / "first").exists()
    with pytest.raises(ResumeError, match="final' exists and is not empty"):
        publish(finished("second"), final)
    assert (final / "sub/file").read_text() == "first"
    (tmp_path / "empty").mkdir()
    publish(tmp_path / "second", tmp_path / "empty")
    assert (tmp_path / "empty/sub/file").read_text() == "second"


def test_output_folders_that_are_not_ours_are_refused(tmp_path: Path) -> None:
    check_output_folder(tmp_path / "new/deep", ours=lambda path: False)
    assert not (tmp_path / "new").exists()
    folder = tmp_path / "out"
    folder.mkdir()
    check_output_folder(folder, ours=lambda path: False)
    (folder / "thesis.txt").write_text("mine")
    check_output_folder(folder, ours=lambda path: (path / "thesis.txt").exists())
    with pytest.raises(ResumeError, match="not empty"):
        check_output_folder(folder, ours=lambda path: False)
    with pytest.raises(ResumeError):
        check_output_folder(folder / "thesis.txt", ours=lambda path: True)
    with pytest.raises(CheckpointError, match="cannot be created"):
        check_output_folder(folder / "thesis.txt" / "out", ours=lambda path: True)


def test_free_space_is_checked_on_the_disk_of_the_folder(tmp_path: Path) -> None:
    check_free_space(tmp_path / "not/there/yet", 1, "The artifact")
    with pytest.raises(CheckpointError, match=r"The artifact needs 1000000\.00 TB on the disk of"):
        check_free_space(tmp_path / "not/there/yet", 10**18, "The artifact")


def test_every_source_tensor_is_replaced_or_copied() -> None:
    assert_accounted("abcd", "ab", "cd")
    for replaced, copied, fragment in [
        ("ab", "c", r"1 neither replaced nor copied \(d\)"),
        ("abc", "cd", r"1 both replaced and copied \(c\)"),
        ("abx", "cd", r"1 not in the source \(x\)"),
    ]:
        with pytest.raises(CheckpointError, match=fragment):
            assert_accounted("abcd", replaced, copied)
