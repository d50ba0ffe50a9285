"""`molae-compress serve`: the server of transformers, started for real and asked over HTTP."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import import_utils

import molae_compress as molae
from molae_compress.cli import main

ROOT = Path(molae.__file__).parents[1]
PROMPT = "The function returns"


@pytest.fixture(scope="module", params=["quality", "serving"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example model in either form, compressed without calibration."""
    out = tmp_path_factory.mktemp("serve") / "artifact"
    recipe = {"molae": 1, "model": str(ROOT / "examples" / "pocket-moe"), "budget": {"keep": 0.6}, "evaluate": None}
    molae.run({**recipe, "basis": {"profile": request.param}}, out)
    return out


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[str]:
    """Address of a server of the artifact."""
    pytest.importorskip("fastapi")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "molae_compress", "serve", str(artifact), "--port", str(port), "--device", "cpu"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            for _ in range(600):
                if process.poll() is not None:
                    pytest.fail(process.communicate()[1])
                try:
                    urlopen(f"http://localhost:{port}/health", timeout=5).read()
                    break
                except (URLError, ConnectionError):
                    time.sleep(0.1)
            yield f"http://localhost:{port}"
        finally:
            process.terminate()


def ask(server: str, artifact: Path, **more: Any) -> bytes:
    body = {"model": str(artifact), "prompt": PROMPT, "max_tokens": 12, "temperature": 0, **more}
    request = Request(f"{server}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"})
    answer: bytes = urlopen(request, timeout=60).read()
    return answer


def test_answers_are_those_of_the_model(server: str, artifact: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    model = AutoModelForCausalLM.from_pretrained(artifact)
    ids_1L = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        ids_L = model.generate(ids_1L, max_new_tokens=12, do_sample=False)[0, ids_1L.shape[1] :]
    expected = tokenizer.decode(ids_L, skip_special_tokens=True)
    assert json.loads(ask(server, artifact))["choices"][0]["text"] == expected
    lines = [line.removeprefix("data: ") for line in ask(server, artifact, stream=True).decode().splitlines() if line]
    parts = [json.loads(line) for line in lines if line != "[DONE]"]
    assert len(parts) > 2
    assert "".join(part["choices"][0]["text"] for part in parts if part["choices"]) == expected


def test_options_of_the_server_are_passed_on(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi")
    asked: list[list[str]] = []
    monkeypatch.setattr("transformers.cli.transformers.app", lambda words, **_: asked.append(words))
    answer = CliRunner().invoke(main, ["serve", str(artifact), "--dtype", "float32", "--port", "1", "--continuous-batching"])
    assert answer.exit_code == 0, answer.output
    default = ["serve", str(artifact), "--host", "localhost", "--port", "1"]
    assert asked == [[*default, "--dtype", "float32", "--continuous-batching"]]


def test_only_artifacts_are_served(tmp_path: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi")
    answer = CliRunner().invoke(main, ["serve", str(tmp_path), "--port", "1"])
    assert answer.exit_code == 1
    assert "has no molae_report.json" in answer.output
    monkeypatch.setattr(import_utils, "is_serve_available", lambda: False)
    answer = CliRunner().invoke(main, ["serve", str(artifact)])
    assert answer.exit_code == 1
    assert "molae-compress[serve]" in answer.output
