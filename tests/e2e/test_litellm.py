"""litellm against a real server process with a real model, by three of its providers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.servers import environment

PROVIDERS = ["openai/box", "hosted_vllm/box", "anthropic/box"]


@pytest.fixture(scope="module")
def found(box):
    """What the client saw, by provider; a warning would end it."""
    script = Path(__file__).with_name("litellm_client.py")
    result = subprocess.run(
        [sys.executable, str(script), box.url],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        # Without the map of prices that it would fetch.
        env={**environment(), "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("provider", PROVIDERS)
def test_answers_streams_and_calls(found, provider):
    answers = found[provider]
    assert "Paris" in answers["texts"][0]
    assert len(answers["texts"]) == 4
    assert len(set(answers["texts"])) == 1
    assert answers["num_chunks"] > 3
    assert answers["ends"] == ["stop", "stop"]
    assert answers["num_tokens"] > 3
    assert answers["call"].startswith("{")
    if provider != "hosted_vllm/box":  # takes additionalProperties out, so that a call may go on
        assert set(json.loads(answers["call"])) == {"is_capital"}
    assert "nobody" in answers["refused"]
