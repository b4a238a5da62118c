"""``streamserve bench latency`` and ``throughput`` as a person calls them: what they count."""

import json
from pathlib import Path

import pytest

from tests.e2e.servers import Run
from tools.make_checkpoint import write_config


@pytest.fixture(scope="module")
def dummy(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that serve random weights of a tiny shape."""
    directory = tmp_path_factory.mktemp("dummy")
    write_config("tiny", directory)
    flags = ["--load-format", "dummy", "--dtype", "float32", "--kv-cache-memory", "16MiB"]
    return [str(directory), *flags, "--max-num-batched-tokens", "128"]


def test_latency_of_several_batches(run: Run, dummy: list[str], tmp_path: Path):
    file = tmp_path / "latency.json"
    load = ["--batch-size", "1", "3", "--input-len", "33", "--output-len", "9", "--rounds", "2"]
    result = run("bench", "latency", *dummy, *load, "--json", str(file))
    assert result.returncode == 0, result.stderr
    assert "3 x 33 + 9" in result.stdout
    content = json.loads(file.read_text())
    assert content["machine"]["torch"]
    ceilings, costs = content["ceilings"], content["costs"]
    rates = {"bfloat16": ceilings["product"], "float32": ceilings["product_float32"]}
    faster = max(rates, key=lambda dtype: rates[dtype])
    assert f"TFLOP/s of {faster}\n" in result.stdout
    flops = 33 * costs["flops_per_token"] + 33 * 34 / 2 * costs["flops_per_pair"]
    read_s = costs["weight_bytes"] / max(ceilings["copy"], ceilings["read"])
    for found, batch_size in zip(content["results"], (1, 3), strict=True):
        assert (found["batch_size"], found["input_len"], found["output_len"]) == (batch_size, 33, 9)
        # Nine tokens, the first of a prompt's last token from the cache: eight pairs of neighbours
        # at most, fewer where the batch took more than one step to get going.
        assert 1 <= found["steps"]["num_steps"] <= 16
        assert 34 * batch_size <= found["steps"]["mean_keys"] <= 41 * batch_size
        floor_s = batch_size * max(flops / rates[faster], read_s)
        assert found["prompt_floor_s"] == pytest.approx(floor_s)
        assert found["decode_floor_s"] > 0
        assert found["share_of_floor"] > 0
        assert found["first_token"]["median"] > 0
        assert found["num_compilations"] == 0


def test_the_floor_is_made_of_the_models_own_sizes(run: Run, dummy: list[str], tmp_path: Path):
    file = tmp_path / "latency.json"
    assert run("bench", "latency", *dummy, "--output-len", "2", "--json", str(file)).returncode == 0
    costs = json.loads(file.read_text())["costs"]
    per_layer = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 128 + 2 * 64
    weights = 2 * per_layer + 64
    assert costs == {
        "weight_bytes": 4 * (weights + 1024 * 64),
        "kv_bytes_per_token": 2 * 2 * 2 * 16 * 4,
        "flops_per_token": 2 * weights,
        "flops_per_pair": 2 * 4 * 4 * 16,
        "state_bytes": 0,
    }


def test_throughput_counts_every_token(run: Run, dummy: list[str], tmp_path: Path):
    file = tmp_path / "throughput.json"
    load = ["--num-requests", "12", "--input-len", "40", "--output-len", "10", "--concurrency", "5"]
    result = run("bench", "throughput", *dummy, *load, "--json", str(file))
    assert result.returncode == 0, result.stderr
    assert "12 requests in" in result.stdout
    [found] = json.loads(file.read_text())["results"]
    assert (found["prompt_tokens"], found["output_tokens"]) == (480, 120)
    assert found["num_steps"] >= 3 * 10
    assert 0 < found["busy"] <= 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "9", "--max-num-seqs", "8"], "--batch-size must be at most"),
        (["--input-len", "2000", "--output-len", "100"], "must be at most 2048 together"),
        (["--batch-size", "32", "--input-len", "1900"], "raise --kv-cache-memory"),
    ],
)
def test_what_the_engine_could_not_run_at_once_is_refused(run, dummy, flags, message):
    result = run("bench", "latency", *dummy, *flags)
    assert result.returncode == 1
    assert message in result.stderr
    assert "measured" not in result.stdout  # at once, then
