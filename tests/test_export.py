"""Whole models as ONNX folders: what they compute, what is in them, what runs them, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
ort = pytest.importorskip("onnxruntime")

from molae_compress import Recipe, finetune  # noqa: E402
from molae_compress import run as compress  # noqa: E402
from molae_compress.cli import main  # noqa: E402
from molae_compress.errors import CheckpointError, ExportError, ModelError, ResumeError  # noqa: E402
from molae_compress.export import Export, export_onnx, exporter, generate, open_model, runtime  # noqa: E402
from molae_compress.export.banks import expert_tensors  # noqa: E402
from molae_compress.export.checks import TOLERANCE, check, in_float32, reference_runs  # noqa: E402
from molae_compress.export.graph import CacheShape, WithCache, cache_shape, names, trace  # noqa: E402
from molae_compress.export.lowering import LOWERINGS, Lowering, lower_, prepare  # noqa: E402
from molae_compress.export.slots import experts_of, layout_and_spec  # noqa: E402
from molae_compress.modeling import attach_  # noqa: E402
from molae_compress.source import DiskSource  # noqa: E402
from tests.conftest import CheckpointMaker  # noqa: E402
from tests.runs import distance, logits, recipe_for  # noqa: E402
from tests.runs import loaded as in_torch  # noqa: E402
from tests.test_docs import ROOT, blocks  # noqa: E402
from tests.test_export_lowering import library  # noqa: E402, F401
from tests.test_modeling import SHAPES, random_latent  # noqa: E402
from tests.test_one_by_one import one_by_one  # noqa: E402
from tests.test_quantized_source import edit_config, save_fp8, save_mxfp4  # noqa: E402
from tests.tiny import tiny_ids, tiny_model, tiny_tokenizer  # noqa: E402
from tests.zoo import zoo_model  # noqa: E402

POCKET = ROOT / "examples" / "pocket-moe"
PROMPT = "The function returns"
ExportMaker = Callable[..., Path]


def half_compressed(folder: Path, family: str = "qwen3_moe", **changes: Any) -> Path:
    """A model folder whose first experts are latent, in layer form, and whose last, if there are more, are dense."""
    model = tiny_model(family, eos_token_id=None, **changes)
    name, module = next(iter(experts_of(model).items()))
    spec = layout_and_spec(model, name, module)[1]
    attach_(model, {name: (SHAPES["layer"], random_latent(spec, SHAPES["layer"]))})
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def compress_to(folder: Path, model: Path, *overrides: str) -> Path:
    """A model compressed by the recipe that comes with the project, on less text."""
    given = [f"model={json.dumps(str(model))}", "calibration.samples=16", "evaluate=null", *overrides]
    compress(Recipe.load("quickstart", given), folder)
    return folder


@pytest.fixture(scope="session")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that comes with the project."""
    return compress_to(tmp_path_factory.mktemp("pocket") / "molae", POCKET)


@pytest.fixture(scope="session")
def exported(compressed: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> ExportMaker:
    """`exported(how)`: the compressed example as an ONNX folder, to read only. The model is traced once for all of them."""
    made: dict[str, Path] = {}
    graphs: list[Any] = []

    def traced(model: Any, shape: CacheShape) -> Any:
        if not graphs:
            graphs.append(trace(model, shape))
        return graphs[0].clone()

    def make(how: Lowering) -> Path:
        if how not in made:
            if how == "molae":
                request.getfixturevalue("library")
            made[how] = tmp_path_factory.mktemp("onnx") / how
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(exporter, "trace", traced)
                patch.setattr(exporter, "_drop_", lambda *_: None)
                export_onnx(compressed, made[how], experts=how)
        return made[how]

    return make


def invoke(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def left_in(folder: Path) -> list[str]:
    """Names of everything in a folder, hidden files included."""
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- logits


def test_logits_of_a_half_compressed_model(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The family with the most of everything: sinks, sliding windows, biases, clamps, interleaved rows."""
    logits_in_every_lowering("gpt_oss", tmp_path, request)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "deepseek_v3"])
def test_logits_of_other_families(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    logits_in_every_lowering(family, tmp_path, request)


def logits_in_every_lowering(family: str, folder: Path, request: pytest.FixtureRequest) -> None:
    """Traced once: prefill and decoding, padded and not, against torch."""
    half_compressed(folder / "model", family)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager").eval()
    shape, runs = cache_shape(model), reference_runs(model)
    traced = trace(model, shape)
    tensors = [expert_tensors(module, *layout_and_spec(model, name, module)) for name, module in experts_of(model).items()]
    for how in LOWERINGS:
        lowered, options, path = traced.clone(), ort.SessionOptions(), folder / f"{how}.onnx"
        if how == "molae":
            options.register_custom_ops_library(str(request.getfixturevalue("library")))
        lower_(lowered, prepare(tensors, how), how, torch.float32)
        ir.save(lowered, path, external_data=f"{how}.data")
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        errors = check(session, shape, runs, TOLERANCE, typical=False)
        assert set(errors) == {
            f"{part}, {run}" for part in ("prefill", "decoding") for run in ("without padding", "padded on the left")
        }


@pytest.mark.parametrize("way", [{"adapters": 2, "router": True}, {"latent": "all"}], ids=["adapters", "latent"])
def test_a_fine_tuned_model_is_exported_as_it_was_trained(
    way: dict[str, Any], checkpoint: CheckpointMaker, tmp_path: Path
) -> None:
    before, tuned = tmp_path / "before", tmp_path / "tuned"
    recipe = recipe_for(checkpoint("qwen3_moe"), "budget.keep=0.5")
    compress(recipe, before)
    assert recipe.calibration is not None
    settings = {"data": recipe.calibration.data, "samples": 4, "sequence_length": 16, "learning_rate": 0.02, **way}
    finetune(before, {"molae": 1, "finetune": settings}, tuned)
    assert distance(logits(in_torch(tuned)), logits(in_torch(before))) > 1e-2
    found = export_onnx(tuned, tmp_path / "onnx", experts="standard")
    assert max(found.checks.values()) < 1e-5


def test_the_check_sees_padding_that_is_ignored(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", num_hidden_layers=1)
    shape, runs = cache_shape(model), reference_runs(model)

    class Ignorant:
        """A session of a model that looks at padding as at any other token."""

        def get_inputs(self) -> list[Any]:
            return [type("Input", (), {"name": name, "type": "tensor(float)"}) for name in names(shape)[0]]

        def run(self, _: Any, feed: dict[str, Any]) -> list[Any]:
            self.ids = feed["input_ids"] if not feed["past_key_values.0.key"].size else [*self.ids, *feed["input_ids"]]
            past = feed["past_key_values.0.key"].shape[2]
            ids = torch.from_numpy(feed["input_ids"])
            self.seen = ids if past == 0 else torch.cat([self.seen, ids], dim=1)
            with torch.no_grad():
                logits = model(self.seen).logits[:, past:]
            keys = torch.zeros(ids.shape[0], shape.heads, self.seen.shape[1], shape.key_width).numpy()
            return [logits.numpy(), keys, keys]

    with pytest.raises(ExportError, match="padded on the left"):
        check(Ignorant(), shape, runs, TOLERANCE, typical=False)  # type: ignore[arg-type]
    unpadded = [run for run in runs if run.name == "without padding"]
    check(Ignorant(), shape, unpadded, TOLERANCE, typical=False)  # type: ignore[arg-type]


def test_positions_follow_from_the_mask() -> None:
    """Rotations are relative, so that logits hardly tell; limits of the context and scaled rotations do."""
    seen: dict[str, Any] = {}

    class Seeing(torch.nn.Module):
        def forward(self, **given: Any) -> Any:
            seen.update(given)
            return type("Output", (), {"logits": torch.zeros(2, 3, 4)})

    shape = CacheShape(1, 1, 2, 2)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    past = torch.zeros(2, 1, 4, 2)
    WithCache(Seeing(), shape)(torch.zeros(2, 3, dtype=torch.long), mask, [(past, past)])  # type: ignore[arg-type]
    assert seen["position_ids"].tolist() == [[2, 3, 4], [4, 5, 6]]


def test_sliding_windows_are_longer_than_they_slide_in_the_check() -> None:
    assert tiny_model("gpt_oss").config.sliding_window < reference_runs(tiny_model("gpt_oss"))[0].lengths[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_reference_of_16_bit_exports_computes_in_float32(dtype: torch.dtype) -> None:
    model = tiny_model("deepseek_v3", dtype)
    wide = tiny_model("deepseek_v3", dtype).float()
    before = {name: (tensor.dtype, tensor.data_ptr()) for name, tensor in model.state_dict().items()}
    with torch.no_grad(), in_float32(model):
        found = model(tiny_ids()).logits
        expected = wide(tiny_ids()).logits
    torch.testing.assert_close(found, expected)
    assert {name: (tensor.dtype, tensor.data_ptr()) for name, tensor in model.state_dict().items()} == before


@pytest.mark.parametrize(
    ("how", "dtype"),
    [("standard", "bfloat16"), ("ort-moe", "float16"), pytest.param("molae", "float16", marks=pytest.mark.slow)],
)
def test_16_bit_exports(how: Lowering, dtype: Any, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Errors with float32 arithmetic within a unit in the last place; in float16's own within a hundred."""
    if how == "molae":
        request.getfixturevalue("library")
    half_compressed(tmp_path / "model", num_hidden_layers=1)
    found = export_onnx(tmp_path / "model", tmp_path / "onnx", experts=how, dtype=dtype)
    eps = torch.finfo(getattr(torch, dtype)).eps
    assert max(found.checks.values()) < eps
    if dtype == "bfloat16":
        assert found.checks_in_dtype is None
    else:
        assert found.checks_in_dtype is not None
        assert max(found.checks_in_dtype.values()) < 100 * eps
    types = {
        value.dtype
        for value in ir.load(tmp_path / "onnx" / "model.onnx").graph.initializers.values()
        if value.shape is not None and int(np.prod(value.shape.numpy())) > 64
    }
    assert types - {ir.DataType.INT64, ir.DataType.INT32} == {getattr(ir.DataType, dtype.upper())}
    assert not (tmp_path / "onnx" / "widened.onnx").exists()


# ---------------------------------------------------------------- loading


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    source = DiskSource.open(str(folder), device=torch.device("cpu"), dense=False)
    return exporter._load(source, dtype).state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_the_model_is_loaded_as_transformers_loads_it(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Latent and dense experts, tied embeddings, and weights that stay in float32."""
    half_compressed(tmp_path, family)
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).state_dict()
    found = loaded(tmp_path, dtype)
    assert found.keys() == wanted.keys()
    assert {name: tensor.dtype for name, tensor in found.items()} == {name: each.dtype for name, each in wanted.items()}
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    kept = family == "deepseek_v3" or (family, dtype) == ("gpt_oss", torch.float16)
    assert (torch.float32 in {tensor.dtype for tensor in found.values()}) == (kept or dtype == torch.float32)


@pytest.mark.parametrize("save", [save_fp8, save_mxfp4])
def test_quantised_weights_are_exported_plain(save: Any, tmp_path: Path) -> None:
    packed = save(tmp_path / "packed")
    plain = Path(shutil.copytree(packed.folder, tmp_path / "plain"))
    save_file(packed.plain, plain / "model.safetensors", {"format": "pt"})
    edit_config(plain, quantization_config=None)
    found, wanted = loaded(packed.folder), loaded(plain)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# ---------------------------------------------------------------- the folder


@pytest.mark.parametrize("how", ["standard", "molae"])
def test_the_folder_is_whole_and_names_no_file_of_this_machine(how: Lowering, exported: ExportMaker) -> None:
    folder = exported(how)
    wanted = {"model.onnx", "model.onnx.data", "genai_config.json", "molae_export.json", "config.json"}
    wanted |= {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    library_name = json.loads((folder / "molae_export.json").read_text())["library"]
    assert set(left_in(folder)) == wanted | ({library_name} if how == "molae" else set())
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    written = {entry.key: entry.value for entry in model.metadata_props}
    assert (written["molae_experts"], written["molae_dtype"]) == (how, "float32")
    content = (folder / "model.onnx").read_bytes()
    for path in (str(Path(torch.__file__).parent), str(Path(exporter.__file__).parent), str(folder)):
        assert path.encode() not in content
    assert len(content) < 400_000
    record = json.loads((folder / "molae_export.json").read_text())
    assert record["opsets"] == {opset.domain: opset.version for opset in model.opset_import}
    assert {"torch", "transformers", "onnx", "onnxruntime"} <= record["packages"].keys()
    session_options = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["session_options"]
    assert session_options.get("custom_ops_library") == library_name
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_weights_are_stored_once(exported: ExportMaker, compressed: Path) -> None:
    stored = sum(path.stat().st_size for path in compressed.glob("*.safetensors"))  # bfloat16
    assert (exported("standard") / "model.onnx.data").stat().st_size < 2.05 * stored


def test_inputs_and_outputs_are_those_of_genai(exported: ExportMaker) -> None:
    session = open_model(exported("standard"), device="cpu")
    faces = names(CacheShape(4, 2, 32, 32))
    assert [value.name for value in session.get_inputs()] == faces[0]
    assert [value.name for value in session.get_outputs()] == faces[1]
    assert session.get_inputs()[0].shape == ["batch_size", "sequence_length"]
    assert session.get_inputs()[2].shape == ["batch_size", 2, "past_sequence_length", 32]


# ---------------------------------------------------------------- text


def greedy(folder: Path, ids: list[int], tokens: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    mask = torch.ones(1, len(ids), dtype=torch.long)
    out = model.generate(torch.tensor([ids]), attention_mask=mask, max_new_tokens=tokens, do_sample=False)
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("how", ["molae", "standard"])
def test_genai_writes_what_transformers_writes(how: Lowering, exported: ExportMaker, compressed: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    ids = AutoTokenizer.from_pretrained(compressed)(PROMPT)["input_ids"]
    expected = greedy(compressed, ids, 64)
    assert len(expected) == 64
    assert list(generate(exported(how), PROMPT, max_tokens=64, device="cpu")) == expected


@pytest.mark.slow
@pytest.mark.parametrize("how", LOWERINGS)
@pytest.mark.parametrize("own", [False, True], ids=["pocket-moe", "--moe-model"])
def test_genai_writes_what_transformers_writes_in_every_lowering(
    how: Lowering, own: bool, tmp_path: Path, moe_model: Path | None, request: pytest.FixtureRequest
) -> None:
    """Compressed to half, in the layer form where the lowering asks for it."""
    pytest.importorskip("onnxruntime_genai")
    model = moe_model if own else POCKET
    if model is None:
        pytest.skip("no other model: pytest --moe-model FOLDER")
    if how == "molae":
        request.getfixturevalue("library")
    profile = "serving" if how == "ort-moe" else "quality"
    folder = compress_to(tmp_path / "molae", model, "budget.keep=0.5", f"basis.profile={profile}")
    found = export_onnx(folder, tmp_path / "onnx", experts=how)
    assert max(found.checks.values()) < 1e-4
    expected = greedy(folder, AutoTokenizer.from_pretrained(folder)(PROMPT)["input_ids"], 64)
    assert list(generate(tmp_path / "onnx", PROMPT, max_tokens=64, device="cpu")) == expected


def test_the_programs_of_the_documentation(
    exported: ExportMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime_genai")
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "pocket-onnx").symlink_to(exported("molae"))
    monkeypatch.chdir(tmp_path)
    programs = [code for code, tested in blocks(ROOT / "docs" / "onnx.md", "python") if tested]
    assert len(programs) == 2
    tokens = list(generate("build/pocket-onnx", PROMPT, max_tokens=80))
    tokenizer = AutoTokenizer.from_pretrained("build/pocket-onnx")
    for program, text in zip(programs, (tokenizer.decode(tokens[:20]), PROMPT), strict=True):
        exec(compile(program, "docs/onnx.md", "exec"), {})
        assert capsys.readouterr().out.startswith(text)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "mixtral"])
def test_genai_runs_other_families(family: str, tmp_path: Path) -> None:
    """Latent attention with values narrower than keys, sliding windows and sinks."""
    pytest.importorskip("onnxruntime_genai")
    half_compressed(tmp_path / "model", family)
    export_onnx(tmp_path / "model", tmp_path / "onnx", experts="standard")
    ids = list(range(40, 60))
    expected = greedy(tmp_path / "model", ids, 64)
    assert list(generate(tmp_path / "onnx", ids, max_tokens=64, device="cpu")) == expected


def test_the_command_generates(exported: ExportMaker, compressed: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    folder = exported("standard")
    plain = invoke("generate", folder, PROMPT, "--max-tokens", 12, "--device", "cpu")
    result = json.loads(invoke("generate", folder, PROMPT, "--max-tokens", 12, "--json").stdout)
    assert plain.exit_code == 0, plain.output
    assert plain.stdout == f"{result['text']}\n"
    assert len(result["tokens"]) == 12
    assert AutoTokenizer.from_pretrained(compressed).decode(result["tokens"], skip_special_tokens=True) == result["text"]


@pytest.mark.parametrize("prompt", ["", [], [1] * 1024])
def test_prompts_of_no_length_or_too_much(prompt: Any, exported: ExportMaker) -> None:
    pytest.importorskip("onnxruntime_genai")
    with pytest.raises(ExportError, match=r"The prompt has (0|1024) tokens"):
        list(generate(exported("standard"), prompt))


@pytest.mark.parametrize(("module", "call"), [("onnxruntime_genai", generate), ("onnxruntime", open_model)])
def test_what_is_not_installed_is_named(
    module: str, call: Callable[..., Any], exported: ExportMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exported("standard")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ExportError, match=module.replace("_", "-")) as caught:
        next(call(folder, [1, 2])) if call is generate else call(folder)
    assert "molae-compress[onnx]" in caught.value.remedy


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_that_is_not_there_is_said_so(exported: ExportMaker) -> None:
    for call in (
        lambda: open_model(exported("standard"), device="cuda"),
        lambda: list(generate(exported("standard"), [1], device="cuda")),
    ):
        with pytest.raises(ExportError, match="CUDA was asked for and cannot be used"):
            call()
    assert open_model(exported("standard"), device="auto").get_providers() == ["CPUExecutionProvider"]


def test_cuda_that_the_runtime_drops_silently_is_said_so(exported: ExportMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime logs an error and goes on with the CPU."""
    folder = exported("standard")
    monkeypatch.setattr(runtime, "_cuda_problem", lambda: None)
    with pytest.raises(ExportError, match="runs the model on CPUExecutionProvider instead"):
        open_model(folder, device="cuda")


def test_experts_that_a_gpu_cannot_run_are_said_so(
    exported: ExportMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """There is a GPU: CUDA is refused with the way out; left to choose, the model runs on the CPU with a warning."""
    folder = Path(shutil.copytree(exported("molae"), tmp_path / "copy"))
    record = json.loads((folder / runtime.RECORD).read_text())
    monkeypatch.setattr(runtime, "_cuda_problem", lambda: None)
    monkeypatch.setattr("molae_compress.export.runtime.has_gpu_kernels", lambda _: False)
    for dtype, way_out in (("float32", "--dtype float16"), ("float16", "make gpu-kernels")):
        (folder / runtime.RECORD).write_text(json.dumps(record | {"dtype": dtype}))
        with pytest.raises(ExportError, match=way_out):
            open_model(folder, device="cuda")
        caplog.clear()
        assert open_model(folder, device="auto").get_providers() == ["CPUExecutionProvider"]
        assert way_out in caplog.text
    monkeypatch.setattr("molae_compress.export.runtime.has_gpu_kernels", lambda _: True)
    assert runtime._use_cuda("auto", folder)
    assert runtime._use_cuda("auto", exported("standard"))


# ---------------------------------------------------------------- failures


def test_a_mismatch_fails_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight is stored wrong."""
    half_compressed(tmp_path / "model", num_hidden_layers=1)

    def damaged(model: Any, shape: CacheShape) -> Any:
        next(iter(experts_of(model).values())).core.down_proj.data[:, 0, 0] += 3
        return trace(model, shape)

    monkeypatch.setattr(exporter, "trace", damaged)  # what comes after the reference
    result = invoke("export", "onnx", tmp_path / "model", "--output", tmp_path / "onnx", "--experts", "ort-moe", "-q")
    assert result.exit_code == 1
    assert "differs from the model in torch" in result.stderr
    assert left_in(tmp_path) == ["model"]


def test_an_existing_folder_is_replaced_only_if_it_is_an_export_and_told_to(
    exported: ExportMaker, compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = Path(shutil.copytree(exported("standard"), tmp_path / "earlier"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("Do not lose.")
    for output, overwrite in ((earlier, False), (other, False), (other, True)):
        with pytest.raises(ResumeError, match="not empty") as caught:
            export_onnx(compressed, output, experts="standard", overwrite=overwrite)
        assert ("--overwrite" in caught.value.remedy) == (output == earlier)
    inside = earlier / "again"
    with pytest.raises(ResumeError, match="inside"):
        export_onnx(compressed, inside, experts="standard")
    with pytest.raises(ResumeError, match="inside"):
        export_onnx(compressed, compressed / "onnx", experts="standard")

    before = left_in(earlier)

    def full(*_: Any) -> Export:
        raise CheckpointError("The disk is full.")

    monkeypatch.setattr(exporter, "_write_and_check", full)
    with pytest.raises(CheckpointError, match="disk is full"):
        export_onnx(compressed, earlier, experts="standard", overwrite=True)
    assert left_in(earlier) == before
    assert left_in(tmp_path) == ["earlier", "other"]


def test_overwriting_replaces_the_earlier_export(
    exported: ExportMaker, compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = Path(shutil.copytree(exported("standard"), tmp_path / "earlier"))
    (earlier / "old.txt").write_text("")
    stale = tmp_path / ".earlier.partial"
    stale.mkdir()
    (stale / "model.onnx").write_text("of an export that was killed")
    shutil.copy(earlier / "model.onnx", tmp_path / "model.onnx")

    def written(model: Any, source: Path, staging: Path, *_: Any) -> Export:
        assert not (staging / "model.onnx").exists()
        shutil.move(tmp_path / "model.onnx", staging / "model.onnx")
        return Export(1, "0", "X", "standard", "bfloat16", None, {}, 1234, 5, {"prefill": 2e-7}, None, {})

    monkeypatch.setattr(exporter, "_write_and_check", written)
    command = ("export", "onnx", compressed, "--output", earlier, "--experts", "standard", "-q")
    assert "not empty" in invoke(*command).stderr
    shown = invoke(*command, "--overwrite")
    assert (shown.exit_code, "1,234" in shown.stdout, "2.0e-07" in shown.stdout) == (0, True, True), shown.output
    assert "bfloat16 on GPUs only" in shown.stdout
    assert "old.txt" not in left_in(earlier)
    assert json.loads((earlier / "molae_export.json").read_text())["architecture"] == "X"
    assert left_in(tmp_path) == ["earlier"]


def test_the_form_that_a_lowering_cannot_hold_is_refused_at_once(compressed: Path, tmp_path: Path) -> None:
    """Banks, or bases of single experts, in ONNX Runtime's operator."""
    result = invoke("export", "onnx", compressed, "--output", tmp_path / "onnx", "--experts", "ort-moe", "-q")
    assert result.exit_code == 1
    assert "cannot be a com.microsoft::MoE node" in result.stderr
    assert "--experts standard" in result.stderr
    assert left_in(tmp_path) == []


def test_without_the_library_the_other_lowerings_are_named(
    compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = pytest.importorskip("molae_compress.kernels")
    from molae_compress.errors import KernelError

    def missing() -> Path:
        raise KernelError("The operator library does not exist.", remedy="Compile it.")

    monkeypatch.setattr(kernels, "library_path", missing)
    with pytest.raises(KernelError, match="does not exist"):
        export_onnx(compressed, tmp_path / "onnx")
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(("name", "why"), [("Qwen3NextForCausalLM", "cache"), ("GraniteMoeHybridForCausalLM", "cache")])
def test_models_with_other_caches_are_refused(name: str, why: str) -> None:
    model = zoo_model(name).eval()
    with pytest.raises(ExportError, match=f"{name} cannot be exported") as caught:
        cache_shape(model)
    assert why in caught.value.why


def test_models_that_call_experts_one_by_one_are_refused() -> None:
    with pytest.raises(ExportError, match="Python loop"):
        experts_of(one_by_one())


def test_models_without_experts_are_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(tiny_llama())
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="No routed experts were found in LlamaForCausalLM"):
        export_onnx(tmp_path / "model", tmp_path / "onnx", experts="standard")
    assert left_in(tmp_path) == ["model"]


def tiny_llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )


def test_what_is_no_model_and_what_is_no_export(own_checkpoint: CheckpointMaker, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        export_onnx(tmp_path / "nothing", tmp_path / "onnx", experts="standard")
    with pytest.raises(ExportError, match="no exported model"):
        open_model(tmp_path)
    assert "no exported model" in invoke("generate", tmp_path, "Hello").stderr
    folder = own_checkpoint("qwen3_moe")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(CheckpointError, match=r"quantised with the method 'awq'"):
        export_onnx(folder, tmp_path / "onnx", experts="standard")
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match="lacks"):
        export_onnx(folder, tmp_path / "onnx", experts="standard")
    for wrong in ({"experts": "magic"}, {"dtype": "float8"}):
        with pytest.raises(ExportError, match="There is no"):
            export_onnx(folder, tmp_path / "onnx", **wrong)


def test_a_model_damaged_after_its_export_is_an_error_of_ours(exported: ExportMaker, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported("standard"), tmp_path / "copy"))
    (folder / "model.onnx.data").unlink()
    with pytest.raises(ExportError, match="cannot be opened by ONNX Runtime"):
        open_model(folder, device="cpu")
    pytest.importorskip("onnxruntime_genai")
    with pytest.raises(ExportError, match=r"onnxruntime-genai .* cannot run"):
        list(generate(folder, [1, 2], device="cpu"))


def test_values_wider_than_keys_are_refused() -> None:
    model = tiny_model("deepseek_v3", kv_lora_rank=4, num_hidden_layers=1, first_k_dense_replace=0)
    with pytest.raises(ExportError, match="values of shape"):
        cache_shape(model)


def test_the_cache_of_latent_attention_is_the_latent_one() -> None:
    assert cache_shape(tiny_model("deepseek_v3")) == CacheShape(3, 1, 16, 8)
