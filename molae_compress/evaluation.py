"""Perplexity, KL divergence and agreement of an artifact, streamed: one layer of one model in memory at a time.

Both models first carry all tokens through their layers, each window's residual stream ending before the final norm; then
the logits of both are made window by window, by the models' own final norm, head and scaling. An encoder-decoder reads the
same windows that it is to write.
Shape suffixes: N windows, B windows of one batch, L tokens, P positions of a window, V vocabulary; the rest as in `tensors`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from molae_compress.calibration.replay import Passed, of_window
from molae_compress.calibration.text import read_texts, token_windows
from molae_compress.calibration.walk import LayerArguments, decoder_start, denoises, has_decoder
from molae_compress.compress import Progress, silent
from molae_compress.errors import DataError, ModelError
from molae_compress.recipe.sections import Evaluate
from molae_compress.source import DiskSource, check_tokens, choose_device, load_tokenizer
from molae_compress.stream import forwarded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_POSITIONS = 256  # compared at a time
_CHARACTERS = 2000  # of the text, on which two tokenizers must agree


@dataclass(frozen=True)
class Evaluation:
    """Quality on given text. Means are over predicted tokens (all of a window but its first).

    Attributes:
        tokens: predicted tokens.
        perplexity: exp of the mean negative log likelihood.
        original_perplexity: the same of the model compared with, if any.
        kl: mean KL(original || result) of the next-token distribution, in nats.
        top1_agreement: share of tokens at which both models find the same token most likely.
    """

    tokens: int
    perplexity: float
    original_perplexity: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def evaluate(
    folder: str | Path,
    *,
    data: Sequence[str],
    against: str | None = None,
    column: str = "text",
    samples: int = 64,
    sequence_length: int = 1024,
    batch_size: int = 8,
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluates a model folder (compressed or not) on text, alone or against another model with the same tokens.

    Args:
        folder: model folder or hub id.
        data: sources of text, as in a recipe.
        against: the original model.
        column, samples, sequence_length, batch_size: as in a recipe.
        device: where one layer at a time is computed, in float32.
        trust_remote_code: allow code from the model folders.
        progress: called with a stage, what is done of it, and of how much.

    Raises:
        DataError: the text is missing, malformed or shorter than one window, or the two models differ in their vocabulary
            or tokenizer; found out before any weight is read.
        CheckpointError, ModelError: a model that cannot be read, or that does not predict the next token.
    """
    progress = progress or silent
    target = choose_device(device)
    result = DiskSource.open(str(folder), device=target, trust_remote_code=trust_remote_code, dense=False)
    check_predicts(result.model)
    sources = {"result": result}
    if against is not None:
        sources["original"] = DiskSource.open(against, device=target, trust_remote_code=trust_remote_code, dense=False)
        check_vocabulary(result, sources["original"])
    tokenizer = load_tokenizer(result.folder, trust_remote_code=trust_remote_code)
    texts = read_texts(data, column)
    if against is not None:
        other = load_tokenizer(sources["original"].folder, trust_remote_code=trust_remote_code)
        check_tokenizers(tokenizer, other, texts, f"'{folder}' and '{against}'")
    windows_NL = token_windows(texts, tokenizer, samples=samples, sequence_length=sequence_length, seed=None)
    check_tokens(windows_NL, result.vocabulary)
    batches = windows_NL.split(batch_size)
    passed = {name: _carried(source, batches, f"evaluate {name}", progress) for name, source in sources.items()}
    sums = torch.zeros(4, dtype=torch.float64)
    with ExitStack() as stack, torch.no_grad():
        for source in sources.values():
            stack.enter_context(source.ends(head=True))
        arguments = {name: LayerArguments(source.model, source.layers.paths, target) for name, source in sources.items()}
        # a window at a time: logits of a large vocabulary take far more memory than hidden states
        for window, ids_1L in enumerate(windows_NL.split(1)):
            batch, row = divmod(window, batch_size)
            logits = {
                name: predicted(model, ids_1L, of_window(passed[name][batch], row, len(batches[batch])))
                for name, model in arguments.items()
            }
            sums += compared(logits["result"], logits.get("original"), ids_1L[0].to(target))
            del logits  # or they would stay while those of the next window are made
    count = windows_NL.numel() - len(windows_NL)
    perplexity, original_perplexity = (sums[:2] / count).exp().tolist()
    if against is None:
        return Evaluation(count, perplexity)
    return Evaluation(count, perplexity, original_perplexity, *(sums[2:] / count).tolist())


def evaluate_as(
    section: Evaluate | None,
    folder: Path,
    *,
    against: Path | None,
    device: torch.device,
    trust_remote_code: bool,
    progress: Progress,
) -> Evaluation | None:
    """Compares a result with the original as the section `evaluate` of a recipe says; None if there is none."""
    if section is None:
        return None
    return evaluate(
        folder,
        data=section.data,
        against=str(against) if against is not None else None,
        column=section.column,
        samples=section.samples,
        sequence_length=section.sequence_length,
        batch_size=section.batch_size,
        device=str(device),
        trust_remote_code=trust_remote_code,
        progress=progress,
    )


def check_predicts(model: nn.Module) -> None:
    """Raises `ModelError` if a model is shown the tokens that it is to predict, so that its likelihoods mean nothing."""
    if denoises(model):
        raise ModelError(
            f"{type(model).__name__} refines a whole canvas of tokens in place, and predicts no next token.",
            why="It would be asked for tokens that it was just shown.",
            remedy="Leave `evaluate` out of the recipe, and compare what the models generate.",
        )
    if has_decoder(model) and decoder_start(model) is None:
        raise ModelError(
            f"The configuration of {type(model).__name__} does not say which token its decoder starts with.",
            why="Without one the decoder would be shown the tokens that it is to predict.",
            remedy="Set decoder_start_token_id (or pad_token_id, or bos_token_id) in config.json, or do not evaluate.",
        )


def check_vocabulary(result: DiskSource, original: DiskSource) -> None:
    """Raises `DataError` if the two models do not predict over the same number of tokens."""
    if result.vocabulary != original.vocabulary:
        raise DataError(
            f"'{result.folder}' has a vocabulary of {result.vocabulary} tokens, and '{original.folder}' one of "
            f"{original.vocabulary}.",
            why="Predictions of the next token can be compared only over the same tokens.",
            remedy="Compare with the model that the result was made from, or evaluate each alone.",
        )


def check_tokenizers(
    ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, texts: Sequence[Sequence[str]], models: str
) -> None:
    """Raises `DataError` if the start of the text is not the same tokens to both."""
    start = "".join(islice(chain.from_iterable(chain.from_iterable(texts)), _CHARACTERS))
    one, other = (
        list(tokenizer(start, add_special_tokens=False, verbose=False)["input_ids"]) for tokenizer in (ours, theirs)
    )
    if one != other:
        pairs = zip(one, other, strict=False)
        place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
        raise DataError(
            f"The tokenizers of {models} make different tokens of the text, from token {place} on "
            f"({one[place : place + 3]} and {other[place : place + 3]}).",
            why="Both models are given the same tokens, which would be another text to one of them.",
            remedy="Compare with the model that the result was made from, or evaluate each alone.",
        )


def _carried(source: DiskSource, batches: Sequence[Tensor], stage: str, progress: Progress) -> list[Passed]:
    """What the layers of a model give for every batch."""
    arguments = LayerArguments(source.model, source.layers.paths, source.device)
    progress(stage, 0, len(source.layers))
    with source.ends(head=False), torch.no_grad():
        return forwarded(source, arguments, batches, lambda done: progress(stage, done, len(source.layers)))


def predicted(arguments: LayerArguments, ids_1L: Tensor, passed: Passed) -> Tensor:
    """[L-1,V]: logits of all tokens of a window but its first."""
    logits_1LV = arguments.logits(ids_1L, passed)
    if logits_1LV.shape[:2] != ids_1L.shape or logits_1LV.shape[2] <= int(ids_1L.max()):
        raise ModelError(
            f"The model gives figures of shape {tuple(logits_1LV.shape)} for a window of {ids_1L.shape[1]} tokens.",
            why="These are no predictions of tokens, so there is nothing to evaluate.",
            remedy="Leave `evaluate` out of the recipe.",
        )
    return logits_1LV[0, 1:] if arguments.shifted else logits_1LV[0, :-1]


def compared(logits_LV: Tensor, original_LV: Tensor | None, ids_L: Tensor) -> Tensor:
    """[4] float64 sums over predicted tokens (all but the first): negative log likelihoods of both, KL, agreements."""
    sums = torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(ids_L) - 1, _POSITIONS):
        rows = slice(start, min(start + _POSITIONS, len(ids_L) - 1))
        next_P1 = ids_L[rows.start + 1 : rows.stop + 1, None]
        logp_PV = logits_LV[rows].float().log_softmax(-1)
        sums[0] -= logp_PV.gather(-1, next_P1).double().sum().cpu()
        if original_LV is not None:
            original_PV = original_LV[rows].float().log_softmax(-1)
            sums[1] -= original_PV.gather(-1, next_P1).double().sum().cpu()
            sums[2] += (original_PV.exp() * (original_PV - logp_PV)).sum(-1).double().sum().cpu()
            sums[3] += (original_PV.argmax(-1) == logp_PV.argmax(-1)).double().sum().cpu()
    return sums
