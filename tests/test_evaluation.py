"""Evaluation against the models' own forward, its memory, and what it refuses before it reads a weight."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

import molae_compress as molae
from molae_compress import evaluation
from molae_compress.calibration.text import read_texts, token_windows
from molae_compress.calibration.walk import LayerArguments, model_inputs
from molae_compress.errors import DataError, ModelError
from molae_compress.source import DiskSource
from tests.conftest import CheckpointMaker
from tests.runs import TEXT, loaded
from tests.tiny import VOCABULARY, tiny_model, tiny_tokenizer
from tests.zoo import zoo_model

FAMILY = "qwen3_moe"
SIZES: dict[str, Any] = {"samples": 5, "sequence_length": 32, "batch_size": 2, "device": "cpu"}  # the last batch is short


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A model with the same tokens and other weights."""
    return save_other(tmp_path / "other")


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test where a weight is read."""

    def read(*_: Any, **__: Any) -> NoReturn:
        pytest.fail("weights were read")

    for name in ("layer", "ends"):
        monkeypatch.setattr(DiskSource, name, read)


def save_other(folder: Path, vocabulary: int = VOCABULARY) -> Path:
    model = tiny_model(FAMILY, seed=1)
    if vocabulary != VOCABULARY:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def swap_letters(folder: Path, one: str, other: str) -> None:
    """Exchanges the ids of two letters in a tokenizer."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    ids = content["model"]["vocab"]
    ids[one], ids[other] = ids[other], ids[one]
    path.write_text(json.dumps(content))


def test_the_numbers_are_those_of_whole_logits(checkpoint: CheckpointMaker, other: Path, text: str) -> None:
    folder = checkpoint(FAMILY)
    found = molae.evaluate(folder, data=[text], against=str(other), **SIZES)
    ids_NL = token_windows(read_texts([text], "text"), tiny_tokenizer(), samples=5, sequence_length=32, seed=None)
    with torch.no_grad():
        ours, theirs = (loaded(one)(input_ids=ids_NL).logits[:, :-1].double().log_softmax(-1) for one in (folder, other))
    nll, original_nll = (-logp.gather(-1, ids_NL[:, 1:, None]).mean() for logp in (ours, theirs))
    assert found.tokens == 5 * 31
    assert found.perplexity == pytest.approx(float(nll.exp()), rel=1e-5)
    assert found.original_perplexity == pytest.approx(float(original_nll.exp()), rel=1e-5)
    assert found.kl == pytest.approx(float((theirs.exp() * (theirs - ours)).sum(-1).mean()), rel=1e-5)
    assert found.top1_agreement == pytest.approx(float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()))


@pytest.mark.parametrize("positions", [1, 7, 31])
def test_the_size_of_the_chunks_does_not_matter(
    checkpoint: CheckpointMaker, other: Path, text: str, monkeypatch: pytest.MonkeyPatch, positions: int
) -> None:
    whole = molae.evaluate(checkpoint(FAMILY), data=[text], against=str(other), **SIZES)
    monkeypatch.setattr(evaluation, "_POSITIONS", positions)
    chunked = molae.evaluate(checkpoint(FAMILY), data=[text], against=str(other), **SIZES)
    assert chunked.to_dict() == pytest.approx(whole.to_dict(), rel=1e-6)


def test_logits_of_a_window_are_gone_before_the_next(
    checkpoint: CheckpointMaker, other: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, made, alive = LayerArguments.logits, [], []

    def watched(*args: Any) -> Tensor:
        alive.append(sum(one() is not None for one in made))
        memory = real(*args).numpy()
        made.append(weakref.ref(memory))  # kept alive by every tensor that shares it
        return torch.from_numpy(memory)

    monkeypatch.setattr(LayerArguments, "logits", watched)
    molae.evaluate(checkpoint(FAMILY), data=[text], against=str(other), **SIZES)
    assert alive == [0, 1] * 5


@pytest.mark.usefixtures("unread")
def test_another_vocabulary_is_refused_before_a_weight_is_read(
    checkpoint: CheckpointMaker, tmp_path: Path, text: str
) -> None:
    larger = save_other(tmp_path / "larger", VOCABULARY + 8)
    with pytest.raises(DataError, match=f"{VOCABULARY} tokens, and .*larger' one of {VOCABULARY + 8}") as raised:
        molae.evaluate(checkpoint(FAMILY), data=[text], against=str(larger), **SIZES)
    assert raised.value.why
    assert raised.value.remedy


@pytest.mark.usefixtures("unread")
def test_another_tokenizer_is_refused_before_a_weight_is_read(checkpoint: CheckpointMaker, other: Path, text: str) -> None:
    swap_letters(other, "n", "e")  # the text begins "Line"
    with pytest.raises(DataError, match="different tokens of the text, from token 2 on") as raised:
        molae.evaluate(checkpoint(FAMILY), data=[text], against=str(other), **SIZES)
    assert raised.value.why
    assert raised.value.remedy


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("DiffusionGemmaForBlockDiffusion", "refines a whole canvas of tokens in place"),
        ("SwitchTransformersForConditionalGeneration", "does not say which token its decoder starts with"),
    ],
)
def test_models_that_are_shown_what_they_are_to_predict_are_refused(
    name: str, reason: str, tmp_path: Path, text: str
) -> None:
    model, folder = zoo_model(name), tmp_path / "model"
    if model.config.is_encoder_decoder:
        model.config.pad_token_id = model.config.bos_token_id = model.config.decoder_start_token_id = None
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    recipe = {"molae": 1, "model": str(folder), "budget": {"rank": 4}, "evaluate": {"data": [text]}}
    for attempt in (
        lambda: molae.evaluate(folder, data=[text], **SIZES),
        lambda: molae.run(recipe, tmp_path / "out", device="cpu"),
    ):
        with pytest.raises(ModelError, match=reason) as raised:
            attempt()
        assert raised.value.why
        assert raised.value.remedy


@pytest.mark.parametrize("field", ["decoder_start_token_id", "pad_token_id", "bos_token_id"])
def test_a_decoder_is_shown_only_what_comes_before(field: str) -> None:
    model = zoo_model("SwitchTransformersForConditionalGeneration")
    for name in ("decoder_start_token_id", "pad_token_id", "bos_token_id"):
        setattr(model.config, name, 7 if name == field else None)
    shown = model_inputs(model, torch.tensor([[11, 12, 13]]))["decoder_input_ids"]
    assert shown.tolist() == [[7, 11, 12]]


def test_a_model_alone_needs_no_other_vocabulary(checkpoint: CheckpointMaker, tmp_path: Path, text: str) -> None:
    found = molae.evaluate(save_other(tmp_path / "larger", VOCABULARY + 8), data=[text], **SIZES)
    assert found.kl is None
    assert found.tokens == 5 * 31
