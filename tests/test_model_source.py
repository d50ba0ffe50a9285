"""Where a model comes from: folders, hub ids, and the files that go along with the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from molae_compress.checkpoint import companion_files, resolve_model
from molae_compress.errors import CheckpointError

INDEX = "model.safetensors.index.json"


def test_an_existing_folder_is_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/name").mkdir(parents=True)
    assert resolve_model("owner/name") == Path("owner/name")
    with pytest.raises(CheckpointError, match="revision 'v1' was given for the folder"):
        resolve_model("owner/name", revision="v1")


@pytest.mark.parametrize("model", ["./absent", "../absent/model", "/absent/model", "~/absent-model", "absent", "a/b/c"])
def test_a_path_that_does_not_exist_never_reaches_the_hub(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_model(model)


def test_a_misspelt_folder_gets_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/pocket-moe").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"'models/poket-moe' does not exist\. Close to it are: models/pocket-moe\."):
        resolve_model("models/poket-moe")
    (tmp_path / "models/file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_model("models/file")


# The hub's own classes want a response of its client, which is not to be built here: hence `__new__`.
@pytest.mark.parametrize(
    ("make", "fragment"),
    [
        (lambda: hub_errors.GatedRepoError.__new__(hub_errors.GatedRepoError), "gated.*hf auth login"),
        (lambda: hub_errors.RepositoryNotFoundError.__new__(hub_errors.RepositoryNotFoundError), "neither a folder"),
        (lambda: hub_errors.RevisionNotFoundError.__new__(hub_errors.RevisionNotFoundError), "no revision 'v1'"),
        (lambda: hub_errors.HFValidationError("bad id"), "neither a folder"),
        (lambda: hub_errors.LocalEntryNotFoundError("offline"), "at revision 'v1' is not in the local cache.*offline"),
        (lambda: OSError("no space"), "download of the model 'owner/name'.*failed.*no space"),
    ],
)
def test_errors_of_the_hub_become_ours(
    make: Callable[[], Exception], fragment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def snapshot_download(repo_id: str, **options: Any) -> str:
        assert (repo_id, options["revision"]) == ("owner/name", "v1")
        raise make()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=fragment):
        resolve_model("owner/name", revision="v1")


def test_a_hub_id_is_downloaded_without_other_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fnmatch import fnmatch

    monkeypatch.chdir(tmp_path)
    taken: list[str] = []
    offered = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "modeling_x.py", "LICENSE"]
    offered += ["README.md", "pytorch_model.bin", "original/model.safetensors", "consolidated.safetensors", "x.gguf"]

    def snapshot_download(
        repo_id: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        taken.extend(
            name
            for name in offered
            if any(fnmatch(name, p) for p in allow_patterns) and not any(fnmatch(name, p) for p in ignore_patterns)
        )
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model("owner/name") == tmp_path
    assert taken == offered[:6]


def test_companions_are_everything_but_weights_config_and_card(tmp_path: Path) -> None:
    wanted = [
        "LICENSE",
        "LICENSE.txt",
        "NOTICE",
        "added_tokens.json",
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "chat_template.json",
        "configuration_deepseek.py",
        "generation_config.json",
        "merges.txt",
        "preprocessor_config.json",
        "processor_config.json",
        "qwen.tiktoken",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
    ]
    unwanted = [
        "README.md",
        "config.json",
        "model.safetensors",
        INDEX,
        "pytorch_model.bin",
        "tokenizer.bin",
        "model.pt",
        "model.pth",
        "tokenizer.gguf",
        "vocab.onnx",
        "training_log.json",
        "recipe.yaml",
        "original/tokenizer.model",
    ]
    for name in wanted + unwanted:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "tokenizer_folder").mkdir()
    assert [str(path.relative_to(tmp_path)) for path in companion_files(tmp_path)] == sorted(wanted)
