"""Servers in turns: who dies or hangs is reported, the rest goes on, and nobody is left behind."""

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from streamserve_loadtest import compare
from streamserve_loadtest.floor import floor_tokens_per_s, num_weights
from streamserve_loadtest.peers.catalog import Catalog, Peer, Places, find_peers, num_slots
from streamserve_loadtest.peers.process import PeerError, ServerProcess, free_port
from streamserve_loadtest.prompts import WordPrompts
from streamserve_loadtest.workloads import WORKLOADS, ClosedLoop, Group, Kind, Turn, Workload
from tools.make_checkpoint import write_checkpoint

FAKE = str(Path(__file__).with_name("fake_peer.py"))
LOAD = Workload("tiny", "tiny", (Group("g", (Kind("k", (Turn(4, 3),)),), ClosedLoop(1, 2)),))


def peer(name: str, *, is_ours: bool = False) -> Peer:
    def command(port: int, _workload: Workload) -> list[str]:
        return [sys.executable, FAKE, str(port), name]

    return Peer(name, "bf16", command, is_ours=is_ours)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ckpt") / "tiny"
    write_checkpoint("tiny", directory)
    return directory


@pytest.fixture(autouse=True)
def _no_bandwidth(monkeypatch):
    monkeypatch.setattr(compare, "read_bandwidth", lambda num_threads: 10.0 * num_threads)


def gone(pid: int) -> bool:
    """Whether the group ends: a killed process is there until somebody has heard of it."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


def test_the_rest_goes_on_when_one_dies_breaks_or_hangs(checkpoint, capsys):
    flags = ["--rounds", "2", "--timeout", "5", "--run-timeout", "60"]
    args = compare.build_parser("compare").parse_args([str(checkpoint), *flags])
    catalog = Catalog((peer("good", is_ours=True), peer("dies"), peer("breaks"), peer("hangs")), {})
    comparison = compare.Comparison(args, catalog, WordPrompts())
    try:
        comparison.run(LOAD)
        pids = [process.pid for process in comparison.running.values()]
    finally:
        comparison.stop()
    assert all(gone(pid) for pid in pids)
    by_server = {}
    for run in comparison.runs:
        by_server.setdefault(run.server, []).append(run)
    assert [len(run.records) for run in by_server["good"]] == [2, 2]
    assert not any(record.error for run in by_server["good"] for record in run.records)
    assert "ended with 3" in comparison.failures["dies"]
    assert "no such model" in comparison.failures["dies"]
    assert "died in tiny" in comparison.failures["breaks"]
    hung = [record.error for run in by_server["hangs"] for record in run.records]
    assert hung == [None, None, None, "no end within 5 s"]
    assert [run.server for run in comparison.runs if run.server == "breaks"] == ["breaks"]
    assert len(comparison.floors) == 2
    printed = capsys.readouterr()
    assert "good: ready in" in printed.out
    assert "breaks is left out" in printed.err


def test_the_fields_asked_for_are_sent_to_every_server(checkpoint):
    flags = [str(checkpoint), "--extra-body", '{"top_p": 0.8, "seed": 3}']
    args = compare.build_parser("compare").parse_args(flags)
    theirs = Peer("b", "bf16", lambda *_: [], extra_body={"seed": 1, "n_probs": 0})
    comparison = compare.Comparison(args, Catalog((theirs,), {}), WordPrompts())
    target = comparison._target(theirs, SimpleNamespace(url="http://127.0.0.1:9"))
    assert target.extra_body == {"seed": 3, "n_probs": 0, "top_p": 0.8}


def test_rounds_go_in_turns(checkpoint):
    args = compare.build_parser("compare").parse_args([str(checkpoint), "--rounds", "2"])
    catalog = Catalog((peer("good", is_ours=True), Peer("too", "bf16", peer("good").command)), {})
    comparison = compare.Comparison(args, catalog, WordPrompts())
    try:
        comparison.run(LOAD)
    finally:
        comparison.stop()
    assert [run.server for run in comparison.runs] == ["good", "too"] * 2
    assert json.loads(json.dumps(comparison.notes()))["servers"]["good"]["is_ours"]


def test_a_process_that_never_answers_is_given_up(tmp_path):
    code = "import time; time.sleep(60)"
    process = ServerProcess([sys.executable, "-c", code], {}, free_port(), tmp_path / "log")
    with pytest.raises(PeerError, match=r"not ready after 0\.1 s"):
        process.wait_until_ready("/health", 0.1)
    process.stop()
    assert gone(process.pid)


def test_a_frozen_server_and_its_children_can_be_ended(tmp_path):
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    process = ServerProcess([sys.executable, "-c", code], {}, free_port(), tmp_path / "log")
    process.freeze()
    process.stop()
    assert gone(process.pid)


def test_the_floor(checkpoint):
    weights = num_weights(checkpoint)
    size = (checkpoint / "model.safetensors").stat().st_size
    assert size - 4096 < 2 * weights < size
    assert floor_tokens_per_s(1_000_000, "bf16", 2.0) == 1000.0
    assert floor_tokens_per_s(1_000_000, "int8", 1.7) == pytest.approx(1600.0)


@pytest.mark.parametrize("stacked", [False, True])
def test_a_token_reads_its_own_experts(tmp_path, stacked):
    names = ["up"] if stacked else [f"mlp.experts.{e}.up_proj" for e in range(4)]
    tensors = {f"layers.0.{name}.weight": torch.zeros(6, 8) for name in names}
    if stacked:
        tensors = {name: tensor.expand(4, 6, 8).clone() for name, tensor in tensors.items()}
    tensors |= {"layers.0.shared_experts.up_proj.weight": torch.zeros(3, 8)}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"num_local_experts": 4, "num_experts_per_tok": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert num_weights(tmp_path) == 3 * 48 + 24


def test_who_is_found_and_why_not(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    checkpoint = tmp_path / "m"
    places = Places(checkpoint, llama_server=Path("/bin/llama-server"), vllm_python=Path("/v/py"))
    (tmp_path / "m-Q8_0.gguf").touch()
    catalog = find_peers(places, ("bf16", "int8"))
    names = [p.name for p in catalog.peers]
    assert names == [
        "streamserve bf16",
        "streamserve int8",
        "llama.cpp Q8_0",
        "llama.cpp Q8_0 no FA",
        "vLLM",
    ]
    assert set(catalog.missing) == {"llama.cpp bf16", "OpenVINO GenAI", "transformers serve"}
    assert "m-bf16.gguf does not exist" in catalog.missing["llama.cpp bf16"]
    commands = {p.name: p.command(1234, WORKLOADS["W2"]) for p in catalog.peers}
    assert commands["streamserve int8"][-2:] == ["--quantization", "int8"]
    llama = commands["llama.cpp Q8_0"]
    assert llama[llama.index("--parallel") + 1] == "16"
    for command in commands.values():
        assert "0.0.0.0" not in command


def test_slots_follow_the_workload():
    slots = {name: num_slots(workload) for name, workload in WORKLOADS.items()}
    assert slots == {"W1": 1, "W2": 16, "W3": 12, "W4": 1, "W5": 64, "W6": 32}
