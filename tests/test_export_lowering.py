"""One experts module as ONNX nodes: every lowering against the module in torch, in all forms, families and types."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
ort = pytest.importorskip("onnxruntime")

from molae_compress.errors import ExportError, MolaeError  # noqa: E402
from molae_compress.export.banks import ExpertTensors, expert_tensors  # noqa: E402
from molae_compress.export.graph import OPSET  # noqa: E402
from molae_compress.export.lowering import LOWERINGS, Lowering, lower_, prepare  # noqa: E402
from molae_compress.export.slots import SLOT_DOMAIN, SLOT_NAME, experts_of, layout_and_spec  # noqa: E402
from molae_compress.kernels.activation import Activation, find_activation  # noqa: E402
from molae_compress.layouts import gated  # noqa: E402
from molae_compress.tensors import AnyShape, ExpertsSpec, LatentShape  # noqa: E402
from tests.test_modeling import SHAPES, attach_all_, random_latent  # noqa: E402
from tests.tiny import EXPERTS, FAMILIES, HIDDEN, INTERMEDIATE, TOP_K, tiny_model  # noqa: E402
from tests.zoo import zoo_model  # noqa: E402

FITS_MOE = {
    "layer": SHAPES["layer"],
    "one group a side": SHAPES["one group a side"],  # unequal ranks, interpolative
    "dense": None,
}
HALF = {torch.float16: 0.01, torch.bfloat16: 0.05}  # of the largest output


@pytest.fixture(scope="session")
def library() -> Path:
    """The operator library; tests that need it are skipped only where it cannot be compiled."""
    kernels = pytest.importorskip("molae_compress.kernels")
    try:
        return Path(kernels.build())
    except MolaeError as error:
        pytest.skip(str(error))


@pytest.fixture
def options(request: pytest.FixtureRequest) -> Callable[[str], ort.SessionOptions]:
    """`options(how)`: of a session that knows the operators of a lowering."""

    def make(how: str) -> ort.SessionOptions:
        made = ort.SessionOptions()
        made.log_severity_level = 4
        if how == "molae":
            made.register_custom_ops_library(str(request.getfixturevalue("library")))
        return made

    return make


def experts_with(family: str, shape: AnyShape | None, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, ExpertTensors]:
    """The last experts module of a tiny model, compressed to a shape or not, and what the export reads of it."""
    model = tiny_model(family)
    if shape is not None:
        attach_all_(model, shape)
    return last_of(model, dtype)


def last_of(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, ExpertTensors]:
    model = model.to(dtype)
    name, module = list(experts_of(model).items())[-1]
    return module, expert_tensors(module, *layout_and_spec(model, name, module))


def lowered(experts: ExpertTensors, how: Lowering, dtype: torch.dtype = torch.float32, top_k: int = TOP_K) -> ir.Model:
    """A graph of nothing but these experts."""
    kind = ir.tensor_adapters.from_torch_dtype(dtype)
    hidden = experts.spec.hidden
    x, index, weight = (
        ir.Value(name=name, type=ir.TensorType(type_), shape=ir.Shape(shape))
        for name, type_, shape in (
            ("x", kind, ["T", hidden]),
            ("index", ir.DataType.INT64, ["T", top_k]),
            ("weight", kind, ["T", top_k]),
        )
    )
    slot = ir.Node(SLOT_DOMAIN, SLOT_NAME, [x, index, weight], [ir.AttrInt64("number", 0)], name="slot")
    slot.outputs[0].name, slot.outputs[0].type = "y", ir.TensorType(kind)
    slot.outputs[0].shape = ir.Shape(["T", hidden])
    opsets = {"": OPSET, SLOT_DOMAIN: 1}
    graph = ir.Graph([x, index, weight], slot.outputs, nodes=[slot], opset_imports=opsets, name="experts")
    model = ir.Model(graph, ir_version=10)
    lower_(model, prepare([experts], how), how, dtype)
    return model


def run(model: ir.Model, options: ort.SessionOptions, folder: Path, *inputs: Tensor) -> Tensor:
    path = folder / "experts.onnx"
    ir.save(model, path, external_data="experts.data")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = dict(zip(("x", "index", "weight"), (tensor.numpy() for tensor in inputs), strict=True))
    return torch.from_numpy(session.run(None, feed)[0])


def routing(tokens: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens over six of the experts: two have none; weights that do not add up to one."""
    generator = torch.Generator().manual_seed(seed)
    x_TH = torch.randn(tokens, HIDDEN, generator=generator)
    index_TK = torch.stack([torch.randperm(EXPERTS - 2, generator=generator)[:TOP_K] for _ in range(tokens)])
    weight_TK = torch.rand(tokens, TOP_K, generator=generator) + 0.05
    return x_TH.to(dtype), index_TK, weight_TK.to(dtype)


def compare(
    how: Lowering, module: nn.Module, experts: ExpertTensors, options: Callable[[str], ort.SessionOptions], folder: Path
) -> None:
    model = lowered(experts, how)
    for tokens in (11, 1):
        given = routing(tokens)
        with torch.no_grad():
            expected = module(*given)
        found = run(model, options(how), folder, *given)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- what is computed


@pytest.mark.parametrize("name", [*SHAPES, "dense"])
@pytest.mark.parametrize(("how", "family"), [("molae", "qwen3_moe"), ("molae", "gpt_oss"), ("standard", "gpt_oss")])
def test_every_shape_computes_what_the_module_computes(
    how: Lowering, name: str, family: str, options: Callable[[str], ort.SessionOptions], tmp_path: Path
) -> None:
    compare(how, *experts_with(family, SHAPES.get(name)), options, tmp_path)


@pytest.mark.parametrize("name", FITS_MOE)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_what_fits_the_operator_of_onnx_runtime_is_right_in_it(
    name: str, family: str, options: Callable[[str], ort.SessionOptions], tmp_path: Path
) -> None:
    compare("ort-moe", *experts_with(family, FITS_MOE[name]), options, tmp_path)


@pytest.mark.parametrize("how", LOWERINGS)
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"qwen3_moe", "gpt_oss"}))
def test_every_family_in_every_lowering(
    how: Lowering, family: str, options: Callable[[str], ort.SessionOptions], tmp_path: Path
) -> None:
    compare(how, *experts_with(family, SHAPES["layer"]), options, tmp_path)


@pytest.mark.parametrize("how", LOWERINGS)
@pytest.mark.parametrize(("family", "name"), [("qwen3_moe", "dense"), ("gpt_oss", "layer")])
def test_float16(
    how: Lowering, name: str, family: str, options: Callable[[str], ort.SessionOptions], tmp_path: Path
) -> None:
    module, experts = experts_with(family, SHAPES.get(name), torch.float16)
    given = routing(11, torch.float16)
    with torch.no_grad():
        expected = module.float()(given[0].float(), given[1], given[2].float())
    found = run(lowered(experts, how, torch.float16), options(how), tmp_path, *given)
    assert found.dtype == torch.float16
    assert float((found.float() - expected).abs().max() / expected.abs().max()) < HALF[torch.float16]


@pytest.mark.parametrize("how", LOWERINGS)
def test_bfloat16_is_well_typed(how: Lowering) -> None:
    """No CPU kernel computes it, so that the types of the graph are checked instead."""
    _, experts = experts_with("gpt_oss", SHAPES["layer"], torch.bfloat16)
    model = lowered(experts, how, torch.bfloat16)
    wrong = [
        value.name
        for value in model.graph.initializers.values()
        if value.dtype == ir.DataType.FLOAT and value.shape is not None and value.shape.rank() > 0
    ]
    assert wrong == []
    if how == "standard":
        onnx.shape_inference.infer_shapes(ir.to_proto(model), check_type=True, strict_mode=True)


def test_routing_weights_that_vanish(options: Callable[[str], ort.SessionOptions], tmp_path: Path) -> None:
    """Their logarithm is minus infinity."""
    module, experts = experts_with("mixtral", SHAPES["layer"])
    x, index, weight = routing(5)
    weight[0, 0], weight[1] = 0.0, 0.0
    with torch.no_grad():
        expected = module(x, index, weight)
    torch.testing.assert_close(
        run(lowered(experts, "ort-moe"), options("ort-moe"), tmp_path, x, index, weight), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("how", LOWERINGS)
def test_a_token_may_name_an_expert_twice(
    how: Lowering, options: Callable[[str], ort.SessionOptions], tmp_path: Path
) -> None:
    """As layouts do with slots that have no expert."""
    module, experts = experts_with("qwen3_moe", SHAPES["layer"])
    x, index, weight = routing(5)
    index[2] = 3
    with torch.no_grad():
        expected = module(x, index, weight)
    found = run(lowered(experts, how), options(how), tmp_path, x, index, weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["mish"])
def test_standard_traces_whatever_activation_the_model_has(
    activation: str, options: Callable[[str], ort.SessionOptions], tmp_path: Path
) -> None:
    model = tiny_model("qwen3_moe", hidden_act=activation)
    attach_all_(model, SHAPES["orthonormal"])
    compare("standard", *last_of(model), options, tmp_path)


@pytest.mark.parametrize("compressed", [False, True])
def test_standard_keeps_the_norm_of_every_expert(
    compressed: bool, options: Callable[[str], ort.SessionOptions], tmp_path: Path
) -> None:
    model = zoo_model("MuseSparkForConditionalGeneration").eval()
    name, module = next(iter(experts_of(model).items()))
    layout, spec = layout_and_spec(model, name, module)
    assert spec.has_output_norm
    if compressed:
        from molae_compress.modeling import LatentExperts

        shape = LatentShape("grouped", 12, 16, spec.num_experts, spec.num_experts)
        module = LatentExperts.from_stock(module, spec, shape)
        module.load_latent_(random_latent(spec, shape))
    experts = expert_tensors(module, layout, spec)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, spec.hidden, generator=generator)
    index = torch.stack([torch.randperm(spec.num_experts, generator=generator)[:2] for _ in range(7)])
    weight = torch.rand(7, 2, generator=generator)
    with torch.no_grad():
        expected = module(x, index, weight)
    found = run(lowered(experts, "standard", top_k=2), options("standard"), tmp_path, x, index, weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for how in ("molae", "ort-moe"):
        with pytest.raises(ExportError, match=r"normalises the output.*standard"):
            prepare([experts], how)


# ---------------------------------------------------------------- what the graph holds


@pytest.mark.parametrize(
    ("how", "name", "expected"),
    [
        ("molae", "layer", {"LatentExperts": 1}),
        ("molae", "interpolative", {"LatentExperts": 1}),
        ("molae", "banks", {"LatentExperts": 3, "Gather": 3, "Add": 2}),
        ("molae", "dense", {"LatentExperts": 1}),
        ("standard", "orthonormal", {"Loop": 1}),
        ("ort-moe", "layer", {"MoE": 1, "MatMul": 2}),
        ("ort-moe", "dense", {"MoE": 1}),
    ],
)
def test_the_graph_is_small(how: Lowering, name: str, expected: dict[str, int]) -> None:
    _, experts = experts_with("qwen3_moe", SHAPES.get(name))
    model = lowered(experts, how)
    counts = Counter(node.op_type for node in model.graph)
    assert expected.items() <= counts.items()
    assert sum(counts.values()) <= 16
    assert sum(1 for _ in model.graph.all_nodes()) <= 45
    if how == "molae":
        assert counts == expected


@pytest.mark.parametrize("how", LOWERINGS)
@pytest.mark.parametrize("family", ["gpt_oss"])
def test_no_weight_is_stored_twice_or_rearranged_by_nodes(how: Lowering, family: str) -> None:
    module, experts = experts_with(family, SHAPES["layer"])
    model = lowered(experts, how)
    stored = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    wanted = sum(parameter.nbytes for parameter in module.parameters())
    assert wanted <= stored < wanted + 2000
    rearranged = [
        node.op_type
        for node in model.graph.all_nodes()
        if node.op_type in ("Transpose", "Reshape")
        and any(value is not None and value.is_initializer() for value in node.inputs[:1])
    ]
    assert rearranged == []


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("interpolative", "4 input bases"),
        ("separate", "bases of their own"),
        ("dense down", "bases of their own"),
        ("banks", "3 banks"),
    ],
)
def test_the_operator_of_onnx_runtime_refuses_what_it_cannot_hold(name: str, says: str) -> None:
    _, experts = experts_with("qwen3_moe", SHAPES[name])
    with pytest.raises(ExportError, match=says) as caught:
        prepare([experts], "ort-moe")
    assert "--experts molae" in caught.value.remedy


def test_activations_that_operators_lack_are_refused() -> None:
    _, gelu = last_of(tiny_model("qwen3_moe", hidden_act="gelu"))
    _, mish = last_of(tiny_model("qwen3_moe", hidden_act="mish"))
    prepare([gelu], "molae")
    for experts, how in ((gelu, "ort-moe"), (mish, "ort-moe"), (mish, "molae")):
        with pytest.raises(ExportError, match="activation") as caught:
            prepare([experts], how)
        assert "standard" in caught.value.remedy


# ---------------------------------------------------------------- activations


def found_in(activate: Callable[[Tensor], Tensor], spec: ExpertsSpec) -> Activation | None:
    return find_activation(activate, gated=spec.has_gate, interleaved=spec.interleaved)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_activation_of_every_family_is_known(family: str) -> None:
    _, experts = experts_with(family, None)
    expected = Activation("silu", 1.702, 1.0, 1.0) if family == "gpt_oss" else Activation("silu")
    assert found_in(experts.activate, experts.spec) == expected


SPEC = ExpertsSpec("experts", 0, EXPERTS, HIDDEN, INTERMEDIATE)
PLAIN = ExpertsSpec("experts", 0, EXPERTS, HIDDEN, INTERMEDIATE, has_gate=False)


@pytest.mark.parametrize(
    ("activate", "expected"),
    [
        (gated(F.silu), Activation("silu")),
        (gated(F.gelu), Activation("gelu")),
        (gated(lambda x: F.gelu(x, approximate="tanh")), Activation("gelu_tanh")),
        (gated(F.relu), Activation("relu")),
        (gated(lambda x: F.relu(x) ** 2), Activation("relu2")),
        (gated(lambda x: x), Activation("identity")),
        (gated(lambda x: x * torch.sigmoid(1.702 * x)), Activation("silu", alpha=1.702)),
        (Activation("gelu", limit=10.0, up_offset=1.0), Activation("gelu", limit=10.0, up_offset=1.0)),
        (Activation("silu", limit=7.0), Activation("silu", limit=7.0)),
        (gated(F.mish), None),
        (gated(lambda x: F.silu(x.clamp(-5, 5))), None),  # clamped on both sides
        (lambda h: F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1].clamp(max=3), None),
        (gated(lambda x: 0.5 * F.silu(x)), None),
    ],
)
def test_activations_are_told_by_what_they_compute(activate: object, expected: Activation | None) -> None:
    if isinstance(activate, Activation):
        kind = activate
        activate = lambda h: kind(*h.chunk(2, -1))  # noqa: E731
    assert found_in(activate, SPEC) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(("activate", "kind"), [(F.silu, "silu"), (F.relu, "relu"), (lambda x: F.relu(x) ** 2, "relu2")])
def test_activations_without_a_gate(activate: Callable[[Tensor], Tensor], kind: str) -> None:
    assert found_in(activate, PLAIN) == Activation(kind)
    assert found_in(lambda x: activate(x) + 0.1, PLAIN) is None


def test_no_numbers_of_torch_are_drawn() -> None:
    state = torch.get_rng_state()
    found_in(gated(F.silu), SPEC)
    assert torch.equal(state, torch.get_rng_state())
    assert np.isfinite(float(torch.rand(1)))
