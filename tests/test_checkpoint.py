"""Reading, writing and resuming on disk: bit for bit, and what damaged or foreign files get."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from molae_compress.checkpoint import (
    ArrayStore,
    Checkpoint,
    TensorSource,
    WorkDirectory,
    assert_accounted,
    check_free_space,
    check_output_folder,
    companion_files,
    publish,
    refuse_quantized,
    resolve_model,
    write_safetensors,
    write_shards,
)
from molae_compress.checkpoint.reader import DTYPES
from molae_compress.errors import CheckpointError, ResumeError

INDEX = "model.safetensors.index.json"


def tensor_of(code: str, *shape: int) -> Tensor:
    """Random bits of a type, without NaN or infinity."""
    dtype = DTYPES[code]
    generator = torch.Generator().manual_seed(sum(code.encode()))
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator).abs().add(0.5).to(dtype)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


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


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "fp8"}},
        {"text_config": {"quantization_config": {"quant_method": "mxfp4"}}},
        {"compression_config": {"format": "x"}},
    ],
)
def test_quantised_sources_are_refused(config: dict[str, Any]) -> None:
    method = "fp8" if "quantization_config" in config else "mxfp4" if "text_config" in config else "unknown"
    with pytest.raises(CheckpointError, match=f"method '{method}'.*dequantize"):
        refuse_quantized(config)
    refuse_quantized({"quantization_config": None, "text_config": {"hidden_size": 4}})
    with pytest.raises(CheckpointError, match=r"compressed by molae_compress already.*expand"):
        refuse_quantized({"quantization_config": {"quant_method": "molae"}})


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
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(7)}
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
    with pytest.raises(CheckpointError, match=r"The artifact needs 1000000000\.00 GB on the disk of"):
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


# ---------------------------------------------------------------- the work directory

INPUTS = {"observe": {"model": "m1", "data": "d1"}, "solve": {"model": "m1", "data": "d1", "budget.keep": "0.6"}}


def other(stage: str, **changes: str) -> dict[str, dict[str, str]]:
    return INPUTS | {stage: INPUTS[stage] | changes}


def fill(path: Path, **items: list[str]) -> None:
    with WorkDirectory.open(path, stage_inputs=INPUTS) as work:
        for stage, names in items.items():
            for name in names:
                work.commit(stage, name, {"x": torch.arange(4.0)}, {"loss": 0.1, "of": name})


def test_committed_items_are_found_again(tmp_path: Path) -> None:
    tensors = {f"t.{code}": tensor_of(code, 3, 5) for code in DTYPES}
    info = {"loss": 0.1 + 0.2, "ranks": [1, 2], "name": "é"}
    with WorkDirectory.open(tmp_path / "w", stage_inputs=INPUTS) as work:
        work.commit("observe", "model.layers.0.mlp.experts", tensors, info)
        work.commit("observe", "empty", {}, {})
        first = work.path("observe", "model.layers.0.mlp.experts").read_bytes()
        work.commit("observe", "model.layers.0.mlp.experts", tensors, info)
        assert work.path("observe", "model.layers.0.mlp.experts").read_bytes() == first
    with WorkDirectory.open(tmp_path / "w", stage_inputs=INPUTS) as work:
        assert work.done("observe") == {"model.layers.0.mlp.experts", "empty"}
        assert work.done("solve") == set()
        loaded, loaded_info = work.load("observe", "model.layers.0.mlp.experts")
        assert loaded_info == info
        assert {name: bits(tensor) for name, tensor in loaded.items()} == {n: bits(t) for n, t in tensors.items()}
        assert work.load("observe", "empty") == ({}, {})
        work.remove()
    assert not (tmp_path / "w").exists()


def test_a_commit_that_fails_leaves_the_item_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, observe=["0"])
    before = (tmp_path / "observe/0.safetensors").read_bytes()

    def fail(*paths: Path) -> None:
        raise OSError(28, "No space left on device")

    with WorkDirectory.open(tmp_path, stage_inputs=INPUTS) as work:
        monkeypatch.setattr(os, "replace", fail)
        for item in ("0", "1"):
            with pytest.raises(CheckpointError, match=r"Disk full.*resumes"):
                work.commit("observe", item, {"x": torch.ones(2)}, {})
        assert work.done("observe") == {"0"}
    assert (tmp_path / "observe/0.safetensors").read_bytes() == before


def test_damaged_items_and_leftovers_do_not_count(tmp_path: Path) -> None:
    fill(tmp_path, observe=["0", "1"])
    item = tmp_path / "observe/1.safetensors"
    item.write_bytes(item.read_bytes()[:-1])
    leftover = tmp_path / "observe/.2.safetensors.tmp"
    leftover.write_bytes(b"half")
    with WorkDirectory.open(tmp_path, stage_inputs=INPUTS) as work:
        assert work.done("observe") == {"0"}
        assert not leftover.exists()


def test_other_inputs_do_not_resume_silently(tmp_path: Path) -> None:
    fill(tmp_path, observe=["0", "1"], solve=["0"])
    with pytest.raises(ResumeError) as caught:
        WorkDirectory.open(
            tmp_path, stage_inputs=other("solve", **{"budget.keep": "0.5", "new": "1"}), reusable={"observe"}
        )
    message = str(caught.value)
    assert "1 finished items" in message
    assert "solve: budget.keep: 0.6 -> 0.5; solve: new: absent -> 1." in message
    assert "--fresh" in message
    assert "(observe would be kept)" in message
    assert "--work-dir" in message
    assert "observe:" not in message
    with WorkDirectory.open(tmp_path, stage_inputs=INPUTS) as work:
        assert (work.done("observe"), work.done("solve")) == ({"0", "1"}, {"0"})


def test_a_stage_that_is_gone_counts_as_different(tmp_path: Path) -> None:
    fill(tmp_path, solve=["0"])
    with pytest.raises(ResumeError, match=r"solve: budget\.keep: 0\.6 -> absent"):
        WorkDirectory.open(tmp_path, stage_inputs={"observe": INPUTS["observe"]})


def test_inputs_of_a_stage_without_items_may_change(tmp_path: Path) -> None:
    fill(tmp_path, observe=["0"])
    changed = other("solve", **{"budget.keep": "0.5"})
    with WorkDirectory.open(tmp_path, stage_inputs=changed) as work:
        assert work.done("observe") == {"0"}
        work.commit("solve", "0", {}, {})
    with pytest.raises(ResumeError, match=r"budget\.keep: 0\.5 -> 0\.6"):
        WorkDirectory.open(tmp_path, stage_inputs=INPUTS)


@pytest.mark.parametrize(
    ("inputs", "reusable", "kept"),
    [
        (INPUTS, set(), set()),
        (INPUTS, {"observe"}, {"0"}),
        (other("solve", **{"budget.keep": "0.5"}), {"observe"}, {"0"}),
        (other("observe", data="d2"), {"observe"}, set()),
    ],
)
def test_fresh_keeps_only_reusable_stages_with_equal_inputs(
    tmp_path: Path, inputs: dict[str, dict[str, str]], reusable: set[str], kept: set[str]
) -> None:
    fill(tmp_path, observe=["0"], solve=["0"])
    with WorkDirectory.open(tmp_path, stage_inputs=inputs, fresh=True, reusable=reusable) as work:
        assert work.done("observe") == kept
        assert work.done("solve") == set()


def test_folders_of_others_are_never_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(ResumeError, match=r"thesis\.txt"):
            WorkDirectory.open(tmp_path, stage_inputs=INPUTS, fresh=fresh)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(ResumeError, match="not a folder"):
        WorkDirectory.open(tmp_path / "thesis.txt", stage_inputs=INPUTS)


@pytest.mark.parametrize("manifest", ["{", "[]", '{"format": 99, "stages": {}}'])
def test_a_manifest_that_cannot_be_read_is_refused(tmp_path: Path, manifest: str) -> None:
    fill(tmp_path, observe=["0"])
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(ResumeError, match=r"manifest\.json"):
        WorkDirectory.open(tmp_path, stage_inputs=INPUTS, fresh=True)
    assert (tmp_path / "observe/0.safetensors").exists()


def test_a_start_that_was_killed_leaves_a_directory_that_is_ours(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".manifest.json.tmp").write_text("{")
    with WorkDirectory.open(tmp_path, stage_inputs=INPUTS) as work:
        assert work.done("observe") == set()
    assert not (tmp_path / ".manifest.json.tmp").exists()


def test_two_processes_do_not_share_a_work_directory(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from molae_compress.checkpoint import WorkDirectory\n"
        "from molae_compress.errors import ResumeError\n"
        "try: WorkDirectory.open(Path(sys.argv[1]), stage_inputs={'a': {}})\n"
        "except ResumeError as error: print(error)"
    )

    def second() -> str:
        run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
        return run.stdout

    with WorkDirectory.open(tmp_path, stage_inputs={"a": {}}):
        assert "in use by another process" in second()
    assert second() == ""


def test_a_run_killed_at_any_moment_leaves_whole_items(tmp_path: Path) -> None:
    program = """
import sys, torch
from pathlib import Path
from molae_compress.checkpoint import WorkDirectory
work = WorkDirectory.open(Path(sys.argv[1]), stage_inputs={"observe": {}})
print("ready", flush=True)
for item in range(10**6):
    work.commit("observe", str(item), {"x": torch.full((1 << 18,), float(item))}, {"item": item})
"""
    for delay in (0.02, 0.05, 0.11):
        process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    with WorkDirectory.open(tmp_path, stage_inputs={"observe": {}}) as work:
        done = work.done("observe")
        assert len(done) == len(list((tmp_path / "observe").iterdir()))
        assert done
        for item in done:
            tensors, info = work.load("observe", item)
            assert torch.equal(tensors["x"], torch.full((1 << 18,), float(item)))
            assert info == {"item": int(item)}


# ---------------------------------------------------------------- the array store


@pytest.mark.parametrize("limit", [0, 200, 10**9])
def test_array_store_gives_back_every_bit(tmp_path: Path, limit: int) -> None:
    store = ArrayStore(tmp_path / "spill", memory_limit=limit)
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    tensors = [tensor_of(code, 4, 3) for code in DTYPES] + [torch.empty(0, 4), torch.randn(6, 8).T, special]
    for i, tensor in enumerate(tensors):
        store.put(i, tensor)
    assert len(store) == len(tensors)
    assert store.resident_bytes <= limit
    assert (limit == 10**9) == (not (tmp_path / "spill").exists())
    for i, tensor in enumerate(tensors):
        assert store.get(i).shape == tensor.shape
        assert store.get(i).dtype == tensor.dtype
        assert bits(store.get(i)) == bits(tensor)
    store.clear()
    assert len(store) == store.resident_bytes == 0
    assert not (tmp_path / "spill").exists()


def test_array_store_replaces_and_accounts(tmp_path: Path) -> None:
    store = ArrayStore(tmp_path, memory_limit=100)
    store.put(0, torch.zeros(20))
    store.put(1, torch.zeros(20))
    assert (store.resident_bytes, len(list(tmp_path.iterdir()))) == (80, 1)
    store.put(0, torch.ones(30))
    store.put(1, torch.ones(25))
    assert (store.resident_bytes, len(list(tmp_path.iterdir())), len(store)) == (100, 1, 2)
    assert store.get(0).tolist() == [1.0] * 30
    assert store.get(1).tolist() == [1.0] * 25


def test_array_store_does_not_keep_the_whole_behind_a_view(tmp_path: Path) -> None:
    store = ArrayStore(tmp_path, memory_limit=10**6)
    whole = torch.zeros(1000)
    store.put(0, whole[:10])
    assert store.get(0).untyped_storage().nbytes() == 40


def test_array_store_notices_a_lost_file(tmp_path: Path) -> None:
    store = ArrayStore(tmp_path, memory_limit=0)
    store.put(0, torch.zeros(20))
    next(tmp_path.iterdir()).write_bytes(b"short")
    with pytest.raises(CheckpointError, match="removed or truncated"):
        store.get(0)


# ---------------------------------------------------------------- where a model comes from


def test_an_existing_folder_is_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/name").mkdir(parents=True)
    assert resolve_model("owner/name") == Path("owner/name")
    with pytest.raises(CheckpointError, match="revision 'v1' was given for the folder"):
        resolve_model("owner/name", revision="v1")


@pytest.mark.parametrize("model", ["./absent", "../absent/model", "/absent/model", "~/absent-model", "absent", "a/b/c"])
def test_a_path_that_does_not_exist_never_reaches_the_hub(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_model(model)


def test_a_misspelt_folder_gets_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/pocket-moe").mkdir(parents=True)
    with pytest.raises(
        CheckpointError, match=r"'models/poket-moe' does not exist\. Close to it are: models/pocket-moe\."
    ):
        resolve_model("models/poket-moe")
    (tmp_path / "models/file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_model("models/file")


# The hub's own classes want a response of its client, which is not to be built here: hence `__new__`.
@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (lambda: hub_errors.GatedRepoError.__new__(hub_errors.GatedRepoError), "gated.*hf auth login"),
        (lambda: hub_errors.RepositoryNotFoundError.__new__(hub_errors.RepositoryNotFoundError), "neither a folder"),
        (lambda: hub_errors.RevisionNotFoundError.__new__(hub_errors.RevisionNotFoundError), "no revision 'v1'"),
        (lambda: hub_errors.HFValidationError("bad id"), "neither a folder"),
        (lambda: hub_errors.LocalEntryNotFoundError("offline"), "at revision 'v1' is not in the local cache.*offline"),
        (lambda: OSError("no space"), "download of the model 'owner/name'.*failed.*no space"),
    ],
)
def test_errors_of_the_hub_become_ours(
    make: Callable[[], Exception], fragment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def snapshot_download(repo_id: str, **options: Any) -> str:
        assert (repo_id, options["revision"]) == ("owner/name", "v1")
        raise make()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=fragment):
        resolve_model("owner/name", revision="v1")


def test_a_hub_id_is_downloaded_without_other_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fnmatch import fnmatch

    monkeypatch.chdir(tmp_path)
    taken: list[str] = []
    offered = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "modeling_x.py", "LICENSE"]
    offered += ["pytorch_model.bin", "original/model.safetensors", "consolidated.safetensors", "x.gguf", "README.md"]

    def snapshot_download(
        repo_id: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        taken.extend(
            name
            for name in offered
            if any(fnmatch(name, p) for p in allow_patterns) and not any(fnmatch(name, p) for p in ignore_patterns)
        )
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model("owner/name") == tmp_path
    assert taken == offered[:5]


def test_companions_are_everything_but_weights_config_and_card(tmp_path: Path) -> None:
    wanted = [
        "LICENSE",
        "LICENSE.txt",
        "NOTICE",
        "added_tokens.json",
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "chat_template.json",
        "configuration_deepseek.py",
        "generation_config.json",
        "merges.txt",
        "preprocessor_config.json",
        "processor_config.json",
        "qwen.tiktoken",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
    ]
    unwanted = [
        "README.md",
        "config.json",
        "model.safetensors",
        INDEX,
        "pytorch_model.bin",
        "tokenizer.bin",
        "model.pt",
        "model.pth",
        "tokenizer.gguf",
        "vocab.onnx",
        "training_log.json",
        "recipe.yaml",
        "original/tokenizer.model",
    ]
    for name in wanted + unwanted:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "tokenizer_folder").mkdir()
    assert [str(path.relative_to(tmp_path)) for path in companion_files(tmp_path)] == sorted(wanted)
