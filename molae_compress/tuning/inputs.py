"""What a fine-tuning reads before its first step: text, the model as a whole, and where the original is."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from molae_compress.adapters.skeleton import model_class, read_config, skeleton
from molae_compress.budget import Shapes
from molae_compress.calibration.sources import read_conversations
from molae_compress.calibration.text import data_fingerprint, read_texts, token_windows
from molae_compress.calibration.walk import denoises, has_decoder
from molae_compress.errors import CheckpointError, DataError, ModelError, RecipeError
from molae_compress.modeling.quantizer import MolaeConfig, swap_
from molae_compress.recipe import Recipe
from molae_compress.recipe.sections import Finetune
from molae_compress.source import DiskSource, check_tokens, load_tokenizer
from molae_compress.tuning.examples import Examples, chat_examples, text_examples, window_examples


def check_installed() -> None:
    """Raises `ModelError` unless there is what adapters are made with."""
    if importlib.util.find_spec("peft") is None:
        raise ModelError(
            "Fine-tuning needs the package 'peft', which is not installed.",
            remedy="Install it with `pip install 'molae-compress[peft]'`.",
        )


def check_before(recipe: Recipe, source: DiskSource, shapes: Shapes, *, trust_remote_code: bool) -> None:
    """Refuses a recipe's fine-tuning before the compression whose result it is to train.

    Args:
        recipe: of both.
        source: the dense model.
        shapes: what its experts modules are expected to become.
        trust_remote_code: allow code from the model folder.
    """
    if recipe.finetune is None:
        return
    check_installed()
    from molae_compress.tuning.trainer import check_arguments
    from molae_compress.tuning.ways import choose

    check_arguments(recipe.finetune)
    check_trainable(source)
    examples_for(recipe.finetune, recipe, source, trust_remote_code=trust_remote_code)
    config = read_config(source.folder, trust_remote_code=trust_remote_code)
    vars(config).pop("quantization_config", None)
    bare = skeleton(config, trust_remote_code=trust_remote_code)
    swap_(bare, MolaeConfig({name: shape.to_dict() for name, shape in shapes.items() if shape is not None}))
    choose(bare, recipe.finetune)


def check_trainable(source: DiskSource) -> None:
    """Raises `ModelError` unless the model predicts each token from those before it."""
    if has_decoder(source.model) or denoises(source.model):
        raise ModelError(
            f"{type(source.model).__name__} cannot be fine-tuned here.",
            why="Only models that read a text from its start and predict the next token are.",
            remedy="Use the training script of that model: compressed, it trains as it did before.",
        )


def open_original(
    settings: Finetune, recorded: str | None, revision: str | None, device: torch.device, trust_remote_code: bool
) -> DiskSource:
    """The original model, from where the recipe says it is, else from where it was when it was compressed.

    Raises:
        RecipeError: neither tells.
        CheckpointError: it is not there.
    """
    model = settings.original or recorded
    if model is None:
        raise RecipeError(
            "The report does not say where the original model is, which `finetune` compares with.",
            remedy="Give it as `finetune.original`, or set `kl_weight: 0` and `language_weight: 1`.",
        )
    try:
        revision = revision if settings.original is None else None
        return DiskSource.open(model, revision=revision, device=device, trust_remote_code=trust_remote_code, dense=False)
    except CheckpointError as error:
        raise CheckpointError(
            f"The original model cannot be read. {error.what}",
            why=error.why,
            remedy="Give its place as `finetune.original`, or set `kl_weight: 0` and `language_weight: 1`.",
        ) from error


def examples_for(
    settings: Finetune, recipe: Recipe, source: DiskSource, *, trust_remote_code: bool
) -> tuple[Examples, list[list[str]], str]:
    """The examples, the text that they are of, and its hash; raises `DataError` if it cannot be used."""
    data = settings.data or (recipe.calibration.data if recipe.calibration is not None else None)
    if data is None:
        raise DataError(
            "There is no text to learn from.",
            why="The recipe has neither `finetune.data` nor `calibration.data`.",
            remedy="Name text as `finetune.data`.",
        )
    tokenizer = load_tokenizer(source.folder, trust_remote_code=trust_remote_code)
    size = {"samples": settings.samples, "seed": settings.seed}
    length = settings.sequence_length
    if settings.chat:
        chats = [read_conversations(name, settings.column) for name in data]
        examples = chat_examples(
            chats,
            tokenizer,
            length=length,
            packing=settings.packing,
            completion_only=settings.completion_only,
            names=data,
            **size,
        )
        texts = [
            [json.dumps(messages, sort_keys=True, default=str) for messages in conversations] for conversations in chats
        ]
    else:
        texts = read_texts(data, settings.column)
        if settings.packing:
            examples = window_examples(token_windows(texts, tokenizer, sequence_length=length, names=data, **size))
        else:
            examples = text_examples(texts, tokenizer, length=length, **size)
    check_tokens(examples.ids_NL, source.vocabulary)
    return examples, texts, data_fingerprint(texts)


def loaded(folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """The whole model, on the CPU."""
    config = read_config(folder, trust_remote_code=trust_remote_code)
    answer: Any = model_class(config).from_pretrained(
        folder, dtype=dtype, output_loading_info=True, trust_remote_code=trust_remote_code
    )
    model, info = answer
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"'{folder}' lacks {len(missing)} tensors, for example '{missing[0]}'.", remedy="Fetch the model again."
        )
    found: PreTrainedModel = model
    return found
