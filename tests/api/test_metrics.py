"""What Prometheus scrapes, and when latencies are stamped."""

import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from streamserve.api.metrics import Delivery, Metrics, histogram_family
from streamserve.config import SpeculativeConfig
from streamserve.core.histogram import Counts
from streamserve.core.request import FinishReason
from streamserve.engine.null_runner import NullRunner
from streamserve.engine.parsers.answer_format import AnswerFormat
from tests.api.harness import MODEL, Api, Exchange, chat_body
from tests.api.scripted import scripted_parts
from tests.api.test_forced_calls import STRICT

CHAT = "/v1/chat/completions"


async def scrape(api):
    answer = await api.call("GET", "/metrics")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name.removeprefix("streamserve:"), sample.labels.get("le")): sample.value
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
        if sample.labels.get("finished_reason", "length") == "length"
        and sample.labels["model_name"] == MODEL
    }


class Compiled(NullRunner):
    num_compilations = 7


async def test_a_scrape_before_and_after():
    async with Api(runner=Compiled()).running() as api:
        before = await scrape(api)
        await api.complete(prompt="x" * 40, max_tokens=5, stream=True)
        await api.complete(prompt="x" * 40, max_tokens=5)
        await api.complete(prompt=5)
        after = await scrape(api)
    assert set(before) <= set(after)
    assert before["generation_tokens_total", None] == 0
    assert after["generation_tokens_total", None] == 10
    assert after["prompt_tokens_total", None] == 82
    assert after["prefix_cache_queries_total", None] == 82
    assert after["prefix_cache_hits_total", None] > 0
    assert after["num_requests_running", None] == 0
    assert after["num_requests_waiting", None] == 0
    assert after["kv_cache_usage_perc", None] == 0
    assert after["request_success_total", None] == 2
    assert after["request_refused_total", None] == 1
    assert after["kernel_compilations_total", None] == 7
    assert after["step_time_seconds_count", None] == 0  # this runner does not measure
    assert after["prefill_chunk_tokens_bucket", "+Inf"] == 0
    assert after["time_to_first_token_seconds_count", None] == 1
    assert after["time_to_first_token_seconds_bucket", "+Inf"] == 1
    assert after["e2e_request_latency_seconds_count", None] == 2
    # Latencies are of frames: tokens that were fetched together share one.
    assert 0 <= after["inter_token_latency_seconds_count", None] <= 4


async def test_drafts_are_counted_and_change_no_usage():
    speculative = SpeculativeConfig(
        num_speculative_tokens=3, prompt_lookup_min=1, prompt_lookup_max=2
    )
    bodies = []
    for config in (None, speculative):
        async with Api(token_ids=b"ab", speculative=config).running() as api:
            whole = await api.complete(prompt="ab" * 8, max_tokens=13)
            bodies.append({**whole.json, "id": "", "created": 0})
            after = await scrape(api)
    assert bodies[0] == bodies[1]
    assert bodies[0]["usage"]["completion_tokens"] == 13
    # One token behind the prompt, then 3 + 1 at a time.
    assert after["spec_decode_num_drafts_total", None] == 3
    assert after["spec_decode_num_draft_tokens_total", None] == 9
    assert after["spec_decode_num_accepted_tokens_total", None] == 9


async def test_the_forced_tokens_of_a_forced_call_are_counted():
    parts = scripted_parts("hm", answer_format=AnswerFormat(tool_parser="hermes"))
    async with Api(**parts, max_model_len=1024).running() as api:
        answer = await api.chat(tools=[STRICT], tool_choice="required")
        assert answer.json["choices"][0]["finish_reason"] == "tool_calls"
        num_tokens = answer.json["usage"]["completion_tokens"]
        num_steps = api.engine.num_steps
        after = await scrape(api)
    num_forced = after["forced_tokens_total", None]
    assert num_forced == after["spec_decode_num_accepted_tokens_total", None]
    assert num_forced > num_tokens / 2
    assert num_steps == num_tokens - num_forced


async def test_what_comes_back_from_host_memory_is_counted():
    async with Api(num_blocks=8, num_host_blocks=32).running() as api:
        for letter in "aba":
            await api.complete(prompt=letter * 100, max_tokens=20)
        now = await scrape(api)
    assert now["prefix_cache_hits_total", None] == 1 + 96
    assert now["prefix_cache_host_hits_total", None] == 96
    assert now["kv_stored_tokens_total", None] == 2 * 112
    assert now["kv_host_usage_perc", None] == 14 / 32


async def test_states_that_are_kept_and_taken_are_counted():
    async with Api(num_state_slots=3).running() as api:
        # A prompt keeps one near its end, a second one of the kind where whole blocks of it end,
        # and an answer one behind it, unless that is there.
        for letter in "aab":
            await api.complete(prompt=letter * 100, max_tokens=20)
        now = await scrape(api)
    assert now["prefix_cache_hits_total", None] == 80
    assert now["kept_states", None] == 3
    assert now["state_evictions_total", None] == 1 + 2


async def test_running_and_waiting_requests_are_counted():
    async with Api(is_held=True).running() as api:
        exchanges = [
            Exchange(api.app, "POST", "/v1/chat/completions", chat_body(stream=True, max_tokens=2))
            for _ in range(10)
        ]
        for exchange in exchanges:
            await exchange.until(lambda e: bool(e.messages))
        await api.pace.step()
        now = await scrape(api)
        assert now["num_requests_running", None] + now["num_requests_waiting", None] == 10
        assert now["num_requests_waiting", None] >= 2
        assert now["kv_cache_usage_perc", None] > 0
        api.pace.let_go()
        for exchange in exchanges:
            await exchange.finished()


def test_a_bound_belongs_to_its_own_bucket():
    histogram = Counts((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 3.0):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 1]
    assert histogram.count == 5
    samples = {
        s.labels.get("le", s.name): s.value
        for s in histogram_family(histogram, "x", "about x").samples
    }
    assert samples == {"1.0": 2, "2.0": 4, "+Inf": 5, "x_count": 5, "x_sum": 8.0}


def test_latencies_are_stamped_when_frames_have_left():
    now = 10.0
    metrics = Metrics()
    delivery = Delivery(metrics, lambda: now, arrival=9.0)
    now = 10.5
    delivery.text_sent()
    now = 10.75
    delivery.text_sent()
    now = 11.0
    delivery.end(FinishReason.STOP)
    delivery.end(FinishReason.ABORT)
    assert metrics.time_to_first_token.total == pytest.approx(1.5)
    assert metrics.inter_token_latency.total == pytest.approx(0.25)
    assert metrics.e2e_latency.total == pytest.approx(2.0)
    assert metrics.num_finished == {"stop": 1, "length": 0, "abort": 0, "error": 0}


async def test_every_metric_of_the_dashboard_is_there():
    page = (Path(__file__).parents[2] / "docs" / "grafana.json").read_text(encoding="utf-8")
    named = set(re.findall(r"streamserve:(\w+)", page))
    assert len(named) > 15
    async with Api().running() as api:
        await api.complete(prompt=5)  # refused
        api.app.context.metrics.refused_connection("receive_timeout")
        found = {name for name, _ in await scrape(api)}
    assert named <= found


async def test_labels_are_never_what_a_client_has_sent():
    async with Api().running() as api:
        await api.chat(model="evil-model", user="evil-user")
        await api.chat(**{"evil-field": 1, "temperature": "evil-value"})
        await api.call("POST", "/evil-path", b"evil", headers={"x-request-id": "evil-id"})
        answer = await api.call("GET", "/metrics")
    assert 'code="model_not_found"' in answer.body.decode()
    assert "evil" not in answer.body.decode()


async def test_tenants_are_counted_by_the_operators_names_and_on_the_operators_port_only():
    alice, bob = ({"authorization": f"Bearer sk-{name}"} for name in "ab")
    for admin_port in (None, 0):
        api = Api(api_keys=("sk-a", "sk-b"), admin_port=admin_port)
        async with api.running():
            body = chat_body(max_tokens=3, n=2, user="evil-user")
            await api.call("POST", CHAT, body, headers=alice)
            await api.call("POST", CHAT, body, headers=alice)
            await api.call("POST", CHAT, chat_body(n=1000), headers=alice)
            await api.call("POST", "/tokenize", {"prompt": 5}, headers=bob)
            await api.call("POST", CHAT, body, headers={"authorization": "Bearer evil-key"})
            app = api.app if admin_port is None else api.app.admin
            exchange = Exchange(app, "GET", "/metrics")
            await exchange.finished()
            text = exchange.body.decode()
        assert 'code="invalid_api_key"' in text
        assert "evil" not in text
        found = {
            (s.labels["tenant"], s.name.removeprefix("streamserve:tenant_")): s.value
            for family in text_string_to_metric_families(text)
            for s in family.samples
            if "tenant" in s.labels
        }
        if admin_port is None:
            assert not found
    length = found.pop(("key-1", "prompt_tokens_total")) / 2
    cached = found.pop(("key-1", "prompt_tokens_cached_total"))
    assert 0 < length - cached <= 16
    assert {key: value for key, value in found.items() if value} == {
        ("key-1", "requests_total"): 2,
        ("key-1", "requests_refused_total"): 1,
        ("key-1", "generation_tokens_total"): 12,
        ("key-2", "requests_refused_total"): 1,
    }


async def test_an_answer_that_comes_at_once_has_a_time_to_its_first_token():
    async with Api().running() as api:
        await api.chat(stream=True, max_tokens=1)
    assert sum(api.app.context.metrics.time_to_first_token.counts) == 1
