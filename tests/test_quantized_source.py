"""Checkpoints in block-wise fp8 and in MXFP4 are the plain checkpoints of their dequantised weights; others are refused.

The quantisers here are slow and plain; transformers' own functions are a second opinion.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import molae_compress as molae
from molae_compress.adapters.skeleton import drop_quantization_
from molae_compress.artifact import write_companions
from molae_compress.checkpoint import Checkpoint, TensorSource, open_source, without_quantization, write_shards
from molae_compress.checkpoint.dequantize import DequantizedCheckpoint
from molae_compress.checkpoint.packed import AT_A_TIME
from molae_compress.errors import CheckpointError, ModelError
from molae_compress.expansion import expand
from molae_compress.inspection import inspect
from molae_compress.recipe import Recipe
from molae_compress.source import DiskSource
from tests.tiny import save_checkpoint, tiny_ids

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
BLOCK = 16  # no divisor of the expert width 24, nor of 40 and 24 in attention: every matrix of these has a ragged edge
TEXT = "".join(f"Line {i}: {i * i % 97} apples cost {i * 7 % 13} coins, says fox {i % 5}.\n" for i in range(60))
CPU = torch.device("cpu")


# ---------------------------------------------------------------- reference quantisers


def fp8(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """F8_E4M3 numbers, their scales block by block, and the bfloat16 matrix (or stack of them) that they stand for."""
    if weight.dim() > 2:
        parts = [fp8(matrix, block) for matrix in weight]
        packed, scales, plain = (torch.stack(part) for part in zip(*parts, strict=True))
        return packed, scales, plain
    rows, columns = weight.shape
    packed = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    plain = torch.empty(weight.shape, dtype=torch.bfloat16)
    scales = torch.empty(math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            here = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scales[i, j] = weight[here].float().abs().max() / 448
            packed[here] = (weight[here].float() / scales[i, j]).to(torch.float8_e4m3fn)
            plain[here] = (packed[here].float() * scales[i, j]).bfloat16()
    return packed, scales, plain


def mxfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks and scales of a parameter [E,columns,rows] of gpt-oss, and the parameter they stand for."""
    numbers = weight.float().transpose(1, 2).unflatten(-1, (-1, 32))  # [E,rows,groups,32]
    exponents = numbers.abs().amax(-1).clamp_min(2**-20).log2().floor() - 2
    scaled = numbers / exponents.exp2()[..., None]
    table = torch.tensor(FP4)
    codes = (scaled.abs()[..., None] - table).abs().argmin(-1)
    plain = torch.copysign(table[codes], scaled) * exponents.exp2()[..., None]
    codes = codes + 8 * scaled.signbit()
    blocks = (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8)
    return blocks, (exponents + 127).to(torch.uint8), plain.flatten(-2).transpose(1, 2).contiguous().bfloat16()


@dataclass(frozen=True)
class Quantized:
    """A model folder with packed weights, and every tensor it stands for under the name of a plain checkpoint."""

    folder: Path
    plain: dict[str, Tensor]
    packed: set[str]


def save_fp8(folder: Path, *, block: int = BLOCK, static: bool = False) -> Quantized:
    """DeepSeek-V3 as it is published: all matrices packed but embeddings, routers and head; weights of an MTP layer."""
    plain = load_file(save_checkpoint(folder, "deepseek_v3", dtype=torch.bfloat16) / "model.safetensors")
    plain["model.layers.9.eh_proj.weight"] = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    stored, packed = dict(plain), set()
    for name, tensor in plain.items():
        if tensor.dim() == 2 and not name.endswith(("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight")):
            stored[name], stored[f"{name}_scale_inv"], plain[name] = fp8(tensor, (block, block))
            packed.add(name)
            if static:
                stored[name.removesuffix("weight") + "activation_scale"] = torch.tensor(0.5)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    settings = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [block, block], "activation_scheme": "dynamic"}
    edit_config(folder, quantization_config=settings | {"activation_scheme": "static" if static else "dynamic"})
    return Quantized(folder, plain, packed)


def save_mxfp4(folder: Path) -> Quantized:
    """gpt-oss as it is published: expert matrices packed, everything else in bfloat16."""
    save_checkpoint(folder, "gpt_oss", dtype=torch.bfloat16, intermediate_size=64)
    plain = load_file(folder / "model.safetensors")
    stored, packed = dict(plain), set()
    for name, tensor in plain.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            del stored[name]
            stored[f"{name}_blocks"], stored[f"{name}_scales"], plain[name] = mxfp4(tensor)
            packed.add(name)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    ignored = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    edit_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ignored})
    return Quantized(folder, plain, packed)


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def config_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return content


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else bits(tensor[None])


Maker = Callable[[str], Quantized]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """`quantized("fp8" | "mxfp4")`: a folder to read, never to write into."""
    made: dict[str, Quantized] = {}

    def make(method: str) -> Quantized:
        if method not in made:
            folder = tmp_path_factory.mktemp(method) / "model"
            made[method] = {"fp8": save_fp8, "mxfp4": save_mxfp4}[method](folder)
        return made[method]

    return make


@pytest.fixture(params=["fp8", "mxfp4"])
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# ---------------------------------------------------------------- one tensor at a time


def test_every_tensor_is_read_and_copied_as_the_reference_says(quantized: Maker, method: str) -> None:
    made = quantized(method)
    checkpoint, files = open_source(made.folder, config_of(made.folder)), Checkpoint.open(made.folder)
    assert set(checkpoint.entries) == set(made.plain)
    for name, expected in made.plain.items():
        entry, tensor = checkpoint.entries[name], checkpoint.read(name)
        assert (entry.name, entry.shape, entry.torch_dtype) == (name, tuple(expected.shape), expected.dtype)
        assert entry.nbytes == expected.nbytes
        assert tensor.dtype == expected.dtype
        assert bits(tensor) == bits(expected), name
        for size in (50, 4096, 2**24):
            chunks = list(checkpoint.chunks(name, size))
            assert max(map(len, chunks)) <= max(size, expected.element_size())
            assert b"".join(chunks) == bits(expected)
    assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in made.plain.values())
    assert (checkpoint.quantization, checkpoint.stored_bytes) == (method, files.total_bytes)
    assert checkpoint.fingerprint() == files.fingerprint()


@pytest.mark.parametrize("shape", [(48, 32), (40, 24), (1, 70), (3, 40, 24), (2, 2, 17, 33)], ids=str)
@pytest.mark.parametrize("scale_type", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu, torch.uint8], ids=str)
def test_block_fp8_agrees_with_transformers(tmp_path: Path, shape: tuple[int, ...], scale_type: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    packed, scales, _ = fp8(torch.randn(shape, generator=generator), (16, 8))
    exponents = scales.log2().round()
    stored = (exponents + 127).to(torch.uint8) if scale_type == torch.uint8 else scales.to(scale_type)
    scales = exponents.exp2() if scale_type == torch.uint8 else stored.float()
    save_file({"x.weight": packed, "x.weight_scale_inv": stored}, tmp_path / "model.safetensors")
    settings = {"quant_method": "fp8", "weight_block_size": [16, 8]}
    found = open_source(tmp_path, {"quantization_config": settings}).read("x.weight")
    assert bits(found) == bits(_dequantize_fp8_weight(packed, scales, [16, 8], torch.float32).bfloat16())
    if shape[-2] % 16 == shape[-1] % 8 == 0:  # what it loads with; it takes a ragged edge for smaller blocks
        assert bits(found) == bits(Fp8Dequantize(None)._dequantize_one(packed, scales, torch.bfloat16))


def test_one_scale_for_a_matrix_if_the_config_says_so(tmp_path: Path) -> None:
    """As an fp8 linear layer and stacked experts of transformers hold them; scales of activations are left out."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 7, generator=generator).to(torch.float8_e4m3fn)
    stack = torch.randn(3, 5, 7, generator=generator).to(torch.float8_e4m3fn)
    each = torch.tensor([0.5, 0.3, 2.0])
    stored = {"x.weight": weight, "x.weight_scale_inv": torch.tensor(0.3), "x.activation_scale": torch.tensor(2.0)}
    stored |= {"y.up_proj": stack, "y.up_proj_scale_inv": each.view(3, 1, 1), "y.up_proj_activation_scale": each + 1}
    stored |= {
        "z.weight": stack.clone(),
        "z.weight_scale_inv": torch.tensor([0.7]),
        "limit.activation_scale": torch.tensor(9.0),
    }
    save_file(stored, tmp_path / "model.safetensors")
    checkpoint = open_source(tmp_path, {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}})
    assert set(checkpoint.entries) == {"x.weight", "y.up_proj", "z.weight", "limit.activation_scale"}
    assert torch.equal(checkpoint.read("x.weight"), (weight.float() * 0.3).bfloat16())
    assert torch.equal(checkpoint.read("y.up_proj"), (stack.float() * each.view(3, 1, 1)).bfloat16())
    assert torch.equal(checkpoint.read("z.weight"), (stack.float() * torch.tensor(0.7)).bfloat16())
    assert checkpoint.read("limit.activation_scale") == 9.0  # of no weight: not ours to leave out


def test_mxfp4_agrees_with_transformers_for_every_byte(tmp_path: Path) -> None:
    """Every pair of four-bit numbers under every scale whose products bfloat16 can hold, the smallest ones included."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 759, 1, 1)
    scales = torch.arange(253, dtype=torch.uint8).view(1, 253, 1).repeat(2, 3, 16)
    scales[1] = scales[1].flip(0)
    assert blocks[0].numel() * 2 > AT_A_TIME
    stored = {"experts.down_proj_blocks": blocks, "experts.down_proj_scales": scales}
    save_file(stored, tmp_path / "model.safetensors")
    checkpoint = open_source(tmp_path, {"quantization_config": {"quant_method": "mxfp4"}})
    assert checkpoint.entries["experts.down_proj"].shape == (2, 512, 759)
    expected = convert_moe_packed_tensors(blocks, scales)
    assert bits(checkpoint.read("experts.down_proj")) == bits(expected)
    assert b"".join(checkpoint.chunks("experts.down_proj", 1000)) == bits(expected)


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_the_whole_model_is_the_one_transformers_loads(method: str, tmp_path: Path) -> None:
    """Blocks of 8 divide every matrix here: transformers takes the size of a block from the number of scales."""
    folder = (save_fp8(tmp_path, block=8, static=True) if method == "fp8" else save_mxfp4(tmp_path)).folder
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    source = DiskSource.open(str(folder), device=CPU)
    found = source.keys.materialise("", source.checkpoint.read)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor.to(expected[name].dtype), expected[name]), name
    assert source.keys.unknown == ({"model.layers.9.eh_proj.weight"} if method == "fp8" else set())


def test_a_weight_and_its_scales_may_lie_in_different_shards(quantized: Maker, tmp_path: Path, method: str) -> None:
    made = quantized(method)
    files = Checkpoint.open(made.folder)
    names = sorted(files.entries, key=lambda name: hashlib.sha256(name.encode()).digest())
    written = write_shards(tmp_path, [TensorSource.copied(files, name) for name in names], max_shard_size=20_000)
    where = written.weight_map
    ending = {"fp8": "_scale_inv", "mxfp4": "_scales"}[method]
    partners = [(name.removesuffix(ending) + ("_blocks" if method == "mxfp4" else ""), name) for name in where]
    assert any(where[weight] != where[scales] for weight, scales in partners if scales.endswith(ending))
    checkpoint = open_source(tmp_path, config_of(made.folder))
    assert all(bits(checkpoint.read(name)) == bits(tensor) for name, tensor in made.plain.items())


# ---------------------------------------------------------------- the main path


def save_plain(made: Quantized, folder: Path) -> Path:
    """A plain bfloat16 checkpoint of the dequantised weights, its tensors in the order of the quantised one."""
    shutil.copytree(made.folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    edit_config(folder, quantization_config=None)
    order = open_source(made.folder, config_of(made.folder)).entries
    write_shards(folder, [TensorSource.of(name, made.plain[name]) for name in order], max_shard_size=10**9)
    return folder


def recipe_for(model: Path, **values: Any) -> dict[str, Any]:
    text = model.parent / "calibration.txt"
    text.write_text(TEXT)
    calibration = {"data": str(text), "samples": 4, "sequence_length": 24, "batch_size": 2}
    return {"molae": 1, "model": str(model), "calibration": calibration, "budget": {"keep": 0.6}, **values}


def weights_of(folder: Path) -> dict[str, str]:
    paths = sorted(folder.glob("model*.safetensors*"))
    assert paths
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.mark.parametrize("ignored", [False, True], ids=["all layers", "one layer left dense"])
def test_a_run_equals_that_on_the_plain_checkpoint(quantized: Maker, tmp_path: Path, method: str, ignored: bool) -> None:
    made = quantized(method)
    plain = save_plain(made, tmp_path / "plain")
    last = {"fp8": 2, "mxfp4": 1}[method]
    values = {"ignore": [f"model.layers.{last}.mlp.experts"]} if ignored else {}
    report = molae.run(recipe_for(made.folder, **values), tmp_path / "of-quantized")
    molae.run(recipe_for(plain, **values), tmp_path / "of-plain")
    assert weights_of(tmp_path / "of-quantized") == weights_of(tmp_path / "of-plain")
    assert config_of(tmp_path / "of-quantized") == config_of(tmp_path / "of-plain")
    assert config_of(tmp_path / "of-quantized")["quantization_config"]["quant_method"] == "molae"
    stored = Checkpoint.open(made.folder)
    assert report.source == {
        "fingerprint": stored.fingerprint(),
        "bytes": Checkpoint.open(plain).total_bytes,
        "quantization": method,
        "stored_bytes": stored.total_bytes,
    }
    written = Checkpoint.open(tmp_path / "of-quantized")
    assert not any(entry.dtype.startswith("F8") or entry.dtype == "U8" for entry in written.entries.values())
    if method == "fp8":  # unknown to the class, and copied all the same
        mtp = "model.layers.9.eh_proj.weight"
        assert torch.equal(written.read(mtp), made.plain[mtp])
    card = (tmp_path / "of-quantized/README.md").read_text()
    assert f"dequantised from {method} to bfloat16" in card
    assert "bit for bit" not in card


def test_the_result_loads_evaluates_and_expands(quantized: Maker, tmp_path: Path, method: str) -> None:
    made, out = quantized(method), tmp_path / "out"
    recipe = recipe_for(made.folder, budget={"rank": "full"})
    text = recipe["calibration"]["data"]
    molae.run(recipe, out)
    assert molae.verify(out).passed
    found = molae.evaluate(out, data=[text], against=str(made.folder), samples=2, sequence_length=24)
    assert found.kl is not None
    assert found.kl < 1e-3  # full rank, stored in bfloat16
    alone = molae.evaluate(made.folder, data=[text], samples=2, sequence_length=24)
    of_plain = molae.evaluate(save_plain(made, tmp_path / "plain"), data=[text], samples=2, sequence_length=24)
    assert alone == of_plain
    assert found.original_perplexity == pytest.approx(alone.perplexity)
    expand(out, tmp_path / "dense")
    assert "quantization_config" not in config_of(tmp_path / "dense")
    dense, info = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        assert dense(input_ids=tiny_ids()).logits.isfinite().all()


def test_plan_and_inspect_count_what_is_read_and_what_is_stored(quantized: Maker, method: str) -> None:
    made = quantized(method)
    stored = Checkpoint.open(made.folder).total_bytes
    plan = molae.plan(recipe_for(made.folder))
    assert plan.source_bytes == sum(tensor.nbytes for tensor in made.plain.values()) > stored == plan.stored_bytes
    assert "quantised)" in str(plan)
    larger = plan.limit_bytes > stored
    assert any("more than the" in warning for warning in plan.warnings()) == larger
    assert ("warning: " in str(plan)) == larger
    assert molae.plan(recipe_for(made.folder, budget={"rank": "full"})).warnings()
    assert inspect(str(made.folder)).bytes == plan.source_bytes


def test_a_result_without_latent_experts_is_not_called_quantised(quantized: Maker, tmp_path: Path, method: str) -> None:
    made = quantized(method)
    source = DiskSource.open(str(made.folder), device=CPU)
    write_companions(tmp_path, source, {spec.name: None for spec in source.specs}, Recipe.load(recipe_for(made.folder)))
    expected = {key: value for key, value in config_of(made.folder).items() if key != "quantization_config"}
    assert config_of(tmp_path) == expected
    composite = {"model_type": "x", "text_config": {"quantization_config": {}, "a": 1}, "compression_config": {}}
    assert without_quantization(composite) == {"model_type": "x", "text_config": {"a": 1}}


def test_a_configuration_of_its_own_for_the_text_model_is_looked_at(quantized: Maker) -> None:
    """Composite models say it there."""
    made = quantized("mxfp4")
    nested = {"text_config": {"quantization_config": {"quant_method": "mxfp4"}}}
    assert isinstance(open_source(made.folder, nested), DequantizedCheckpoint)
    config = AutoConfig.for_model("llava", text_config={"model_type": "mixtral", **nested["text_config"]})
    assert open_source(made.folder, config.to_dict()).quantization == "mxfp4"
    drop_quantization_(config)
    assert "quantization_config" not in str(config.to_dict())
    twice = nested | {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": []}}
    with pytest.raises(CheckpointError, match=r"2 different things .*unquantised release"):
        open_source(made.folder, twice)


# ---------------------------------------------------------------- what cannot be read


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "compressed-tensors"),
        ({"quant_method": "mxfp8"}, "mxfp8"),
        ({"bits": 3}, "unknown"),
    ],
)
@pytest.mark.parametrize("place", ["quantization_config", "compression_config", "text_config"])
def test_other_methods_are_refused_by_name(tmp_path: Path, settings: dict[str, Any], name: str, place: str) -> None:
    config = {place: {"quantization_config": settings} if place == "text_config" else settings}
    with pytest.raises(CheckpointError, match=rf"method '{name}'.*fp8 and mxfp4.*unquantised release.*dequantize\(\)"):
        open_source(tmp_path, config)


def test_an_artifact_is_refused_as_a_source(quantized: Maker, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"compressed by molae_compress already.*expand"):
        open_source(tmp_path, {"quantization_config": {"quant_method": "molae"}})


def test_the_main_path_refuses_them_too(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "model", "mixtral")
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})
    for use in (lambda: molae.plan(recipe_for(folder)), lambda: inspect(str(folder))):
        with pytest.raises(CheckpointError, match="method 'gptq'"):
            use()


@pytest.mark.parametrize(
    "settings",
    [{"weight_block_size": [128]}, {"weight_block_size": [0, 128]}, {"weight_block_size": "128"}, {"expert_dtype": "fp4"}],
    ids=str,
)
def test_variants_of_fp8_are_refused(quantized: Maker, settings: dict[str, Any]) -> None:
    key, value = next(iter(settings.items()))
    with pytest.raises(CheckpointError, match=rf"variant of the method 'fp8'.*'{key}'"):
        open_source(quantized("fp8").folder, {"quantization_config": {"quant_method": "fp8"} | settings})
    assert value != 128


F8, U8 = torch.float8_e4m3fn, torch.uint8
WEIGHT, SCALES = torch.ones(40, 24).to(F8), torch.ones(3, 2)
BLOCKS, EXPONENTS = torch.zeros(2, 8, 3, 16, dtype=U8), torch.full((2, 8, 3), 127, dtype=U8)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.weight": WEIGHT}, r"'a.weight' has the type F8_E4M3, but .*_scale_inv'"),
        ({"a.weight": WEIGHT, "a.weight_scale": SCALES}, r"'a.weight' has the type F8_E4M3, but .*_scale_inv'"),
        ({"a.weight_scale_inv": SCALES}, r"scales 'a.weight_scale_inv' are the scales of 'a.weight', which is not there"),
        ({"a.weight": WEIGHT.float(), "a.weight_scale_inv": SCALES}, r"'a.weight' has the type F32 instead of F8_E4M3"),
        ({"a.weight": WEIGHT.view(torch.int8), "a.weight_scale_inv": SCALES}, r"'a.weight' has the type I8 instead"),
        ({"a.weight": WEIGHT.to(torch.float8_e5m2), "a.weight_scale_inv": SCALES}, r"'a.weight' has the type F8_E5M2"),
        ({"a.weight": WEIGHT, "a.weight_scale_inv": SCALES.int()}, r"'a.weight_scale_inv' has the type I32 instead of F32"),
        ({"a.weight": WEIGHT, "a.weight_scale_inv": SCALES.T.contiguous()}, r"'a.weight' has scales of shape \[2, 3\]"),
        ({"a.weight": WEIGHT, "a.weight_scale_inv": torch.tensor(1.0)}, r"scales of shape \[\] instead of \[3, 2\]"),
        ({"a.weight": WEIGHT[0], "a.weight_scale_inv": SCALES[0]}, r"'a.weight' has the shape \[24\], which is no matrix"),
        ({"a.weight": WEIGHT[:0], "a.weight_scale_inv": SCALES[:0]}, r"'a.weight' has the shape \[0, 24\]"),
    ],
)
def test_fp8_tensors_that_do_not_fit_are_named(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    save_file(tensors | {"norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path, {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}})


def test_one_scale_for_a_matrix_must_be_one(tmp_path: Path) -> None:
    save_file({"a.weight": WEIGHT, "a.weight_scale_inv": SCALES}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'a.weight' has scales of shape \[3, 2\] instead of one number"):
        open_source(tmp_path, {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x.down_proj_blocks": BLOCKS}, r"'x.down_proj_blocks' lies there without 'x.down_proj_scales'"),
        ({"x.down_proj_scales": EXPONENTS}, r"'x.down_proj_scales' lies there without 'x.down_proj_blocks'"),
        ({"x.down_proj_blocks": BLOCKS, "x.down_proj_scales": EXPONENTS, "x.down_proj": SCALES}, r"'x.down_proj' .*twice"),
        ({"x.down_proj_blocks": BLOCKS[..., :8].contiguous(), "x.down_proj_scales": EXPONENTS}, r"shape \[2, 8, 3, 8\]"),
        ({"x.down_proj_blocks": BLOCKS[0], "x.down_proj_scales": EXPONENTS[0]}, r"shape \[8, 3, 16\]"),
        ({"x.down_proj_blocks": BLOCKS, "x.down_proj_scales": EXPONENTS[:1]}, r"scales \[1, 8, 3\]"),
        ({"x.down_proj_blocks": BLOCKS.int(), "x.down_proj_scales": EXPONENTS}, r"type I32 instead of U8"),
        ({"x.down_proj_blocks": BLOCKS, "x.down_proj_scales": EXPONENTS.int()}, r"_scales' has the type I32 instead of U8"),
        ({"x.w2_blocks": BLOCKS, "x.w2_scales": EXPONENTS}, r"'x.w2_\w+' is none of those"),
        ({"a.weight": WEIGHT}, r"'a.weight' has the type F8_E4M3"),
    ],
)
def test_mxfp4_tensors_that_do_not_fit_are_named(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path, {"quantization_config": {"quant_method": "mxfp4"}})


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({"a.weight": torch.full((40, 24), torch.nan), "a.weight_scale_inv": SCALES}, "fp8", r"'a.weight' in '.*holds NaN"),
        ({"a.weight": WEIGHT, "a.weight_scale_inv": SCALES * torch.nan}, "fp8", r"'a.weight_scale_inv' .*holds NaN"),
        (
            {"a.weight": torch.full((40, 24), 448.0), "a.weight_scale_inv": SCALES * 3e38},
            "fp8",
            r"'a.weight' dequantised .*infinite",
        ),
        ({"down_proj_blocks": BLOCKS, "down_proj_scales": EXPONENTS + 128}, "mxfp4", r"'down_proj_scales' in '.*holds NaN"),
        ({"down_proj_blocks": BLOCKS + 7, "down_proj_scales": EXPONENTS + 127}, "mxfp4", r"'down_proj' dequ.*infinite"),
    ],
    ids=["weight", "scale", "product", "exponent", "product of exponent"],
)
def test_values_that_are_not_finite_are_named(tmp_path: Path, tensors: dict[str, Tensor], config: str, message: str) -> None:
    stored = {name: (tensor.to(F8) if name == "a.weight" else tensor) for name, tensor in tensors.items()}
    save_file(stored, tmp_path / "model.safetensors")
    checkpoint = open_source(tmp_path, {"quantization_config": {"quant_method": config, "weight_block_size": [16, 16]}})
    name = next(iter(checkpoint.entries))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(name)
    with pytest.raises(CheckpointError, match=message):
        list(checkpoint.chunks(name))


def test_packed_weights_without_a_word_in_the_config_are_refused(quantized: Maker, tmp_path: Path, method: str) -> None:
    folder = Path(shutil.copytree(quantized(method).folder, tmp_path / "copy"))
    edit_config(folder, quantization_config=None)
    packed = {"fp8": "F8_E4M3", "mxfp4": "U8"}[method]
    with pytest.raises(CheckpointError, match=f"has the type {packed}, but config.json has no quantization_config"):
        DiskSource.open(str(folder), device=CPU)


def test_a_config_that_calls_plain_weights_quantised_is_refused(tmp_path: Path, method: str) -> None:
    save_file({"norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"method '{method}', but no tensor .* is\. .*remove quantization_config"):
        open_source(tmp_path, {"quantization_config": {"quant_method": method}})


def test_a_config_of_other_blocks_is_refused_before_anything_is_read(quantized: Maker, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(quantized("fp8").folder, tmp_path / "copy"))
    edit_config(folder, quantization_config={"quant_method": "fp8"})  # blocks of 128 by default
    with pytest.raises((CheckpointError, ModelError), match=r"has scales of shape .* in blocks of 128 x 128"):
        molae.plan(recipe_for(folder))
