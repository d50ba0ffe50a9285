"""What the operators and their library refuse: an error with the reason in it, never a crash or a wrong number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

from molae_compress.errors import KernelError
from molae_compress.kernels import build, compiling, library, library_path, register
from molae_compress.tensors import LatentShape
from tests.latent_nodes import Feeds, latent_attributes, latent_feeds, random_bank, random_routing, run_node

HIDDEN, INTERMEDIATE, EXPERTS = 12, 10, 4
ANY_ERROR = Exception  # ONNX Runtime's own have no other base


def latent_case(**changes: Any) -> tuple[Feeds, dict[str, Any]]:
    values: dict[str, Any] = {"rank_in": 4, "rank_out": 5, "input_group": 2, "output_group": 2, "storage": "interpolative"}
    shape = LatentShape("grouped", **(values | changes))
    bank, tensors = random_bank(shape, hidden=HIDDEN, intermediate=INTERMEDIATE, experts=EXPERTS, has_bias=True)
    feeds = latent_feeds(bank, tensors, *random_routing(bank, 6, 2))
    return feeds, latent_attributes(bank, activation="silu")


def gemm_case() -> Feeds:
    return {
        "a": torch.randn(6, 5),
        "b": torch.randn(3, 7, 5),
        "ends": torch.tensor([2, 2, 6], dtype=torch.int32),
        "bias": torch.randn(3, 7),
        "row_weight": torch.randn(6),
    }


def changed(feeds: Feeds, name: str, place: tuple[int, ...], value: int) -> Feeds:
    tensor = feeds[name]
    assert tensor is not None
    tensor = tensor.clone()
    tensor[place] = value
    return {**feeds, name: tensor}


@pytest.mark.parametrize(
    ("feed", "place", "value", "message"),
    [
        ("index", (3, 1), EXPERTS + 1, "'index' is 5 for token 3, expected 0 to 4"),
        ("index", (0, 0), -1, "'index' is -1 for token 0"),
        ("index", (5, 1), 2**62, "'index' is 4611686018427387904"),
        ("encode_pivots", (3,), HIDDEN, "'encode_pivots' is 12 at 3, expected"),
        ("encode_pivots", (0,), -1, "'encode_pivots' is -1 at 0, expected 0"),
        ("encode_pivots", (0,), HIDDEN - 2, "'encode_pivots' is 10 at 0, expected 0 to 8"),
        ("decode_pivots", (4,), 0, "'decode_pivots' is 0 at 4"),
    ],
)
def test_numbers_out_of_range_are_refused(feed: str, place: tuple[int, ...], value: int, message: str) -> None:
    feeds, attributes = latent_case()
    feeds["index"] = torch.arange(12).reshape(6, 2) % EXPERTS  # every group is in use, and so its pivots are read
    with pytest.raises(ANY_ERROR, match=message):
        run_node("LatentExperts", changed(feeds, feed, place, value), **attributes)


NAMES = ("index", "weight", "encode", "encode_pivots", "core", "core_bias", "down", "decode", "decode_pivots", "decode_bias")


@pytest.mark.parametrize("name", NAMES)
def test_every_shape_is_checked(name: str) -> None:
    feeds, attributes = latent_case()
    tensor = feeds[name]
    assert tensor is not None
    longer, wider = (tensor.shape[0] + 1, *tensor.shape[1:]), (*tensor.shape[:-1], tensor.shape[-1] + 1)
    for other in (tensor.new_zeros(longer), tensor.new_zeros(wider), tensor.flatten()[:, None, None]):
        with pytest.raises(ANY_ERROR, match=r"molae::LatentExperts: the input '\w+' is \["):
            run_node("LatentExperts", {**feeds, name: other}, **attributes)


@pytest.mark.parametrize("name", ["b", "ends", "bias", "row_weight"])
def test_every_shape_of_a_gemm_is_checked(name: str) -> None:
    feeds = gemm_case()
    tensor = feeds[name]
    assert tensor is not None
    for other in (torch.cat((tensor, tensor)), tensor[..., :-1], tensor[None]):
        with pytest.raises(ANY_ERROR, match=r"molae::GroupedGemm: the input '\w+' is \["):
            run_node("GroupedGemm", {**feeds, name: other})


@pytest.mark.parametrize("ends", [(2, 1, 6), (2, 2, 7), (-1, 2, 6)])
def test_ends_must_ascend_within_the_rows(ends: tuple[int, ...]) -> None:
    with pytest.raises(ANY_ERROR, match="ends ascend"):
        run_node("GroupedGemm", gemm_case() | {"ends": torch.tensor(ends, dtype=torch.int32)})


def test_a_gate_needs_an_even_number_of_columns() -> None:
    with pytest.raises(ANY_ERROR, match="7 columns"):
        run_node("GroupedGemm", gemm_case(), gated=1)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("activation", "swish", "'activation' is 'swish'"),
        ("activation", 1, "'activation' is no string"),
        ("num_experts", 0, "'num_experts' is 0, expected 1 or more"),
        ("num_experts", 2**40, "'num_experts' is 1099511627776"),
        ("num_experts", "four", "'num_experts' is missing, or no int"),
        ("input_group", 3, "'input_group' is 3, which does not divide the 4 experts"),
        ("output_group", -2, "'output_group' is -2"),
        ("rank_out", -1, "'rank_out' is -1"),
        ("gated", 2, "'gated' is 2, expected 0 to 1"),
        ("interleaved", 1.0, "'interleaved' is missing, or no int"),
        ("limit", 7, "'limit' is no float"),
        ("limit", -1.0, "'limit' is -1"),
        ("alpha", "big", "'alpha' is no float"),
    ],
)
def test_wrong_attributes_are_refused_when_the_graph_is_loaded(attribute: str, value: Any, message: str) -> None:
    feeds, attributes = latent_case()
    with pytest.raises(ANY_ERROR, match=message):
        run_node("LatentExperts", feeds, **(attributes | {attribute: value}))


def test_inputs_that_belong_together() -> None:
    feeds, attributes = latent_case(gate_up="separate")
    for left_out, message in (
        ("up_encode", "belong together"),
        ("core_up", "belong together"),
        ("decode", "'decode' is missing"),
    ):
        with pytest.raises(ANY_ERROR, match=message):
            run_node("LatentExperts", feeds | {left_out: None}, **attributes)
    with pytest.raises(ANY_ERROR, match="needs the attribute gated = 1"):
        run_node("LatentExperts", feeds, **(attributes | {"gated": 0}))
    feeds, attributes = latent_case(rank_out=None)
    with pytest.raises(ANY_ERROR, match="not for a dense second projection"):
        run_node("LatentExperts", feeds | {"decode": torch.randn(20, HIDDEN)}, **attributes)
    feeds, attributes = latent_case(storage="orthonormal", rank_in=HIDDEN)
    with pytest.raises(ANY_ERROR, match="more than the hidden size 12"):
        run_node("LatentExperts", feeds, **(attributes | {"rank_in": 13}))


def test_a_missing_library_is_refused_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "libmolae_ops.so")
    with pytest.raises(KernelError, match=r"does not exist.*make kernels"):
        library_path()
    with pytest.raises(KernelError, match="does not exist"):
        register(onnxruntime.SessionOptions())


def test_a_library_of_other_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build()
    other = tmp_path / "libmolae_ops.so"
    mark = compiling.marks()[0].removeprefix(compiling.MARK).encode()
    other.write_bytes(library_path().read_bytes().replace(mark, b"0" * len(mark)))
    monkeypatch.setattr(library, "LIBRARY", other)
    with pytest.raises(KernelError, match="compiled from other sources"):
        library_path()


def test_without_a_compiler_building_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "libmolae_ops.so")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(KernelError, match=r"no C\+\+ compiler was found.*Install g\+\+"):
        build()


def test_a_file_that_is_no_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "libmolae_ops.so"
    broken.write_bytes(" ".join(compiling.marks()).encode())
    monkeypatch.setattr(library, "LIBRARY", broken)
    with pytest.raises(KernelError, match="does not load the operator library"):
        register(onnxruntime.SessionOptions())
