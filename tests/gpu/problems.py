"""Random calls of the operator `molae::LatentExperts`, of every shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from molae_compress.kernels.activation import Activation
from molae_compress.kernels.gpu_problem import LatentExpertsProblem, LatentTensors
from molae_compress.kernels.gpu_tiles import ACTIVATIONS

SILU = Activation("silu")
CLOSE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Form:
    """What a random call is like; ranks of 0 leave the second projection dense."""

    tokens: int
    top_k: int = 2
    experts: int = 4
    hidden: int = 32
    intermediate: int = 24
    input_group: int = 2
    output_group: int = 1
    rank_in: int = 8
    rank_out: int = 16
    gated: bool = True
    interleaved: bool = False
    pair: bool = False
    interpolative: bool = False
    biased: bool = False
    activation: Activation = SILU
    dtype: torch.dtype = torch.float32
    strangers: bool = False


def make(form: Form, seed: int = 0) -> LatentExpertsProblem:
    """A call in which every tensor matters."""
    generator = torch.Generator().manual_seed(seed)
    E, H, I = form.experts, form.hidden, form.intermediate
    J = 2 * I if form.gated else I

    def random(*size: int) -> Tensor:
        return (torch.randn(*size, generator=generator) * 0.4).to(form.dtype)

    def basis(groups: int, rank: int) -> tuple[Tensor | None, Tensor | None]:
        if not rank:
            return None, None
        if not form.interpolative:
            return random(groups * rank, H), None
        pivots = [torch.randperm(H, generator=generator)[:rank].sort().values for _ in range(groups)]
        return random(groups * rank, H - rank), torch.cat(pivots).int()

    encode, encode_pivots = basis(E // form.input_group, form.rank_in)
    up_encode, up_encode_pivots = basis(E // form.input_group, form.rank_in * form.pair)
    decode, decode_pivots = basis(E // form.output_group, form.rank_out)
    assert encode is not None
    tensors = LatentTensors(
        encode=encode,
        encode_pivots=encode_pivots,
        core=random(E * form.rank_in, I if form.pair else J),
        up_encode=up_encode,
        up_encode_pivots=up_encode_pivots,
        core_up=random(E * form.rank_in, I) if form.pair else None,
        core_bias=random(E, J) if form.biased else None,
        down=random(E * (form.rank_out or H), I),
        decode=decode,
        decode_pivots=decode_pivots,
        decode_bias=random(E, H) if form.biased else None,
    )
    choices = E + 2 if form.strangers else E
    index = [torch.randperm(choices, generator=generator)[: form.top_k] - int(form.strangers) for _ in range(form.tokens)]
    return LatentExpertsProblem(
        random(form.tokens, H),
        torch.stack(index) if index else torch.empty(0, form.top_k, dtype=torch.int64),
        torch.rand(form.tokens, form.top_k, generator=generator).to(form.dtype),
        tensors,
        num_experts=E,
        input_group=form.input_group,
        output_group=form.output_group,
        rank_in=form.rank_in,
        rank_out=form.rank_out,
        gated=form.gated,
        interleaved=form.interleaved,
        activation=form.activation,
    )


# Every way through the launches: a few tokens and many, each arrangement of groups, both kinds of bases.
STRUCTURES = [
    Form(
        tokens,
        top_k=3,
        experts=6,
        input_group=input_group,
        output_group=output_group,
        rank_out=rank_out,
        interpolative=interpolative,
        biased=True,
        strangers=True,
        pair=input_group == 2,
        dtype=torch.float16,
    )
    for tokens in (3, 9)
    for input_group, output_group, rank_out in ((6, 6, 16), (2, 3, 16), (1, 1, 24), (3, 1, 0))
    for interpolative in (False, True)
]

activations = st.sampled_from([Activation(kind) for kind in ACTIVATIONS] + [Activation("silu", 1.702, 1.0, 1.0)])


@st.composite
def forms(draw: st.DrawFn, *, multiple: int = 1, types: tuple[torch.dtype, ...] = tuple(CLOSE)) -> Form:
    """Any form; widths and ranks are multiples of `multiple`."""
    experts = draw(st.sampled_from([1, 2, 6]))
    sizes = st.sampled_from([group for group in (1, 2, 3, 6) if experts % group == 0])
    hidden = multiple * draw(st.integers(2, 5))
    ranks = st.integers(1, hidden // multiple).map(lambda rank: rank * multiple)
    gated = draw(st.booleans())
    return Form(
        tokens=draw(st.sampled_from([0, 1, 3, 4, 5, 17])),
        top_k=draw(st.integers(1, experts)),
        experts=experts,
        hidden=hidden,
        intermediate=multiple * draw(st.integers(1, 4)),
        input_group=draw(sizes),
        output_group=draw(sizes),
        rank_in=draw(ranks),
        rank_out=draw(st.one_of(st.just(0), ranks)),
        gated=gated,
        interleaved=gated and draw(st.booleans()),
        pair=gated and draw(st.booleans()),
        interpolative=draw(st.booleans()),
        biased=draw(st.booleans()),
        activation=draw(activations),
        dtype=draw(st.sampled_from(types)),
        strangers=draw(st.booleans()),
    )


def error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    if not wanted.numel():
        return 0.0
    return float((found.float() - wanted).abs().max() / wanted.abs().max().clamp(min=0.1))
