"""Where a model comes from: a folder, or a hub id that is downloaded; and its files other than weights."""

from __future__ import annotations

import difflib
from fnmatch import fnmatch
from pathlib import Path

from molae_compress.errors import CheckpointError

_DOWNLOADED = [
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.jinja",
    "*.py",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "LICENSE*",
    "NOTICE*",
    "README.md",  # its front matter holds the licence
]
# Second copies of the weights, in the layout of other programs.
_NOT_DOWNLOADED = ["*/*.safetensors", "consolidated*.safetensors"]

_COMPANIONS = [
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges*",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "*.jinja",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "*processor_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "*.py",
]
_NEVER = [
    "config.json",
    "README*",
    "*.index.json",
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.gguf",
    "*.onnx*",
]


def resolve_model(model: str, *, revision: str | None = None, weights: bool = True) -> Path:
    """Finds the folder of a model, downloading a hub id into the cache of huggingface_hub if needed.

    Args:
        model: an existing folder, or a hub id of the form `owner/name`.
        revision: branch, tag or commit of a hub id.
        weights: whether they are downloaded too.

    Raises:
        CheckpointError: a path that does not exist (with close matches), a hub id that does not exist, is gated, or
            cannot be reached; a revision given for a folder.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"The revision '{revision}' was given for the folder '{model}'.",
                why="Only models of the hub have revisions.",
                remedy="Leave the revision out, or give the hub id of the model.",
            )
        return path
    if path.exists():
        raise CheckpointError(
            f"The model '{model}' is a file.", remedy="Give the folder that holds config.json and the weights."
        )
    close = _close_matches(path)
    if model.startswith((".", "/", "~", "\\")) or model.count("/") != 1 or "\\" in model or close:
        raise CheckpointError(
            f"The model folder '{model}' does not exist.",
            why=f"Close to it are: {', '.join(close)}." if close else "",
            remedy="Check the path. A model of the hub is given as 'owner/name'; if a folder of a similar name is "
            "in the way, download the model first and give its folder.",
        )
    return _download(model, revision, weights=weights)


def companion_files(folder: Path) -> list[Path]:
    """The files of a model folder that a converted copy of it needs besides `config.json` and weights.

    Tokenizer, generation and processor settings, chat templates, licence and remote code; never weights, never the
    model card. A file below a subfolder is to be copied below the same subfolder.
    """
    found = {path for pattern in _COMPANIONS for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if not any(fnmatch(path.name, pattern) for pattern in _NEVER))


def _close_matches(path: Path) -> list[str]:
    if not path.parent.is_dir():
        return []
    siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    return [str(path.parent / name) for name in difflib.get_close_matches(path.name, siblings, n=3, cutoff=0.75)]


def _download(model: str, revision: str | None, *, weights: bool) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    at = f" at revision '{revision}'" if revision else ""
    try:
        return Path(
            huggingface_hub.snapshot_download(
                model,
                revision=revision,
                allow_patterns=_DOWNLOADED,
                ignore_patterns=_NOT_DOWNLOADED if weights else ["*.safetensors"],
            )
        )
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"The model '{model}' on the hub is gated.",
            remedy=f"Accept its terms at https://huggingface.co/{model}, log in with 'hf auth login', and run again.",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"The model '{model}' has no revision '{revision}'.", remedy="Check the revision.") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise CheckpointError(
            f"The model '{model}' is neither a folder here nor a model of the hub.",
            remedy="Check the spelling; for a private model log in with 'hf auth login'.",
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"The model '{model}'{at} is not in the local cache, and the hub cannot be reached.",
            why="The machine is offline, or HF_HUB_OFFLINE is set.",
            remedy="Go online, or download the model elsewhere and give its folder.",
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"The download of the model '{model}'{at} failed ({error}).",
            remedy="Check the connection and the free space, and run again: finished files are kept.",
        ) from error
