"""Texts and conversations as examples to learn from: token ids, and which of them are learned.

Shape suffixes: N examples, B examples of one batch, L tokens of one example, n tokens or examples of one source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from molae_compress.calibration.sources import Message
from molae_compress.calibration.text import fair_choice
from molae_compress.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of a token that is not learned, as everywhere in transformers
_ASIDE = 16  # one example in this many only measures


@dataclass(frozen=True)
class Examples(Dataset[dict[str, Tensor]]):
    """Examples of one length, those that end earlier padded.

    Attributes:
        ids_NL: token ids, int64.
        labels_NL: the same, but `IGNORED` where nothing is learned: padding, what others say, and the first token.
        first: number of the first of them among all examples.
    """

    ids_NL: Tensor
    labels_NL: Tensor
    first: int = 0

    @property
    def learned(self) -> int:
        """How many tokens are learned."""
        return int((self.labels_NL != IGNORED).sum())

    def apart(self) -> tuple[Examples, Examples]:
        """Those to learn from, and the last ones, which only measure: none if there is one example."""
        aside = max(1, len(self) // _ASIDE) if len(self) > 1 else 0
        cut = len(self) - aside
        return (
            Examples(self.ids_NL[:cut], self.labels_NL[:cut]),
            Examples(self.ids_NL[cut:], self.labels_NL[cut:], cut),
        )

    def __len__(self) -> int:
        return len(self.ids_NL)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "input_ids": self.ids_NL[index],
            "labels": self.labels_NL[index],
            "example": torch.tensor(self.first + index),
        }


def collated(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch, without the padding that all its examples have at the end.

    Padding comes last and attention looks back only, so that nothing that is learned sees it.
    """
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    learned_L = (batch["labels"] != IGNORED).any(0)
    length = int(learned_L.nonzero().max()) + 1 if learned_L.any() else 2
    return {key: value[:, :length] if value.dim() == 2 else value for key, value in batch.items()}


def text_examples(
    texts_per_source: Sequence[Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    length: int,
    seed: int,
) -> Examples:
    """One example a text, which ends with the end-of-text token if there is one; see `token_windows` for joined ones."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    available = []
    for texts in texts_per_source:
        rows = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end for text in texts)
        available.append(_padded([_pairs(row, [True] * len(row)) for row in rows if len(row) > 1], length, tokenizer))
    return _examples(fair_choice(available, samples, seed))


def chat_examples(
    conversations_per_source: Sequence[Sequence[Sequence[Message]]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    length: int,
    seed: int,
    packing: bool,
    completion_only: bool,
    names: Sequence[str],
) -> Examples:
    """Conversations as the tokenizer's chat template writes them.

    Args:
        conversations_per_source: lists of messages.
        tokenizer: of the model.
        samples: examples wanted.
        length: L.
        seed: of the choice of examples.
        packing: join conversations and cut them into windows of exactly L tokens; otherwise an example each.
        completion_only: learn what the assistant says, and nothing else.
        names: of the sources, for messages.

    Raises:
        DataError: there is no chat template, it writes a message differently depending on what follows, or there is too
            little to fill a window, or nothing to learn.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "The tokenizer of the model has no chat template.",
            why="Without one it is not known how the model is shown conversations.",
            remedy="Add chat_template.jinja to the model's folder, or write the conversations as text and leave `chat` out.",
        )
    available = []
    for conversations, name in zip(conversations_per_source, names, strict=True):
        rows = [_rendered(messages, tokenizer, completion_only) for messages in conversations]
        if not packing:
            available.append(_padded([row for row in rows if (row[1:, 1] != IGNORED).any()], length, tokenizer))
            continue
        stream_n2 = torch.cat(rows)
        count = len(stream_n2) // length
        if count == 0:
            raise DataError(
                f"The conversations of {name} have {len(stream_n2)} tokens, less than one window of {length}.",
                remedy="Give more of them, a smaller `sequence_length`, or `packing: false`.",
            )
        available.append(stream_n2[: count * length].view(count, length, 2))
    return _examples(fair_choice(available, samples, seed))


def window_examples(windows_NL: Tensor) -> Examples:
    """Windows of joined text, of which everything is learned."""
    return _examples(torch.stack([windows_NL, windows_NL], dim=-1))


def _examples(pairs_NL2: Tensor) -> Examples:
    ids_NL, labels_NL = pairs_NL2[..., 0].contiguous(), pairs_NL2[..., 1].clone()
    labels_NL[:, 0] = IGNORED  # nothing stands before it
    found = Examples(ids_NL, labels_NL)
    if not found.learned:
        raise DataError(
            f"There is nothing to learn in {len(found)} examples.",
            why="They are of one token each, or the assistant says nothing in them.",
            remedy="Give longer texts, or leave `completion_only` out.",
        )
    return found


def _rendered(messages: Sequence[Message], tokenizer: Any, completion_only: bool) -> Tensor:
    """[n,2]: tokens of a conversation and their labels."""
    text, said = _written(messages, tokenizer) if completion_only else (_template(tokenizer, messages), None)
    if said is None:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return _pairs(ids, [True] * len(ids))
    found = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    learned = [any(start <= begin < end for start, end in said) for begin, _ in found["offset_mapping"]]
    return _pairs(found["input_ids"], learned)


def _written(messages: Sequence[Message], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as text, and from where to where the assistant speaks in it."""
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} does not tell where in the text its tokens lie.",
            why="`completion_only` needs to know which of them are the assistant's.",
            remedy="Leave `completion_only` out, or use a tokenizer of the `tokenizers` library.",
        )
    text, said = _template(tokenizer, messages), []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _template(tokenizer, messages[:number], add_generation_prompt=True) if number else ""
        after = _template(tokenizer, messages[: number + 1])
        if not (text.startswith(after) and after.startswith(before)):
            raise DataError(
                f"The chat template writes message {number + 1} of a conversation differently when others follow.",
                why="What the assistant says cannot be found in the whole then.",
                remedy="Split conversations so that each ends with the one answer to learn, or leave `completion_only` out.",
            )
        said.append((len(before), len(after)))
    return text, said


def _template(tokenizer: Any, messages: Sequence[Message], **how: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **how))
    except Exception as error:  # templates are programs, and end as they like
        raise DataError(
            f"The chat template refuses a conversation of {len(messages)} messages ({error}).",
            remedy="Bring its roles into the order that the template wants.",
        ) from error


def _pairs(ids: Sequence[int], learned: Sequence[bool]) -> Tensor:
    """[n,2]: ids beside labels."""
    labels = [token if is_learned else IGNORED for token, is_learned in zip(ids, learned, strict=True)]
    return torch.tensor([list(ids), labels], dtype=torch.int64).T


def _padded(rows: Sequence[Tensor], length: int, tokenizer: Any) -> Tensor:
    """[n,L,2]: rows cut off or padded to one length."""
    padding = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    filled_nL2 = torch.empty(len(rows), length, 2, dtype=torch.int64)
    filled_nL2[..., 0], filled_nL2[..., 1] = padding, IGNORED
    for number, row in enumerate(rows):
        filled_nL2[number, : len(row)] = row[:length]
    return filled_nL2
