"""Text to token windows, for calibration and evaluation.

Shapes: `windows_NL` are N windows of exactly L token ids, int64.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from molae_compress.calibration.sources import read_source
from molae_compress.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENTS_AT_ONCE = 64
_HELD_OUT = 16  # one calibration window in this many


def read_texts(data: Sequence[str], column: str) -> list[list[str]]:
    """The documents of each source, in the order of the source; blank documents are left out.

    Args:
        data: sources, as in `calibration.data`: a `.txt`, `.jsonl`, `.json` or `.parquet` file, a folder of `.txt`
            files, `python-docs:calibration`, `python-docs:heldout`, or a hub dataset `org/name[config](split)`.
        column: the column or key that holds the text, where a source has several.

    Raises:
        DataError: a source does not exist, cannot be read, holds no text, or has no such column.
    """
    return [read_source(source, column) for source in data]


def token_windows(
    texts_per_source: Sequence[Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    sequence_length: int,
    seed: int | None,
    names: Sequence[str] = (),
) -> Tensor:
    """Cuts text into token windows.

    The documents of a source are tokenised, each followed by the end-of-text token if there is one, joined and cut into
    windows that do not overlap; what is left at the end is dropped. Each source contributes the same number of windows;
    where one is short, the others fill in.

    Args:
        texts_per_source: documents of each source.
        tokenizer: the tokenizer of the model.
        samples: N, the number of windows wanted; fewer come back if the text has fewer.
        sequence_length: L.
        seed: chooses windows at random and mixes the sources, so that any first part of the result is a fair sample
            of it. None takes the first windows of each source, source after source.
        names: what messages call the sources; their numbers if absent.

    Returns:
        [N, L] int64.

    Raises:
        DataError: a source has less text than one window.
    """
    names = names or [f"source {number} of {len(texts_per_source)}" for number in range(1, len(texts_per_source) + 1)]
    available = [
        _cut(_tokens(texts, tokenizer), sequence_length, name) for name, texts in zip(names, texts_per_source, strict=True)
    ]
    return fair_choice(available, samples, seed)


def fair_choice(available: Sequence[Tensor], samples: int, seed: int | None) -> Tensor:
    """Rows of the tensors of several sources, as many of each as far as they last; see `token_windows`."""
    shares = _shares([len(rows) for rows in available], samples)
    if seed is None:
        return torch.cat([rows[:share] for rows, share in zip(available, shares, strict=True)])
    # The standard library's generator gives the same choice on every version and platform.
    chance = random.Random(seed)
    chosen = [rows[chance.sample(range(len(rows)), share)] for rows, share in zip(available, shares, strict=True)]
    together = torch.cat(chosen)
    return together[chance.sample(range(len(together)), len(together))]


def set_aside(windows: int) -> int:
    """How many of so many calibration windows only measure errors, and take no part in the fit."""
    return max(1, windows // _HELD_OUT)


def as_windows(
    data: Sequence[str] | Tensor,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    samples: int,
    sequence_length: int,
    seed: int | None,
) -> Tensor:
    """What a caller hands over in Python, as token windows.

    Args:
        data: documents, cut as `token_windows` does; or token ids [N, L] of an integer type, taken as they are.
        tokenizer: needed for documents.
        samples: N, for documents.
        sequence_length: L, for documents.
        seed: as in `token_windows`, for documents.

    Returns:
        [N, L] int64.

    Raises:
        DataError: no matrix of token ids, no texts, too little text for one window, or no tokenizer.
    """
    if isinstance(data, Tensor):
        if data.dim() != 2 or data.numel() == 0 or data.is_floating_point() or data.dtype == torch.bool:
            raise DataError(
                f"The token ids have shape {list(data.shape)} and type {data.dtype}.",
                why="Windows of token ids are a matrix [windows, tokens] of an integer type.",
                remedy="Stack windows of equal length, without padding.",
            )
        if int(data.min()) < 0:
            raise DataError(
                f"The token ids hold {int(data.min())}, which is no token.",
                remedy="Give input ids without padding marks, not labels.",
            )
        return data.to(torch.int64)
    if isinstance(data, str) or not all(isinstance(text, str) for text in data):
        kind = "one text" if isinstance(data, str) else "values that are not texts"
        raise DataError(
            f"The data handed over are {kind}, not a list of texts.",
            remedy="Give [text, ...] or token ids. Files and datasets are named in the recipe, in `calibration.data`.",
        )
    if tokenizer is None:
        raise DataError(
            "There is no tokenizer to turn the texts handed over into tokens.",
            remedy="Pass the tokenizer of the model, or token ids.",
        )
    return token_windows([data], tokenizer, samples=samples, sequence_length=sequence_length, seed=seed)


def data_fingerprint(texts_per_source: Sequence[Sequence[str]]) -> str:
    """SHA-256, in hex, of the documents of all sources: their text, order and boundaries."""
    digest = hashlib.sha256()
    for texts in texts_per_source:
        digest.update(f"source {len(texts)}\n".encode())
        for text in texts:
            content = text.encode()
            digest.update(f"text {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()


def token_fingerprint(windows_NL: Tensor) -> str:
    """SHA-256, in hex, of token ids."""
    return hashlib.sha256(windows_NL.cpu().numpy().tobytes()).hexdigest()


def _tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """[n] int64: the documents tokenised, each followed by the end-of-text token if there is one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts = []
    # In small batches: a tokenizer keeps much more per token than its number.
    for start in range(0, len(texts), DOCUMENTS_AT_ONCE):
        batch = list(texts[start : start + DOCUMENTS_AT_ONCE])
        # `verbose=False`: documents longer than the model's context are no mistake here, they are cut afterwards.
        encoded = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        parts.append(torch.tensor([token for ids in encoded for token in (*ids, *end)], dtype=torch.int64))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def _cut(tokens_n: Tensor, sequence_length: int, source: str) -> Tensor:
    count = len(tokens_n) // sequence_length
    if count == 0:
        raise DataError(
            f"The text of {source} has {len(tokens_n)} tokens, less than one window of {sequence_length}.",
            remedy="Give more text, or a smaller `sequence_length`.",
        )
    return tokens_n[: count * sequence_length].view(count, sequence_length)


def _shares(available: Sequence[int], samples: int) -> list[int]:
    """How many windows each source contributes: equal parts, as far as the sources last."""
    shares = [0] * len(available)
    left = samples
    # From the shortest: what it cannot give is spread over those that follow.
    for done, source in enumerate(sorted(range(len(available)), key=available.__getitem__)):
        shares[source] = min(available[source], left // (len(available) - done))
        left -= shares[source]
    return shares
