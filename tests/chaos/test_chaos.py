"""The real server, over real sockets, under everything that clients and devices do to it.

    pytest -m soak tests/chaos       # five minutes of it

Every answer that ends well equals what its prompt alone would have been answered; any other one
is a prefix of that and says that it failed. Afterwards all blocks are free and memory is flat.
"""

import asyncio
import contextlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from urllib.parse import urlsplit

import psutil
import pytest

from tests.chaos.clients import BrokenPromiseError, Chaos, request_bytes, text_of

MIB = 2**20


@contextlib.contextmanager
def chaos_server(*flags):
    """The server's process, and its address; nothing but faults that were asked for is logged."""
    with tempfile.TemporaryFile("w+") as log:  # a pipe that nobody reads would be full some day
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "tests.chaos.server", *flags],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            url = urlsplit(process.stdout.readline().strip())
            yield process, (url.hostname, url.port)
        finally:
            process.kill()
            process.communicate()
            log.seek(0)
            errors = log.read()
            if "Traceback" in errors and "InjectedError" not in errors:
                pytest.fail(errors)


def crowd(chaos, share=1.0):
    """One wave of clients, in random order. The 500 who only knock come all at once."""
    kinds = [
        *[chaos.honest] * 40,
        *[lambda: chaos.honest(pause_s=1.0)] * 4,
        *[chaos.killer] * 25,
        *[chaos.staller] * 8,
        *[chaos.half_sender] * 20,
        *[chaos.babbler] * 15,
        *[lambda: chaos.fault("step_exception")] * 2,
        lambda: chaos.fault("slow_step", delay_s=0.2),
        lambda: chaos.fault("worker_death"),
    ]
    kinds = chaos.rng.sample(kinds, round(len(kinds) * share))
    calls = [kind() for kind in kinds] + [chaos.dropper() for _ in range(round(500 * share))]
    chaos.rng.shuffle(calls)
    return calls


async def wave(chaos, share=1.0):
    calls = [asyncio.create_task(call) for call in crowd(chaos, share)]
    await asyncio.gather(*calls)
    return await chaos.until_idle()


def resident_mib(process):
    return psutil.Process(process.pid).memory_info().rss / MIB


async def test_a_crowd_of_the_worst_clients_leaves_no_trace():
    with chaos_server() as (process, address):
        chaos = Chaos(address, random.Random(1))
        await wave(chaos, 0.3)  # what is allocated once
        before = resident_mib(process)
        num_files = psutil.Process(process.pid).num_fds()
        await wave(chaos)
        assert chaos.counts["ended: done"] >= 20
        assert chaos.counts["dropped"] == 650
        assert resident_mib(process) - before < 32
        async with asyncio.timeout(60):  # connections may still be closing
            while psutil.Process(process.pid).num_fds() > num_files + 2:
                await asyncio.sleep(0.05)
        assert (await chaos.whole("/ready", method="GET"))[0] == 200
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        assert process.returncode == 0


async def test_sigterm_under_load_cuts_no_stream():
    # Answers long enough for all that follows, and blocks for all of them.
    flags = ("--drain-timeout", "60", "--step-ms", "5", "--num-blocks", "1000")
    with chaos_server(*flags) as (process, address):
        chaos = Chaos(address, random.Random(2), allowed_errors=frozenset())
        streams = [asyncio.create_task(chaos.honest(max_tokens=300)) for _ in range(40)]
        await chaos.until_running(10)
        process.send_signal(signal.SIGTERM)
        while (await chaos.whole("/ready", method="GET"))[0] == 200:
            pass
        assert (await chaos.whole("/live", method="GET"))[0] == 200
        late = Chaos(address, random.Random(3))
        await late.honest()
        await asyncio.gather(*streams)
        assert late.counts == {"refused with 503": 1}
        assert chaos.counts["ended: done"] + chaos.counts["refused with 503"] == 40
        assert chaos.counts["ended: done"] >= 10
        while process.poll() is None:
            await asyncio.sleep(0.05)
        assert process.returncode == 0


async def test_sigterm_with_little_time_ends_every_stream_with_an_error():
    flags = ("--drain-timeout", "0.2", "--step-ms", "20", "--num-blocks", "2000")
    with chaos_server(*flags) as (process, address):
        allowed = frozenset({"internal_error", "engine_dead", "aborted", "shutting_down"})
        chaos = Chaos(address, random.Random(4), allowed_errors=allowed)
        streams = [asyncio.create_task(chaos.honest(max_tokens=3000)) for _ in range(16)]
        await chaos.until_running(16)
        process.send_signal(signal.SIGTERM)
        await asyncio.gather(*streams)
        assert sum(chaos.counts.values()) == 16
        assert not chaos.counts["ended: done"]


async def test_after_sigkill_clients_know_and_the_next_server_is_right():
    async def interrupted(chaos):
        body, expected = chaos.question(1000)
        async with chaos.connected() as (reader, writer):
            writer.write(request_bytes("/v1/completions", body))
            raw = b""
            with contextlib.suppress(ConnectionError):
                while data := await reader.read(4096):
                    raw += data
        text, end = text_of(raw)
        if end or not expected.startswith(text):
            raise BrokenPromiseError(raw.decode())

    with chaos_server("--step-ms", "5", "--num-blocks", "1000") as (process, address):
        chaos = Chaos(address, random.Random(5))
        streams = [asyncio.create_task(interrupted(chaos)) for _ in range(10)]
        await chaos.until_running(10)
        process.kill()
        await asyncio.gather(*streams)
    with chaos_server("--port", str(address[1])):
        await chaos.honest()
        assert chaos.counts == {"ended: done": 1}


@pytest.mark.soak
async def test_five_minutes_of_everything():
    with chaos_server() as (process, address):
        chaos = Chaos(address, random.Random(6))
        started, after_a_minute = time.monotonic(), None
        while (elapsed := time.monotonic() - started) < 300:
            metrics = await wave(chaos, chaos.rng.uniform(0.1, 1.0))
            if after_a_minute is None and elapsed > 60:
                after_a_minute = resident_mib(process)
        print(dict(chaos.counts))
        print(f"{after_a_minute:.1f} MiB after a minute, {resident_mib(process):.1f} at the end")
        assert resident_mib(process) - after_a_minute < 16
        assert metrics["streamserve:kv_cache_usage_perc"] == 0
