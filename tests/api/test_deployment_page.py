"""The examples in docs/deployment.md say what a server answers (nginx's are run: tests/e2e)."""

import re
from pathlib import Path

import yaml
from prometheus_client.parser import text_string_to_metric_families

from streamserve.api.tenant_metrics import FAMILIES
from tests.api.harness import Api

PAGE = Path(__file__).parents[2] / "docs" / "deployment.md"


def example(key):
    """The one YAML block of the page with this key."""
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    [found] = [block for block in map(yaml.safe_load, blocks) if key in block]
    return found[key]


async def test_traefik_sends_what_is_public_to_replicas_that_are_ready():
    http = example("http")
    [router] = http["routers"].values()
    balancer = http["services"][router["service"]]["loadBalancer"]
    assert set(balancer) == {"servers", "sticky", "healthCheck", "responseForwarding"}
    assert all(re.fullmatch(r"http://[\d.]+:8000", s["url"]) for s in balancer["servers"])
    assert balancer["sticky"]["cookie"].keys() == {"name", "httpOnly", "secure"}
    assert int(balancer["responseForwarding"]["flushInterval"]) < 0, "at once"
    host, hidden = re.fullmatch(
        r"Host\(`([\w.]+)`\) && !PathRegexp\(`(.+)`\)", router["rule"]
    ).groups()
    assert host
    async with Api(has_faults=True).running() as api:
        paths = {route.path for route in api.app.routes}
        ready = balancer["healthCheck"]["path"]
        assert (await api.call("GET", ready)).status == 200
        api.app.context.gate.close()
        assert (await api.call("GET", ready)).status == 503
    closed = {path for path in paths if re.search(hidden, path)}
    assert closed == {"/metrics", "/version", "/debug/inject_fault"}


async def test_a_vllm_dashboard_finds_its_names_by_the_one_rule():
    [rule] = example("metric_relabel_configs")
    assert rule["source_labels"] == [rule["target_label"]] == ["__name__"]
    replacement = rule["replacement"].replace("$1", r"\1")
    async with Api().running() as api:
        await api.complete(max_tokens=2)
        text = (await api.call("GET", "/metrics")).body.decode()
    names = {s.name for family in text_string_to_metric_families(text) for s in family.samples}
    found = {re.sub(rf"^(?:{rule['regex']})$", replacement, name) for name in names}
    assert {
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "vllm:num_preemptions_total",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:request_success_total",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_bucket",
        "vllm:e2e_request_latency_seconds_bucket",
    } <= found


async def test_what_is_to_watch_is_measured():
    [table] = re.findall(r"^\| to watch .*?\n\n", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    watched = set(re.findall(r"`(\w+_\w+)`", table))
    assert {"num_requests_waiting", "tenant_requests_total"} <= watched
    async with Api().running() as api:
        text = (await api.call("GET", "/metrics")).body.decode()
    families = list(text_string_to_metric_families(text))
    names = {f"{f.name}_total" if f.type == "counter" else f.name for f in families}
    known = {name.removeprefix("streamserve:") for name in names}
    assert watched <= known | {f"{name}_total" for name, _ in FAMILIES}
