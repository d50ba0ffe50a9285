"""Runs nodes with right and with damaged inputs; a child process of the slow tests, with AddressSanitizer loaded.

    python -m tests.kernels_fuzz LIBRARY ROUNDS

No arena, so that every block of scratch memory is one that the sanitizer watches.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import onnxruntime
import torch

from molae_compress.tensors import LatentShape
from tests.latent_nodes import (
    Feeds,
    assert_near,
    bind,
    latent_attributes,
    latent_feeds,
    model_of,
    naive_latent,
    random_bank,
    random_routing,
)


def some_node(chance: random.Random) -> tuple[Feeds, dict[str, Any]]:
    experts = chance.choice((1, 2, 4, 6))
    hidden, intermediate = chance.randint(1, 90), chance.randint(1, 90)
    divisors = [size for size in (1, 2, 3, 6) if experts % size == 0]
    rank_out = chance.choice((None, chance.randint(1, hidden)))
    groups = chance.choice(divisors), chance.choice(divisors)
    storage, gate_up = chance.choice(("orthonormal", "interpolative")), chance.choice(("joint", "separate"))
    shape = LatentShape("grouped", chance.randint(1, hidden), rank_out, *groups, gate_up, storage)  # type: ignore[arg-type]
    dtype, seed = chance.choice((torch.float32, torch.float16, torch.bfloat16)), chance.randint(0, 10**6)
    traits = {"has_bias": chance.random() < 0.5, "interleaved": chance.random() < 0.5}
    bank, tensors = random_bank(
        shape, hidden=hidden, intermediate=intermediate, experts=experts, dtype=dtype, seed=seed, **traits
    )
    routed = random_routing(
        bank, chance.choice((0, 1, 2, 9, 60)), chance.randint(1, experts), dtype=dtype, seed=seed, strangers=0.2
    )
    return latent_feeds(bank, tensors, *routed), latent_attributes(bank, activation="silu")


def damaged(feeds: Feeds, chance: random.Random) -> Feeds:
    """One input with a wrong shape or wild numbers, or missing."""
    name = chance.choice([name for name, tensor in feeds.items() if tensor is not None and name != "x"])
    tensor = feeds[name]
    assert tensor is not None
    way = chance.choice(("numbers", "rows", "columns", "rank", "none", "empty"))
    if way == "numbers":
        wild = torch.randint(-(2**31), 2**31 - 1, tensor.shape).to(tensor.dtype)
        return {**feeds, name: torch.where(torch.rand(tensor.shape) < 0.2, wild, tensor)}
    if way == "none" and name not in ("index", "weight", "encode", "core", "down"):
        return {**feeds, name: None}
    if way == "rows":
        return {**feeds, name: tensor[:-1] if tensor.shape[0] > 1 else torch.cat((tensor, tensor))}
    if way == "columns":
        return {**feeds, name: tensor[..., :-1]}
    return {**feeds, name: tensor[None] if way == "rank" else tensor[:0]}


def main(library: str, rounds: int) -> None:
    chance = random.Random(0)
    torch.manual_seed(0)
    refused = 0
    for number in range(rounds):
        feeds, attributes = some_node(chance)
        whole = number % 3 == 0
        if not whole:
            feeds = damaged(feeds, chance)
        if chance.random() < 0.1:
            attributes |= {chance.choice(("rank_in", "rank_out", "num_experts", "input_group")): chance.randint(-1, 70)}
            whole = False
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 2, 4
        options.enable_cpu_mem_arena = False
        options.register_custom_ops_library(library)
        try:
            session = onnxruntime.InferenceSession(
                model_of("LatentExperts", feeds, **attributes), options, providers=["CPUExecutionProvider"]
            )
            binding = bind(session, feeds)
            session.run_with_iobinding(binding)
        except Exception:
            assert not whole
            refused += 1
            continue
        if whole:
            dtype = feeds["x"].dtype if feeds["x"] is not None else torch.float32
            assert_near(torch.from_numpy(binding.get_outputs()[0].numpy()).to(dtype), naive_latent(feeds, attributes))
    sys.stdout.write(f"{rounds} nodes, {refused} refused\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
