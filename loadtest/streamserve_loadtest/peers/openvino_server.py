"""OpenVINO GenAI behind OpenAI's streaming chat API, as thin as its users would write it.

    python openvino_server.py IR_DIRECTORY --port 8000

Runs in a virtual environment with openvino-genai, tokenizers, starlette and uvicorn; imports
nothing of ours. One thread steps the pipeline; after each step the new ids of every request go to
its response through the event loop.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import queue
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openvino
import openvino_genai as ov
import tokenizers
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from tokenizers.decoders import DecodeStream

_IDLE_S = 0.05


@dataclass
class Job:
    """One answer on its way."""

    prompt: str
    config: Any
    loop: asyncio.AbstractEventLoop
    ids: asyncio.Queue[list[int] | None] = field(default_factory=asyncio.Queue)
    handle: Any = None
    has_left: bool = False


class Engine:
    """The pipeline and the one thread that touches it."""

    def __init__(self, directory: Path, cache_gb: int, max_num_batched_tokens: int) -> None:
        scheduler = ov.SchedulerConfig()
        scheduler.cache_size = cache_gb
        scheduler.max_num_seqs = 64
        scheduler.max_num_batched_tokens = max_num_batched_tokens
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = True
        # A CPU without products of bfloat16 computes in float32.
        abilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        precision = "bf16" if "BF16" in abilities else "f32"
        self.pipeline = ov.ContinuousBatchingPipeline(
            str(directory), scheduler, "CPU", {"INFERENCE_PRECISION_HINT": precision}
        )
        self.tokenizer = self.pipeline.get_tokenizer()
        self._new: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._jobs: list[Job] = []
        self._numbers = itertools.count()
        threading.Thread(target=self._run, daemon=True).start()

    def submit(self, job: Job) -> None:
        """Any thread."""
        self._new.put(job)

    def _run(self) -> None:
        while True:
            self._take_new()
            if not self.pipeline.has_non_finished_requests():
                continue
            self.pipeline.step()
            self._jobs = [job for job in self._jobs if self._deliver(job)]

    def _take_new(self) -> None:
        is_idle = not self._jobs
        while True:
            try:
                job = self._new.get(block=is_idle, timeout=_IDLE_S if is_idle else None)
            except queue.Empty:
                return
            is_idle = False
            job.handle = self.pipeline.add_request(next(self._numbers), job.prompt, job.config)
            self._jobs.append(job)

    def _deliver(self, job: Job) -> bool:
        """Hand over what is new; whether more will come."""
        if job.has_left:
            job.handle.cancel()
            return False
        ids: list[int] = []
        while job.handle.can_read():
            for output in job.handle.read().values():
                ids.extend(output.generated_ids)
        is_running = bool(job.handle.get_status() == ov.GenerationStatus.RUNNING)
        if ids:
            job.loop.call_soon_threadsafe(job.ids.put_nowait, ids)
        if not is_running:
            job.loop.call_soon_threadsafe(job.ids.put_nowait, None)
        return is_running


def build_app(engine: Engine, backend: tokenizers.Tokenizer) -> Starlette:
    """``/v1/chat/completions`` with ``stream`` and ``usage``, ``/v1/models``, ``/health``."""

    async def chat(request: Request) -> StreamingResponse:
        body = await request.json()
        config = ov.GenerationConfig()
        config.max_new_tokens = body.get("max_tokens", 128)
        config.ignore_eos = bool(body.get("ignore_eos"))
        config.do_sample = False
        prompt = engine.tokenizer.apply_chat_template(body["messages"], True)
        num_prompt_tokens = len(backend.encode(prompt, add_special_tokens=False).ids)
        job = Job(prompt, config, asyncio.get_running_loop())
        engine.submit(job)
        frames = stream(job, num_prompt_tokens, body.get("model", ""))
        return StreamingResponse(frames, media_type="text/event-stream")

    async def stream(job: Job, num_prompt_tokens: int, model: str) -> AsyncIterator[str]:
        head = {"id": "chat", "object": "chat.completion.chunk", "created": int(time.time())}
        head["model"] = model
        decoder = DecodeStream(skip_special_tokens=False)
        num_tokens = 0
        try:
            while (ids := await job.ids.get()) is not None:
                num_tokens += len(ids)
                text = "".join(decoder.step(backend, token_id) or "" for token_id in ids)
                choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
                yield f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"
            choice = {"index": 0, "delta": {}, "finish_reason": "length"}
            yield f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"
            usage = {
                "prompt_tokens": num_prompt_tokens,
                "completion_tokens": num_tokens,
                "total_tokens": num_prompt_tokens + num_tokens,
            }
            yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            job.has_left = True

    async def models(_request: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [{"id": "bench", "object": "model"}]})

    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/models", models),
        Route("/health", models),
    ]
    return Starlette(routes=routes)


def main() -> None:
    """Serve until a signal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--cache-gb", type=int, default=2)
    parser.add_argument("--max-num-batched-tokens", type=int, default=256, help="as by default")
    args = parser.parse_args()
    engine = Engine(args.directory, args.cache_gb, args.max_num_batched_tokens)
    backend = tokenizers.Tokenizer.from_file(str(args.directory / "tokenizer.json"))
    app = build_app(engine, backend)
    uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
