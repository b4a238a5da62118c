"""The servers that can be compared, with the flags that their own documentation calls best."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamserve_loadtest.workloads import ClosedLoop, Workload

MODEL_NAME = "bench"
MAX_MODEL_LEN = 4096
_OPEN_LOOP_SLOTS = 32
_SLOT_MARGIN = 64
_LEAST_CACHE = 4096
_CB_BLOCK = 32
_LLAMA_FILES = {"bf16": "bf16", "int8": "Q8_0", "int4": "Q4_0"}
_ADAPTER = Path(__file__).with_name("openvino_server.py")


@dataclass(frozen=True, slots=True)
class Peer:
    """A server to compare. ``command`` gives its argv for a port and a workload."""

    name: str
    precision: str
    command: Callable[[int, Workload], list[str]]
    environment: Mapping[str, str] = field(default_factory=dict)
    ready_path: str = "/health"
    model: str = MODEL_NAME
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    is_ours: bool = False


@dataclass(frozen=True, slots=True)
class Places:
    """Where things are; ``None`` is looked for on PATH, and left out if it is not there."""

    checkpoint: Path
    streamserve_python: Path = Path(sys.executable)
    streamserve_checkout: Path | None = None
    streamserve_flags: tuple[str, ...] = ()
    llama_server: Path | None = None
    openvino_python: Path | None = None
    vllm_python: Path | None = None
    transformers_python: Path | None = None
    num_threads: int = 2

    def beside(self, suffix: str) -> Path:
        """A file or folder beside the checkpoint that was made from it."""
        return self.checkpoint.with_name(f"{self.checkpoint.name}-{suffix}")


@dataclass(frozen=True, slots=True)
class Catalog:
    """What was found, and why something was not."""

    peers: tuple[Peer, ...]
    missing: Mapping[str, str]


def find_peers(places: Places, precisions: tuple[str, ...]) -> Catalog:
    """Every server that can run here, ours first."""
    peers = [_streamserve(places, precision) for precision in precisions]
    missing: dict[str, str] = {}
    for precision in precisions:
        _find_llama(places, precision, peers, missing)
    if "bf16" in precisions:
        _find_openvino(places, peers, missing)
        _find_vllm(places, peers, missing)
        _find_transformers(places, peers, missing)
    return Catalog(tuple(peers), missing)


def _streamserve(places: Places, precision: str) -> Peer:
    flags = ["--dtype", "bfloat16", "--max-model-len", str(MAX_MODEL_LEN)]
    flags += [] if precision == "bf16" else ["--quantization", precision]

    def command(port: int, _workload: Workload) -> list[str]:
        start = [str(places.streamserve_python), "-m", "streamserve", "serve"]
        address = ["--port", str(port), "--served-model-name", MODEL_NAME]
        return [*start, str(places.checkpoint), *address, *flags, *places.streamserve_flags]

    environment = {"HF_HUB_OFFLINE": "1"}
    if (checkout := places.streamserve_checkout) is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(checkout), str(checkout / "kernels")])
    return Peer(f"streamserve {precision}", precision, command, environment, is_ours=True)


def _find_llama(places: Places, precision: str, peers: list[Peer], missing: dict[str, str]) -> None:
    program = places.llama_server or _on_path("llama-server")
    weights = places.beside(f"{_LLAMA_FILES[precision]}.gguf")
    label = f"llama.cpp {_LLAMA_FILES[precision]}"
    if program is None:
        missing[label] = "no llama-server on PATH, and no --llama-server"
        return
    if not weights.is_file():
        missing[label] = f"{weights} does not exist"
        return
    for flash_attention in ("on", "off"):

        def command(port: int, workload: Workload, fa: str = flash_attention) -> list[str]:
            # A slot has a share of the context of its own: with --kv-unified every sequence's
            # attention runs over the keys of all.
            slots = num_slots(workload)
            context = slots * (workload.max_tokens + _SLOT_MARGIN)
            threads = str(places.num_threads)
            return [
                *(str(program), "--model", str(weights), "--alias", MODEL_NAME),
                *("--host", "127.0.0.1", "--port", str(port), "--jinja", "--no-webui"),
                *("--threads", threads, "--threads-batch", threads, "--flash-attn", fa),
                *("--parallel", str(slots), "--ctx-size", str(context), "--no-kv-unified"),
                *("--cont-batching", "--cache-reuse", "256"),
            ]

        name = label if flash_attention == "on" else f"{label} no FA"
        peers.append(Peer(name, precision, command))


def num_slots(workload: Workload) -> int:
    """How many requests of a workload a server should be ready to run at once."""
    closed = sum(g.load.clients for g in workload.groups if isinstance(g.load, ClosedLoop))
    if workload.rates:
        return _OPEN_LOOP_SLOTS
    return closed + 4 * sum(1 for g in workload.groups if not isinstance(g.load, ClosedLoop))


def _find_openvino(places: Places, peers: list[Peer], missing: dict[str, str]) -> None:
    python, directory = places.openvino_python, places.beside("openvino")
    if python is None:
        missing["OpenVINO GenAI"] = "no --openvino-python"
        return
    if not directory.is_dir():
        missing["OpenVINO GenAI"] = f"{directory} does not exist (optimum-cli export openvino)"
        return

    def command(port: int, _workload: Workload) -> list[str]:
        return [str(python), str(_ADAPTER), str(directory), "--port", str(port)]

    peers.append(Peer("OpenVINO GenAI", "bf16", command))


def _find_vllm(places: Places, peers: list[Peer], missing: dict[str, str]) -> None:
    python = places.vllm_python
    if python is None:
        missing["vLLM"] = "no --vllm-python"
        return

    def command(port: int, _workload: Workload) -> list[str]:
        # The module, not the `vllm` script: that one looks for a distribution called vllm, which
        # the one for CPUs is not.
        return [
            *(str(python), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(places.checkpoint), "--served-model-name", MODEL_NAME),
            *("--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"),
            *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "64"),
            *("--enable-prompt-tokens-details", "--disable-uvicorn-access-log"),
        ]

    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{places.num_threads - 1}",
        "VLLM_NO_USAGE_STATS": "1",
        "PATH": _path_with(python.parent),
    }
    peers.append(Peer("vLLM", "bf16", command, environment))


def _find_transformers(places: Places, peers: list[Peer], missing: dict[str, str]) -> None:
    program = _script(places.transformers_python, "transformers")
    if program is None:
        missing["transformers serve"] = "no transformers on PATH, and no --transformers-python"
        return

    def command(port: int, workload: Workload) -> list[str]:
        # A step's cost grows with the size of the cache, used or not: as much as is needed.
        tokens = max(num_slots(workload) * (workload.max_tokens + _SLOT_MARGIN), _LEAST_CACHE)
        return [
            *(str(program), "serve", str(places.checkpoint), "--continuous-batching"),
            *("--cb-block-size", str(_CB_BLOCK), "--cb-num-blocks", str(-(-tokens // _CB_BLOCK))),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--dtype", "bfloat16", "--device", "cpu"),
        ]

    # It has no ignore_eos: an end token that is never drawn is the same.
    extra = {
        "ignore_eos": None,
        "generation_config": '{"eos_token_id": -1, "do_sample": false}',
    }
    peers.append(
        Peer(
            "transformers serve",
            "bf16",
            command,
            {"HF_HUB_OFFLINE": "1"},
            model=str(places.checkpoint),
            extra_body=extra,
        )
    )


def _on_path(name: str) -> Path | None:
    found = shutil.which(name)
    return Path(found) if found else None


def _script(python: Path | None, name: str) -> Path | None:
    """A command of a virtual environment, or on PATH."""
    return _on_path(name) if python is None else python.parent / name


def _path_with(folder: Path) -> str:
    return os.pathsep.join([str(folder), os.environ.get("PATH", "")])
