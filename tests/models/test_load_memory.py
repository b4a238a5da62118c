"""How much memory loading takes at its worst, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from streamserve.models import load_config
from streamserve.models.checkpoint import module_pieces
from streamserve.models.parameters import decoder_modules

MIB = 2**20
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 60_000,
    "max_position_embeddings": 2048,
}
# Loads a checkpoint while a thread reads how much anonymous and mapped memory the process has.
CHILD = """
import json, sys, threading
import torch
import streamserve_kernels
from streamserve.models import load_model

def resident():
    lines = [line for line in open("/proc/self/status") if line.startswith("Rss")]
    fields = dict(line.split(":", 1) for line in lines)
    return [int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")]

before, peak, done = resident(), [0, 0], threading.Event()

def watch():
    while not done.wait(0.001):
        peak[:] = map(max, peak, resident())

thread = threading.Thread(target=watch)
thread.start()
device = torch.device("cpu")
kernels = streamserve_kernels.load(device)
dtype = getattr(torch, sys.argv[2])
quantization = sys.argv[3] if len(sys.argv) > 3 else None
decoder = load_model(
    sys.argv[1], dtype=dtype, device=device, kernels=kernels, quantization=quantization
)
done.set()
thread.join()
slow = [name for name in ("transformers", "huggingface_hub") if name in sys.modules]
memory = {"weights": decoder.nbytes, "before": before, "peak": peak, "after": resident()}
print(json.dumps({"slow_imports": slow, **memory}))
"""


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 450 MB of bfloat16 in four shards."""
    directory = tmp_path_factory.mktemp("large")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    config = load_config(directory)
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(4)]
    weight_map = {}
    for index, module in enumerate(decoder_modules(config.spec)):
        shard = index * 4 // 40 % 4
        for piece in module_pieces(config.family.names, module, "weight"):
            shards[shard][piece.name] = torch.zeros(piece.shape, dtype=torch.bfloat16)
            weight_map[piece.name] = f"model-{shard}.safetensors"
    for shard, tensors in enumerate(shards):
        save_file(tensors, directory / f"model-{shard}.safetensors")
    index_file = directory / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"weight_map": weight_map}))
    return directory


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("kind", [("bfloat16",), ("bfloat16", "int8")], ids="-".join)
def test_loading_never_holds_much_more_than_the_weights(large_checkpoint, kind):
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", CHILD, str(large_checkpoint), *kind],
        env={"PYTHONPATH": f"{root}:{root / 'kernels'}", "PATH": "/usr/bin:/bin"},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout)
    assert measured["slow_imports"] == []
    anonymous, mapped = measured["peak"]
    # The largest matrix is at hand, while it is packed, beside what is packed.
    at_hand = 2 * CONFIG["vocab_size"] * CONFIG["hidden_size"]
    assert anonymous - measured["before"][0] <= measured["weights"] + at_hand + 64 * MIB
    # What was freed on the way is the system's again.
    assert measured["after"][0] - measured["before"][0] <= measured["weights"] + 64 * MIB
    # What was mapped is given back: no more than a few of the largest tensors at once.
    assert mapped - measured["before"][1] <= 400 * MIB
    assert measured["after"][1] - measured["before"][1] <= 100 * MIB
