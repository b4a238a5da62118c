"""Chats for locust (https://locust.io), which is not a dependency: ``pip install locust``.

    locust -f loadtest/locustfile.py --host http://127.0.0.1:8000 --headless -u 16 -r 4 -t 60s

Each user sends one streamed chat completion after the other. Two rows are reported: ``first token``
(to the first content byte) and ``whole answer``, whose response length is its tokens by ``usage``.
locust reads a stream line by line in Python: for pauses between tokens under load, and for figures
to publish, use ``python -m loadtest``.
"""

from __future__ import annotations

import json
import os
import random
import time

from locust import HttpUser, constant, task

PROMPT_WORDS = int(os.environ.get("PROMPT_WORDS", "64"))
OUTPUT_TOKENS = int(os.environ.get("OUTPUT_TOKENS", "64"))


class ChatUser(HttpUser):
    """A reader of streamed answers."""

    wait_time = constant(0)

    def on_start(self) -> None:
        """Ask the server what its model is called."""
        self.model = self.client.get("/v1/models", name="models").json()["data"][0]["id"]

    @task
    def chat(self) -> None:
        """One answer, read to its end."""
        words = ("".join(random.choices("abcdefghij", k=4)) for _ in range(PROMPT_WORDS))
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": " ".join(words)}],
            "max_tokens": OUTPUT_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        started = time.perf_counter()
        with self.client.post(
            "/v1/chat/completions", json=body, stream=True, catch_response=True, name="headers"
        ) as response:
            if response.status_code != 200:
                response.failure(f"HTTP {response.status_code}: {response.text[:200]}")
                return
            self._read(response, started)

    def _read(self, response, started: float) -> None:  # noqa: ANN001  locust has no name for it
        is_first, num_tokens = True, 0
        for line in response.iter_lines():
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                response.failure(str(event["error"]))
                return
            if (usage := event.get("usage")) is not None:
                num_tokens = usage["completion_tokens"]
            has_text = any(choice["delta"].get("content") for choice in event["choices"])
            if is_first and has_text:
                is_first = False
                self._report("first token", started, 0)
        self._report("whole answer", started, num_tokens)

    def _report(self, name: str, started: float, length: int) -> None:
        self.environment.events.request.fire(
            request_type="SSE",
            name=name,
            response_time=(time.perf_counter() - started) * 1000,
            response_length=length,
            exception=None,
            context={},
        )
