"""A proxy's prefix, another role, and the request log."""

from __future__ import annotations

import logging
import ssl
import subprocess

import httpx
import pytest

from streamserve.config import ApiConfig, TlsConfig
from streamserve.errors import ConfigError
from tests.api.harness import MODEL, Api, Exchange, chat_body, server_thread, text_of

LOG = "streamserve.requests"


async def test_chat_answers_have_the_role_that_was_asked_for():
    async with Api(response_role="narrator").running() as api:
        answer = await api.chat(max_tokens=3)
        assert answer.json["choices"][0]["message"]["role"] == "narrator"
        answer = await api.chat(max_tokens=3, stream=True)
        assert answer.events[0]["choices"][0]["delta"]["role"] == "narrator"


def test_behind_a_prefix_everything_works_and_the_key_is_still_asked_for():
    with server_thread(root_path="/llm", api_keys=("k",)) as url, httpx.Client() as client:
        for prefix in ("", "/llm"):
            assert client.get(f"{url}{prefix}/v1/models").status_code == 401
            headers = {"Authorization": "Bearer k"}
            reply = client.get(f"{url}{prefix}/v1/models", headers=headers)
            assert reply.json()["data"][0]["id"] == MODEL
            assert client.get(f"{url}{prefix}/health").status_code == 200


@pytest.mark.parametrize("path", ["llm", "/llm/"])
def test_a_prefix_begins_with_a_slash_and_ends_without(path):
    with pytest.raises(ConfigError, match="root_path must begin with a slash"):
        ApiConfig(served_model_names=("m",), root_path=path)


async def test_a_request_has_two_lines(caplog):
    caplog.set_level(logging.INFO, LOG)
    async with Api(log_requests=True).running() as api:
        headers = {"X-Request-Id": "mine"}
        body = chat_body(max_tokens=5, temperature=0.5)
        answer = await api.call("POST", "/v1/chat/completions", body, headers=headers)
    admitted, ended = (record.getMessage() for record in caplog.records)
    prompt_tokens = answer.json["usage"]["prompt_tokens"]
    assert admitted.startswith(f"{answer.json['id']} admitted: client 127.0.0.1:1, header id mine")
    assert f"{prompt_tokens} prompt tokens, whole, max_tokens 5, temperature 0.5" in admitted
    assert "Hi" not in admitted
    assert ended.startswith(f"{answer.json['id']} ended: length, {prompt_tokens} prompt tokens")
    assert "of which 0 cached, 5 output tokens, first after" in ended


async def test_answers_to_one_prompt_count_it_once(caplog):
    caplog.set_level(logging.INFO, LOG)
    async with Api(log_requests=True).running() as api:
        body = {"prompt": ["Once", "Twice"], "n": 3, "max_tokens": 2}
        usage = (await api.call("POST", "/v1/completions", body)).json["usage"]
    admitted, ended = (record.getMessage() for record in caplog.records)
    assert f"{usage['prompt_tokens']} prompt tokens in 2 prompts" in admitted
    assert f"{usage['prompt_tokens']} prompt tokens of which" in ended
    assert f", {usage['completion_tokens']} output tokens" in ended


async def test_streams_and_readers_who_leave_are_logged_alike(caplog):
    caplog.set_level(logging.INFO, LOG)
    async with Api(log_requests=True, is_held=True, max_logged_characters=4).running() as api:
        body = {"prompt": "Once upon", "stream": True, "max_tokens": 50}
        exchange = Exchange(api.app, "POST", "/v1/completions", body)
        await api.pace.step()
        await exchange.until(lambda e: b"text" in e.body)
        exchange.leave()
        await exchange.finished()
    admitted, ended = (record.getMessage() for record in caplog.records)
    assert admitted.endswith("prompt '<s>O'")  # four characters
    assert " streamed, " in admitted
    assert "ended: abort, " in ended
    assert ", 1 output tokens" in ended


async def test_without_the_flag_nothing_is_logged(caplog):
    caplog.set_level(logging.INFO, LOG)
    async with Api().running() as api:
        answer = await api.chat(stream=True, max_tokens=2)
        assert text_of(answer.events)
    assert caplog.records == []


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> TlsConfig:
    directory = tmp_path_factory.mktemp("tls")
    key, certificate = directory / "key.pem", directory / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    try:
        subprocess.run([*command, *names, *files], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs openssl")
    return TlsConfig(certfile=str(certificate), keyfile=str(key))


def test_https_serves_whole_answers_and_streams(certificate):
    trusted = ssl.create_default_context(cafile=certificate.certfile)
    with server_thread(tls=certificate) as url, httpx.Client(verify=trusted) as client:
        assert url.startswith("https://127.0.0.1:")
        reply = client.post(f"{url}/v1/chat/completions", json=chat_body(max_tokens=4))
        assert reply.json()["usage"]["completion_tokens"] == 4
        body = chat_body(max_tokens=40, stream=True)
        with client.stream("POST", f"{url}/v1/chat/completions", json=body) as stream:
            lines = list(stream.iter_lines())
    assert lines[-2] == "data: [DONE]"
