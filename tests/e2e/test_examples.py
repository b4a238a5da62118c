"""Every script in examples/, run to its end."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.servers import ROOT, environment
from tools.make_checkpoint import write_checkpoint

EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
CLIENTS = {"anthropic_client.py", "chat_client.py", "completion_client.py", "langchain_client.py"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A model directory."""
    directory = tmp_path_factory.mktemp("tiny")
    write_checkpoint("tiny", directory)
    return directory


def test_the_example_that_needs_a_model_says_so():
    script = str(ROOT / "examples" / "local_model.py")
    result = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=False, env=environment()
    )
    assert (result.returncode, result.stderr) == (1, f"usage: python {script} DIRECTORY\n")


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, run, box, tiny):
    arguments = [box.url] if name in CLIENTS else [str(tiny)] if name == "local_model.py" else []
    result = run(str(ROOT / "examples" / name), *arguments)
    assert result.returncode == 0, result.stderr
    if name == "local_model.py":
        assert result.stdout.startswith("Once upon a time")
    elif name == "offline_batch.py":
        assert result.stdout.count(" -> ") == 100
    else:
        assert "Paris" in result.stdout
