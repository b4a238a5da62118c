"""The `openai` npm package and the Vercel AI SDK, from Node. `npm ci --prefix tests/node` once."""

import json
import shutil
import subprocess
from typing import Any

import pytest

from tests.e2e.servers import ROOT, Server

FOLDER = ROOT / "tests" / "node"
PARIS, TOKYO = "The capital of France is Paris.", "The capital of Japan is Tokyo."


def run(script: str, server: Server) -> Any:
    """What a script prints of the server."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node")
    if not (FOLDER / "node_modules" / "ai").is_dir():
        pytest.skip("the packages are missing: npm ci --prefix tests/node")
    result = subprocess.run(
        [node, str(FOLDER / script), server.url],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def check_place(place: dict[str, Any]) -> None:
    assert set(place) == {"city", "kind"}
    assert len(place["city"]) <= 20
    assert place["kind"] in ("capital", "village")


def test_the_openai_package(box):
    found = run("openai_client.mjs", box)
    assert found["whole"] == found["streamed"]["text"] == PARIS
    assert found["streamed"]["usage"]["completion_tokens"] > 0
    for name in ("tools", "streamedTools"):
        assert [list(given) for given in found[name]["asked"]] == [["is_hard"]]
        assert found[name]["text"] == TOKYO
    check_place(found["parsed"]["whole"])
    assert found["parsed"]["streamed"] == found["parsed"]["whole"]
    assert found["refused"] == {"name": "BadRequestError", "status": 400, "param": "temperature"}
    assert found["responses"]["texts"] == [PARIS] * 4
    check_place(found["responses"]["place"])
    assert found["completionTokens"] == 4
    assert found["models"] == ["box"]


def test_the_ai_sdk(box):
    found = run("ai_sdk.mjs", box)
    names = ("compatible", "openai", "responses")
    for text in (found["completion"], *(found[name]["text"] for name in names)):
        assert text["whole"] == text["streamed"] == PARIS
        assert text["finishReason"] == text["streamedFinishReason"] == "stop"
        for name in ("usage", "streamedUsage"):
            assert text[name]["inputTokens"] > 0
            assert text[name]["outputTokens"] > 0
    for name in names:
        for loop in (found[name]["loop"], found[name]["streamingLoop"]):
            assert [list(given) for given in loop["asked"]] == [["is_hard"]]
            assert loop["text"] == TOKYO
            assert loop["reasons"] == ["tool-calls", "stop"]
        objects = found[name]["objects"]
        check_place(objects["object"])
        assert objects["streamed"] == objects["output"] == objects["object"]
        assert objects["pieces"] > 2
        assert objects["choice"] in ("Paris", "Rome")
