"""A whole server, in a process of its own, whose tokens tell whether anything went wrong.

    python -m tests.chaos.server --port 0 --step-ms 2

The runner's next token is a hash of all tokens before it, carried from position to position through
the block table: a block that is wrong, or was given to two, makes a wrong token.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from streamserve.api.app import create_app
from streamserve.api.server import serve
from streamserve.config import ApiConfig, CacheConfig, SchedulerConfig
from streamserve.core.clock import monotonic
from streamserve.core.death import Death
from streamserve.core.kv_cache_manager import KVCacheManager
from streamserve.core.plan import Masks, ModelRunnerOutput, ScheduledRequest, SchedulerOutput
from streamserve.core.scheduler import Scheduler
from streamserve.engine.async_engine import AsyncEngine
from streamserve.engine.fault_injection import FaultInjectingRunner
from streamserve.engine.garbage import freeze_gc
from streamserve.engine.preprocess import Preprocessor
from streamserve.engine.text_source import byte_text

MODEL = "chaos"
BLOCK_SIZE = 16
MAX_MODEL_LEN = 4096
_MODULUS = 2**61 - 1


def carried(before: int, token: int) -> int:
    """What stands in the cell of ``token``, whose neighbour's cell holds ``before``."""
    return (before * 1_000_003 + token + 1) % _MODULUS


def next_token(cell: int) -> int:
    """The token that follows: a lower-case letter."""
    return 97 + cell // 7 % 26


def solo_text(prompt: list[int], max_tokens: int) -> str:
    """The answer of a request that is alone in the world."""
    cell = 0
    for token in prompt:
        cell = carried(cell, token)
    answer = bytearray()
    for _ in range(max_tokens):
        answer.append(next_token(cell))
        cell = carried(cell, answer[-1])
    return answer.decode()


@dataclass
class _Row:
    block_table: list[int] = field(default_factory=list)


class CarryingRunner:
    """A ``ModelRunner`` whose cells are ``carried``; a step takes ``step_s``."""

    num_compilations = 0

    def __init__(self, num_blocks: int, step_s: float) -> None:
        self._cells = [[0] * BLOCK_SIZE for _ in range(num_blocks)]
        self._rows: dict[str, _Row] = {}
        self._step_s = step_s
        self.on_death = Death().on_death
        self._output: ModelRunnerOutput | None = None

    def launch(self, plan: SchedulerOutput) -> None:
        for request_id in plan.released_ids:
            self._rows.pop(request_id, None)
        for new in plan.new_requests:
            self._rows[new.request_id] = _Row()
        for copy in plan.block_copies:
            self._cells[copy.dst] = list(self._cells[copy.src])
        sampled = [self._forward(scheduled) for scheduled in plan.scheduled]
        self._output = ModelRunnerOutput(plan.step_id, sampled)

    def sample(self, step_id: int, masks: Masks | None = None) -> Future[ModelRunnerOutput]:
        assert not masks
        output, self._output = self._output, None
        assert output is not None
        assert output.step_id == step_id
        future: Future[ModelRunnerOutput] = Future()
        resolve: Callable[[ModelRunnerOutput], None] = future.set_result
        asyncio.get_running_loop().call_later(self._step_s, resolve, output)
        return future

    def close(self) -> None:
        pass

    def _forward(self, scheduled: ScheduledRequest) -> list[int]:
        table = self._rows[scheduled.request_id].block_table
        table += scheduled.new_block_ids
        cell = self._at(table, scheduled.start - 1) if scheduled.start else 0
        for position, token in enumerate(scheduled.token_ids, scheduled.start):
            cell = carried(cell, token)
            self._cells[table[position // BLOCK_SIZE]][position % BLOCK_SIZE] = cell
        return [next_token(cell)] if scheduled.sample else []

    def _at(self, table: list[int], position: int) -> int:
        return self._cells[table[position // BLOCK_SIZE]][position % BLOCK_SIZE]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--step-ms", type=float, default=2.0)
    parser.add_argument("--num-blocks", type=int, default=160)
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--drain-timeout", type=float, default=30.0)
    parser.add_argument("--receive-timeout", type=float, default=2.0)
    args = parser.parse_args()
    logging.basicConfig()
    config = ApiConfig(
        served_model_names=(MODEL,),
        port=args.port,
        drain_timeout_s=args.drain_timeout,
        receive_timeout_s=args.receive_timeout,
        ping_interval_s=1.0,
    )
    runner = FaultInjectingRunner(CarryingRunner(args.num_blocks, args.step_ms / 1e3))
    cache = CacheConfig(num_blocks=args.num_blocks, block_size=BLOCK_SIZE)
    scheduler = SchedulerConfig(max_model_len=MAX_MODEL_LEN, max_num_seqs=args.max_num_seqs)
    tokenizer, template = byte_text()
    engine = AsyncEngine(
        scheduler=Scheduler(scheduler, KVCacheManager(cache), clock=monotonic),
        runner=runner,
        tokenizer=tokenizer,
        eos_token_ids=frozenset({257}),
        max_model_len=MAX_MODEL_LEN,
    )
    app = create_app(
        engine=engine,
        preprocessor=Preprocessor(tokenizer, template),
        tokenizer=tokenizer,
        config=config,
        max_model_len=MAX_MODEL_LEN,
        load_text=byte_text,
        faults=runner,
    )

    def ready(url: str) -> None:
        freeze_gc()
        print(url, flush=True)

    serve(app, config, on_ready=ready)


if __name__ == "__main__":
    main()
