"""Serving artifacts: a plugin of vLLM, found through the entry point group `vllm.general_plugins`.

Importing this package imports no vLLM; vLLM imports it, and calls `register` in each of its processes.
"""

from __future__ import annotations

import importlib
import logging

from packaging.specifiers import SpecifierSet

SUPPORTED = ">=0.32,<0.33"  # the plugin is written against layers of vLLM that change from version to version


def register() -> None:
    """Makes vLLM know artifacts, by their `quant_method`; vLLM may call it several times.

    With a version of vLLM outside `SUPPORTED` nothing is registered, so that other models are served as before, and a
    warning says so; vLLM then refuses an artifact as of an unknown quantization method.
    """
    version = importlib.import_module("vllm").__version__
    if supports(version):
        importlib.import_module("molae_compress.serving.quantization").register()
    else:
        logging.getLogger(__name__).warning("%s", refusal(version))


def supports(version: str) -> bool:
    """Whether artifacts can be served with this version of vLLM."""
    return SpecifierSet(SUPPORTED).contains(version, prereleases=True)


def refusal(version: str) -> str:
    """What is said where they cannot."""
    return (
        f"molae_compress serves its artifacts with vLLM {SUPPORTED}, and this is vLLM {version}: artifacts (quantization "
        "method 'molae') are not served. Install a supported version, or `molae-compress expand` the artifact and serve "
        "the result."
    )
