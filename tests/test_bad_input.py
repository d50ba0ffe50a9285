"""What bad input gets: one clear refusal with a remedy, no result that looks finished, and an untouched source."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import molae_compress as molae
from molae_compress import Recipe, apply, stream
from molae_compress.checkpoint import Checkpoint, writer
from molae_compress.errors import (
    CheckpointError,
    DataError,
    ModelError,
    MolaeError,
    QualityGateError,
    RecipeError,
    ResumeError,
)
from tests.conftest import CheckpointMaker
from tests.runs import edit_json, hashes, recipe_for, same_every_time, tensors_in
from tests.tiny import tiny_tokenizer

Edit = Callable[[Path], None]


@pytest.fixture
def source(own_checkpoint: CheckpointMaker) -> Path:
    """A checkpoint to damage, in several shards."""
    return own_checkpoint("qwen3_moe", shards=True)


def refused(
    kind: type[MolaeError], match: str, recipe: Recipe | dict[str, Any] | str, out: Path, **options: Any
) -> MolaeError:
    """The refusal of a run: of this kind, with a remedy, leaving nothing at `out` and the source as it was."""
    model = recipe.model if isinstance(recipe, Recipe) else None
    folder = Path(model) if model is not None and Path(model).is_dir() else None
    before = hashes(folder) if folder else {}
    with pytest.raises(kind, match=match) as found:
        molae.run(recipe, out, **options)
    assert found.value.remedy
    assert not out.exists()
    assert folder is None or hashes(folder) == before
    return found.value


def refused_at_once(
    kind: type[MolaeError], match: str, recipe: Recipe | dict[str, Any] | str, out: Path, **options: Any
) -> MolaeError:
    """The same, before a weight is read and anything is written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "read", lambda *_: pytest.fail("read a weight"))
        patch.setattr(Checkpoint, "chunks", lambda *_: pytest.fail("read a weight"))
        found = refused(kind, match, recipe, out, **options)
    assert not out.with_name(f"{out.name}.work").exists()
    return found


def with_tensor(source: Path, pattern: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> str:
    """Changes (or, with None, removes) the first tensor whose name matches; returns the name."""
    for shard in sorted(source.glob("*.safetensors")):
        tensors = load_file(shard)
        name = next((key for key in sorted(tensors) if re.search(pattern, key)), None)
        if name is not None:
            changed = change(tensors.pop(name).clone())
            save_file(tensors | ({} if changed is None else {name: changed}), shard, metadata={"format": "pt"})
            return name
    raise AssertionError(pattern)


# The recipe


def test_a_recipe_that_cannot_be_meant(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plain = {"molae": 1, "model": str(source)}
    refused_at_once(RecipeError, "There is no recipe", str(tmp_path / "absent.yaml"), out)
    refused_at_once(RecipeError, "Did you mean", plain | {"budget": {"keeep": 0.5}}, out)
    refused_at_once(RecipeError, "names no model", {"molae": 1}, out)
    refused_at_once(CheckpointError, "does not exist", plain | {"model": str(tmp_path / "absent")}, out)
    near = refused_at_once(CheckpointError, "does not exist", plain | {"model": str(source)[:-1]}, out)
    assert str(source) in near.why
    refused_at_once(RecipeError, r"budget\.rank: 32", recipe_for(source, "budget.rank=32"), out)
    for align in (1, 2):
        tiny = recipe_for(source, "budget.keep=0.01", f"budget.align={align}")
        small = refused_at_once(RecipeError, r"too small: the lowest ranks need a share of 0\.\d+\.", tiny, out)
        assert ("align" in small.remedy) == (align > 1)
    refused_at_once(RecipeError, r"50KB` is too small.* kB\.", recipe_for(source, "budget.target_size=50kB"), out)
    refused_at_once(RecipeError, "nothing to compress", recipe_for(source, "budget.keep=1.0"), out)
    refused_at_once(RecipeError, "has already", recipe_for(source, "budget.target_size=1GB"), out)
    refused_at_once(RecipeError, "does not divide", recipe_for(source, "basis.experts_per_input_group=3"), out)


def test_a_wider_type_may_not_eat_up_what_is_saved(own_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    source, wide = own_checkpoint("qwen3_moe", dtype=torch.bfloat16), "output.dtype=float32"
    found = refused_at_once(RecipeError, "more than the .* of the original", recipe_for(source, wide), tmp_path / "out")
    assert "float32" in found.why
    planned = molae.plan(recipe_for(source, wide, "budget.keep=0.45"))
    assert planned.artifact_bytes < planned.source_bytes
    assert molae.plan(recipe_for(source, wide, "budget.rank=full")).artifact_bytes > planned.source_bytes  # was asked for


# Text


@pytest.mark.parametrize("section", ["calibration", "evaluate"])
def test_text_that_cannot_be_used(source: Path, tmp_path: Path, section: str) -> None:
    out = tmp_path / "out"

    def using(name: str, content: bytes | None, **more: Any) -> Recipe:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        entry = json.dumps({"data": str(tmp_path / name), "samples": 2, "sequence_length": 16, **more})
        return recipe_for(source, f"{section}={entry}")

    refused_at_once(DataError, "holds no text", using("empty.txt", b""), out)
    refused_at_once(
        DataError, r"of \S+short.txt has 11 tokens, less than one window", using("short.txt", b"Too short."), out
    )
    refused_at_once(DataError, "not UTF-8", using("latin.txt", "Où est-ce?".encode("latin1") * 9), out)
    refused_at_once(DataError, "There is no file", using("absent.txt", None), out)
    row = json.dumps({"content": "Long enough to fill some windows. " * 4}).encode()
    refused_at_once(DataError, "no column 'text'", using("rows.jsonl", row), out)
    refused_at_once(DataError, "no column 'contents'.*", using("rows.jsonl", None, column="contents"), out)


def test_calibration_without_data_or_tokenizer(source: Path, tmp_path: Path) -> None:
    refused_at_once(
        DataError,
        r"no calibration text: neither `calibration\.data`",
        recipe_for(source, "calibration.data=null"),
        tmp_path / "out",
    )
    for path in source.glob("tokenizer*"):
        path.unlink()
    refused_at_once(ModelError, "tokenizer", recipe_for(source), tmp_path / "out")
    assert molae.run(recipe_for(source, calibrated=False), tmp_path / "data-free").files


def test_a_tokenizer_of_another_model(source: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(400)] + ["apples"])
    tokenizer.save_pretrained(source)
    refused_at_once(DataError, "no embedding", recipe_for(source), tmp_path / "out")


# The model


def test_a_dense_model_is_told_what_was_looked_at(tmp_path: Path) -> None:
    for kind in ("qwen3", "llama"):
        folder = tmp_path / kind
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
        config = AutoConfig.for_model(kind, vocab_size=264, num_key_value_heads=2, **sizes)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        found = refused_at_once(ModelError, "No routed experts", recipe_for(folder), tmp_path / "out")
        assert "Modules named after experts: none" in found.why


def quantised(method: str) -> Edit:
    return lambda folder: edit_json(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def cut(path: Path, count: int) -> None:
    os.truncate(path, path.stat().st_size - count)


def only_a_pickle(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def scales_beside_experts(folder: Path) -> None:
    shard = max(folder.glob("*.safetensors"))
    tensors = load_file(shard) | {"model.layers.1.mlp.experts.3.up_proj.weight_scale_inv": torch.ones(1)}
    save_file(tensors, shard, metadata={"format": "pt"})


def eight_bit_experts(folder: Path) -> None:
    """Without a word about it in the configuration."""
    for shard in sorted(folder.glob("*.safetensors")):
        tensors = load_file(shard)
        experts = [key for key in tensors if ".experts." in key]
        tensors |= {key: tensors[key].to(torch.float8_e4m3fn) for key in experts}
        save_file(tensors, shard, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("edit", "kind", "match"),
    [
        (quantised("fp8"), CheckpointError, "method 'fp8'"),
        (quantised("gptq"), CheckpointError, "method 'gptq'"),
        (quantised("molae"), CheckpointError, "compressed by molae_compress already"),
        (eight_bit_experts, CheckpointError, "F8_E4M3"),
        (scales_beside_experts, CheckpointError, "scale_inv"),
        (lambda f: with_tensor(f, r"experts\.3\.up_proj", lambda t: t[:5]), CheckpointError, "experts"),
        (lambda f: with_tensor(f, r"experts\.3\.up_proj", lambda _: None), CheckpointError, r"experts\.3\.up_proj"),
        (lambda f: with_tensor(f, "1.self_attn.q_proj", lambda t: t[:8]), CheckpointError, "q_proj"),
        (lambda f: edit_json(f / "config.json", moe_intermediate_size=32), CheckpointError, "instead of"),
        (lambda f: edit_json(f / "config.json", num_local_experts=4), CheckpointError, "instead of"),
        (lambda f: edit_json(f / "config.json", vocab_size=300), CheckpointError, "embed_tokens"),
        (lambda f: edit_json(f / "config.json", num_hidden_layers=3), CheckpointError, "lacks"),
        (lambda f: edit_json(f / "config.json", model_type="qwen9_moe"), ModelError, "config.json"),
        (lambda f: edit_json(f / "config.json", architectures=["MixtralForCausalLM"]), ModelError, "names MixtralForC"),
        (lambda f: edit_json(f / "config.json", num_experts_per_tok=99), ModelError, "uses 99 of the 8 experts"),
        (lambda f: edit_json(f / "config.json", hidden_size="wide"), ModelError, "config.json"),
        (
            lambda f: edit_json(f / "config.json", auto_map={"AutoConfig": "x.Y"}, model_type="new"),
            ModelError,
            "its own code",
        ),
        (lambda f: (f / "config.json").write_text("{"), ModelError, "not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), ModelError, "config.json"),
        (lambda f: (f / "config.json").unlink(), ModelError, "no config.json"),
        (lambda f: first_shard(f).unlink(), CheckpointError, "lacks 1 of the"),
        (lambda f: cut(first_shard(f), 100), CheckpointError, "truncated"),
        (lambda f: cut(first_shard(f), first_shard(f).stat().st_size), CheckpointError, "truncated"),
        (only_a_pickle, CheckpointError, "pickles only"),
    ],
)
def test_a_model_that_cannot_be_used(source: Path, tmp_path: Path, edit: Edit, kind: type[MolaeError], match: str) -> None:
    recipe = recipe_for(source)
    edit(source)
    refused_at_once(kind, match, recipe, tmp_path / "out")
    with pytest.raises(kind, match=match):
        molae.plan(recipe)


def test_layers_that_the_configuration_leaves_out_are_refused(source: Path, tmp_path: Path) -> None:
    edit_json(source / "config.json", num_hidden_layers=1)
    found = refused_at_once(CheckpointError, "1 layers more than its config.json says", recipe_for(source), tmp_path / "out")
    assert "'model.layers.1'" in found.what


@pytest.mark.parametrize("place", ["model.layers.2", "mtp.layers.0"])
def test_a_layer_for_multi_token_prediction_is_copied_and_told_of(source: Path, tmp_path: Path, place: str) -> None:
    tensors = tensors_in(source)
    own = {key.replace("model.layers.1.", f"{place}."): tensors[key].clone() for key in tensors if "layers.1." in key}
    more = {f"{place}.eh_proj.weight" if place.startswith("model") else "mtp.fc.weight": torch.ones(2, 2)}
    for path in source.glob("model*"):
        path.unlink()
    save_file(tensors | own | more, source / "model.safetensors", metadata={"format": "pt"})
    report = molae.run(recipe_for(source), tmp_path / "out")
    experts = sum(".experts." in key for key in own)
    (warning,) = (warning for warning in report.warnings if "unknown to" in warning)
    assert warning.startswith(f"{len(own) + 1} tensors of the checkpoint are unknown to Qwen3MoeForCausalLM")
    assert warning.endswith(f"{experts} of them are routed experts, which so stay dense.")
    assert tensors_in(tmp_path / "out").keys() > own.keys()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("pattern", [r"layers\.1\..*experts\.3\.up_proj", r"layers\.1\.self_attn\.q_proj", "embed_tokens"])
def test_weights_that_are_no_numbers(source: Path, tmp_path: Path, pattern: str, bad: float, calibrated: bool) -> None:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor[-1, 3] = bad
        return tensor

    name = with_tensor(source, pattern, spoil)
    found = refused(CheckpointError, "NaN or infinite", recipe_for(source, calibrated=calibrated), tmp_path / "out")
    assert f"'{name}'" in found.what


# Where the result goes


def test_places_that_are_not_ours(source: Path, tmp_path: Path) -> None:
    recipe, taken = recipe_for(source), tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("years of work")
    file = tmp_path / "file"
    file.write_text("a file")
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "notes").write_text("mine")
    before = hashes(tmp_path)
    for out, match in (
        (taken, "not empty"),
        (file, "exists"),
        (source, "not empty"),
        (tmp_path / "out", "not a work directory"),
    ):
        for fresh in (False, True):
            with pytest.raises(ResumeError, match=match) as found:
                molae.run(recipe, out, fresh=fresh)
            assert found.value.remedy
    with pytest.raises(CheckpointError, match="not a folder"):
        molae.run(recipe, file / "inside")
    with pytest.raises(ResumeError, match="is not a work directory"):
        molae.run(recipe, tmp_path / "elsewhere", work_dir=taken)
    assert hashes(tmp_path) == before


def test_places_inside_one_another(source: Path, tmp_path: Path) -> None:
    recipe, out, artifact = recipe_for(source, calibrated=False), tmp_path / "out", tmp_path / "artifact"
    molae.run(recipe, artifact)
    inside = "one inside the other"
    refused_at_once(ResumeError, inside, recipe, out, work_dir=out)
    refused_at_once(ResumeError, inside, recipe, out, work_dir=out / "work")
    refused_at_once(ResumeError, inside, recipe, out / "work" / "out", work_dir=out)
    refused_at_once(ResumeError, "inside the model that is read", recipe, source / "out")
    refused_at_once(ResumeError, "inside the model that is read", recipe, out, work_dir=source / "work")
    refused_at_once(ResumeError, "inside the finished result", recipe, artifact / "out")
    shutil.move(source, artifact / "model")
    with pytest.raises(ResumeError, match=r"The model that is read, .* lies inside the output folder"):
        molae.run(recipe_for(artifact / "model", calibrated=False), artifact, fresh=True)


def test_an_empty_folder_is_filled(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    molae.run(recipe_for(source), ".")
    assert molae.verify(tmp_path / "empty").passed
    assert not (tmp_path / "empty.work").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:7", "abacus"])
def test_a_device_that_is_not_there(source: Path, tmp_path: Path, device: str) -> None:
    refused_at_once(MolaeError, f"'{device}'", recipe_for(source), tmp_path / "out", device=device)
    with pytest.raises(MolaeError, match=f"'{device}'"):
        molae.evaluate(source, data=["python-docs:heldout"], device=device)


def test_too_little_room_is_noticed_at_the_start(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    found = refused_at_once(CheckpointError, "free", recipe_for(source), tmp_path / "out")
    assert re.match(r"Free [\d.]+ kB, ", found.remedy)


class Full(io.FileIO):
    """A file on a disk that is full after a number of bytes."""

    room = 0

    def write(self, data: Any) -> int:
        type(self).room -= len(data)
        if type(self).room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, int], None]]:
    """`full_disk(part of a path, bytes)`: files whose path holds the part cannot take more than so many bytes."""
    place: list[str] = []

    def opened(path: Path, mode: str) -> io.FileIO:
        return (Full if place[0] in str(path) else io.FileIO)(path, mode)

    def fill(part: str, room: int) -> None:
        place[:] = [part]
        Full.room = room
        monkeypatch.setattr(writer, "open", opened, raising=False)

    yield fill
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("part", "room"),
    [
        ("observe/", 3000),
        ("solve/", 30_000),
        ("hidden/", 20_000),
        ("model.safetensors", 50_000),
        ("config.json", 10),
        ("README.md", 10),
        ("molae_report.json", 10),
    ],
)
def test_a_disk_that_fills_up_in_the_middle(
    checkpoint: CheckpointMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    full_disk: Callable[[str, int], None],
    part: str,
    room: int,
) -> None:
    monkeypatch.setattr(stream, "CHECKPOINT_SECONDS", 0.0)
    recipe = recipe_for(checkpoint("qwen3_moe"))
    molae.run(recipe, tmp_path / "calm")
    full_disk(part, room)
    found = refused(CheckpointError, "Disk full while writing", recipe, tmp_path / "out")
    assert "resumes" in found.remedy
    assert Full.room < 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calm", "out.work"]
    full_disk("nowhere", 0)
    molae.run(recipe, tmp_path / "out")
    assert same_every_time(tmp_path / "out") == same_every_time(tmp_path / "calm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calm", "out"]


def test_a_disk_without_room_for_the_activations(
    checkpoint: CheckpointMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(checkpoint("qwen3_moe"))

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        refused(CheckpointError, "Disk full while writing", recipe, tmp_path / "out", max_memory=0)
    molae.run(recipe, tmp_path / "out", max_memory=0)


def test_an_output_that_is_not_a_number_fails_its_gate(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(source)
    assert recipe.calibration is not None
    assert recipe.calibration.data is not None
    section = json.dumps({"data": recipe.calibration.data[0], "samples": 2, "sequence_length": 16})
    nan = molae.Evaluation(30, 1.0, 1.0, float("nan"), 0.5)
    monkeypatch.setattr(apply, "evaluate_as", lambda *_, **__: nan)
    with pytest.raises(QualityGateError, match="max_kl"):
        molae.run(recipe_for(source, f"evaluate={section}", "gate.max_kl=0.1"), tmp_path / "out")
