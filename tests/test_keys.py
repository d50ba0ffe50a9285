"""The key map against the installed transformers, on tiny models of the six families as save_pretrained writes them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming

from molae_compress.adapters.keys import KeyMap
from molae_compress.checkpoint import Checkpoint, TensorSource, write_shards
from molae_compress.errors import CheckpointError

_COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 16, "tie_word_embeddings": True},
    "qwen2_moe": {"num_experts": 8, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
    "mixtral": {"num_local_experts": 8},
    "olmoe": {"num_experts": 8},
    "deepseek_v3": {
        "n_routed_experts": 8,
        "moe_intermediate_size": 16,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    "gpt_oss": {"num_local_experts": 8},
}
LATENT_NAMES = [
    "encode.weight",
    "encode.pivots",
    "gate_encode.weight",
    "gate_encode.pivots",
    "up_encode.weight",
    "up_encode.pivots",
    "core.gate_up_proj",
    "core.gate_up_proj_bias",
    "core.up_proj",
    "core.up_proj_bias",
    "core.down_proj",
    "core.gate_up",
    "core.gate",
    "core.up",
    "core.down",
    "core.bias",
    "decode.weight",
    "decode.pivots",
    "decode_bias",
]


def build(family: str) -> PreTrainedModel:
    config = transformers.CONFIG_MAPPING[family](**(_COMMON | FAMILIES[family]))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def on_meta(model: PreTrainedModel) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model.config)


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Checkpoint]:
    model = build(request.param)
    # Buffers that start at zero would hide a buffer that is not read.
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder, max_shard_size="60KB")
    return model, Checkpoint.open(folder)


def test_materialising_every_module_gives_the_state_dict(saved: tuple[PreTrainedModel, Checkpoint]) -> None:
    model, checkpoint = saved
    keys = KeyMap(on_meta(model), checkpoint.entries)
    expected = model.state_dict()
    modules = [
        name for name, module in model.named_modules() if name.count(".") == 2 or (name and not list(module.children()))
    ]
    made: dict[str, Tensor] = {}
    for name in modules:
        part = keys.materialise(name, checkpoint.read)
        assert all(target.startswith(name + ".") for target in part)
        made |= part
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in expected)
    assert made.keys() == keys.materialise("", checkpoint.read).keys()


def test_every_source_key_is_used_or_unknown(saved: tuple[PreTrainedModel, Checkpoint]) -> None:
    model, checkpoint = saved
    strange = {"mtp.layers.0.proj.weight", "model.layers.7.mlp.experts.0.gate_proj.weight", "model.layers.0.extra"}
    keys = KeyMap(on_meta(model), [*checkpoint.entries, *strange])
    used = {key for sources in keys.targets.values() for key in sources}
    assert keys.unknown == strange
    assert used == set(checkpoint.entries) == keys.sources_of("")
    assert keys.missing == set()


def test_sources_of_the_experts_are_what_a_layer_loses(saved: tuple[PreTrainedModel, Checkpoint]) -> None:
    model, checkpoint = saved
    keys = KeyMap(on_meta(model), checkpoint.entries)
    experts, layer = "model.layers.1.mlp.experts", "model.layers.1"
    read: list[str] = []
    rest = keys.materialise(layer, lambda key: read.append(key) or checkpoint.read(key), exclude=experts)
    assert not any(name.startswith(experts) for name in rest)
    assert set(read) == keys.sources_of(layer) - keys.sources_of(experts)
    assert len(read) == len(set(read))
    dense_bytes = sum(tensor.nbytes for name, tensor in model.state_dict().items() if name.startswith(experts))
    assert sum(checkpoint.entries[key].nbytes for key in keys.sources_of(experts)) == dense_bytes


def test_latent_names_survive(saved: tuple[PreTrainedModel, Checkpoint]) -> None:
    model, checkpoint = saved
    keys = KeyMap(on_meta(model), checkpoint.entries)
    paths = [name for name, _ in model.named_modules() if name.endswith(".experts")]
    assert paths
    assert [name for path in paths for name in LATENT_NAMES if not keys.survives(f"{path}.{name}")] == []


def test_surviving_names_pass_through_save_and_load_of_transformers(tmp_path: Path) -> None:
    """What `survives` and `stored_name` promise, shown by save_pretrained and by the key map of the latent model."""
    for family in ("mixtral", "qwen3_moe"):
        model = build(family)
        experts = model.get_submodule("model.layers.0.mlp.experts")
        del experts.gate_up_proj, experts.down_proj
        for name in LATENT_NAMES:
            parent, _, leaf = name.rpartition(".")
            if parent and not hasattr(experts, parent):
                experts.add_module(parent, torch.nn.Module())
            owner = experts.get_submodule(parent) if parent else experts
            owner.register_parameter(leaf, torch.nn.Parameter(torch.rand(3)))
        model.save_pretrained(tmp_path / family)
        checkpoint = Checkpoint.open(tmp_path / family)
        keys = KeyMap(model, checkpoint.entries)
        full_names = [f"model.layers.0.mlp.experts.{name}" for name in LATENT_NAMES]
        assert {keys.stored_name(name) for name in full_names} <= set(checkpoint.entries)
        assert all(keys.targets[name] == (keys.stored_name(name),) for name in full_names)
        assert not keys.unknown
        assert not keys.missing


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen3_moe", "gate_up_proj"),
        ("qwen3_moe", "down_proj"),
        ("qwen3_moe", "down_proj.core"),
        ("qwen3_moe", "core.gate_proj.weight"),
        ("mixtral", "core.w1.weight"),
        ("mixtral", "down_proj"),
        ("phimoe", "encode_gate.weight"),
    ],
)
def test_names_that_the_mapping_takes_do_not_survive(family: str, name: str) -> None:
    config = transformers.CONFIG_MAPPING[family](num_hidden_layers=1)
    with torch.device("meta"):
        keys = KeyMap(AutoModelForCausalLM.from_config(config), [])
    assert not keys.survives(f"model.layers.0.mlp.experts.{name}")


@pytest.mark.parametrize("stored", ["model.embed_tokens.weight", "lm_head.weight"])
def test_tied_parameters_share_the_tensor_that_is_stored(stored: str) -> None:
    model = build("qwen3_moe")
    state = model.state_dict()
    both = {"model.embed_tokens.weight", "lm_head.weight"}
    keys = KeyMap(on_meta(model), [name for name in state if name not in both or name == stored])
    assert keys.missing == set()
    assert {keys.targets[name] for name in both} == {(stored,)}
    assert torch.equal(keys.materialise("lm_head", state.__getitem__)["lm_head.weight"], state["lm_head.weight"])


def test_a_parameter_without_source_is_missing() -> None:
    model = build("qwen2_moe")
    gone = {"lm_head.weight", "model.layers.1.mlp.gate.weight"}
    keys = KeyMap(on_meta(model), [name for name in model.state_dict() if name not in gone])
    assert keys.missing == gone


def test_one_to_many_converter_names_all_its_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """One source tensor that makes several parameters is read once for all of them, and for each alone."""
    model = build("deepseek_v3")
    state = model.state_dict()
    parts = [f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up")]
    fused = "model.layers.0.mlp.w12.weight"

    def mapping(model: PreTrainedModel, add_legacy: bool = True) -> list[WeightConverter]:
        return [WeightConverter("mlp.w12.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(dim=0)])]

    monkeypatch.setattr("molae_compress.adapters.keys.get_model_conversion_mapping", mapping)
    keys = KeyMap(on_meta(model), [fused, *(name for name in state if name not in parts)])
    assert not keys.unknown
    assert not keys.missing
    assert keys.targets[parts[0]] == keys.targets[parts[1]] == (fused,)
    read: list[str] = []

    def source(key: str) -> Tensor:
        read.append(key)
        return torch.cat([state[part] for part in parts]) if key == fused else state[key]

    made = keys.materialise("model.layers.0.mlp", source)
    assert read.count(fused) == 1
    assert all(torch.equal(made[part], state[part]) for part in parts)
    alone = keys.materialise(parts[1].removesuffix(".weight"), source)
    assert list(alone) == [parts[1]]
    assert torch.equal(alone[parts[1]], state[parts[1]])


def test_shapes_are_checked_without_reading(saved: tuple[PreTrainedModel, Checkpoint]) -> None:
    model, checkpoint = saved

    def shape_only(key: str) -> Tensor:
        entry = checkpoint.entries[key]
        return torch.empty(entry.shape, dtype=entry.torch_dtype, device="meta")

    keys = KeyMap(on_meta(model), checkpoint.entries)
    made = keys.materialise("", shape_only)
    assert {name: tensor.shape for name, tensor in made.items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }
    with pytest.raises(CheckpointError, match=r"\.weight'\) give the shape \[3\] instead of \[64, 32\]"):
        keys.materialise("lm_head", lambda key: torch.empty(3))


@pytest.mark.parametrize("fault", ["missing", "other shape"])
def test_an_incomplete_stack_of_experts_is_refused(fault: str, tmp_path: Path) -> None:
    model = build("qwen3_moe")
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    odd = "model.layers.1.mlp.experts.3.up_proj.weight"
    keys = KeyMap(on_meta(model), [key for key in checkpoint.entries if fault != "missing" or key != odd])
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        keys.materialise(
            "model.layers.1",
            lambda key: torch.ones(2, 2) if fault != "missing" and key == odd else checkpoint.read(key),
        )


def test_a_read_that_fails_leaves_nothing_behind(saved: tuple[PreTrainedModel, Checkpoint]) -> None:
    model, checkpoint = saved
    keys = KeyMap(on_meta(model), checkpoint.entries)
    experts = "model.layers.1.mlp.experts"
    last = sorted(keys.sources_of(experts))[-1]

    def failing(key: str) -> Tensor:
        if key == last:
            raise CheckpointError("damaged")
        return checkpoint.read(key)

    with pytest.raises(CheckpointError, match="damaged"):
        keys.materialise(experts, failing)
    made = keys.materialise(experts, checkpoint.read)
    assert all(torch.equal(made[name], model.state_dict()[name]) for name in made)


def test_a_key_that_is_a_parameter_already_is_not_renamed_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader's last resort, for checkpoints in the names of the model class."""
    model = build("qwen3_moe")
    renaming = WeightRenaming(r"mlp\.gate\.", "mlp.router.")
    monkeypatch.setattr(
        "molae_compress.adapters.keys.get_model_conversion_mapping", lambda model, add_legacy=True: [renaming]
    )
    keys = KeyMap(on_meta(model), model.state_dict())
    assert not keys.unknown
    assert not keys.missing


def test_experts_are_stacked_by_number_not_by_text() -> None:
    """Expert 10 comes after expert 9, whatever the order of the keys."""
    config = transformers.CONFIG_MAPPING["qwen3_moe"](**(_COMMON | FAMILIES["qwen3_moe"] | {"num_experts": 12}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    path = "model.layers.0.mlp.experts"
    keys = KeyMap(model, sorted(f"{path}.{expert}.down_proj.weight" for expert in range(12)))
    made = keys.materialise(path, lambda key: torch.full((32, 16), float(key.split(".")[5])))
    assert made[f"{path}.down_proj"][:, 0, 0].tolist() == list(range(12))


def test_source_tensors_are_dropped_when_joined() -> None:
    """Only the results outlive `materialise`, and the sources of one target are gone before the next is read."""
    import gc
    import weakref

    model = build("qwen3_moe")
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def read(key: str) -> Tensor:
        nonlocal most
        tensor = torch.ones((32, 16) if "down" in key else (16, 32))
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    path = "model.layers.0.mlp.experts"
    keys = KeyMap(
        on_meta(model),
        [f"{path}.{expert}.{part}_proj.weight" for expert in range(8) for part in ("gate", "up", "down")],
    )
    keys.materialise(path, read)
    gc.collect()
    assert len(alive) == 24
    # The first of a stack, the one being copied, and the one being read.
    assert most <= 3


def test_bf16_is_kept(tmp_path: Path) -> None:
    model = build("gpt_oss").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    keys = KeyMap(on_meta(model), checkpoint.entries)
    made = keys.materialise("", checkpoint.read)
    assert all(torch.equal(made[name], tensor) for name, tensor in model.state_dict().items())
    assert made["model.layers.0.mlp.experts.gate_up_proj"].dtype == torch.bfloat16


def test_transformers_still_has_what_the_key_map_uses() -> None:
    """Names what changed, where another test would only fail somewhere."""
    from transformers import conversion_mapping, core_model_loading

    expected = {
        conversion_mapping.get_model_conversion_mapping: {"model", "add_legacy"},
        core_model_loading.rename_source_key: {
            "source_key",
            "weight_renamings",
            "weight_converters",
            "base_model_prefix",
            "meta_state_dict",
        },
        core_model_loading.apply_renamings: {"source_key", "weight_renamings"},
        core_model_loading.apply_converters: {"source_key", "weight_converters"},
        core_model_loading.WeightConverter.add_tensor: {"target_key", "source_key", "source_pattern", "future"},
        core_model_loading.WeightConverter.convert: {"layer_name", "model", "config"},
    }
    for function, arguments in expected.items():
        assert arguments <= set(inspect.signature(function).parameters), function.__qualname__
    model = build("mixtral")
    assert isinstance(model.all_tied_weights_keys, dict)
    kinds = {type(transform).__name__ for transform in conversion_mapping.get_model_conversion_mapping(model)}
    assert kinds == {"WeightRenaming", "WeightConverter"}


def test_the_key_map_reads_what_from_pretrained_reads(tmp_path: Path) -> None:
    """Old prefixes: a checkpoint of the bare model loads into the model with a head, and the other way round."""
    model = build("mixtral")
    model.save_pretrained(tmp_path / "whole")
    checkpoint = Checkpoint.open(tmp_path / "whole")
    bare = [
        TensorSource.stored(checkpoint, name, name.removeprefix("model."))
        for name in checkpoint.entries
        if name != "lm_head.weight"
    ]
    (tmp_path / "bare").mkdir()
    write_shards(tmp_path / "bare", bare, max_shard_size=10**9)
    checkpoint = Checkpoint.open(tmp_path / "bare")
    keys = KeyMap(on_meta(model), checkpoint.entries)
    assert keys.missing == {"lm_head.weight"}
    made = keys.materialise("model", checkpoint.read)
    assert all(torch.equal(made[name], tensor) for name, tensor in model.state_dict().items() if name in made)
    assert len(made) == len(model.state_dict()) - 1


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()
