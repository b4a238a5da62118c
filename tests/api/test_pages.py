"""The pages' HTTP: what they may do, and that they can be turned off."""

import re

import pytest

from streamserve.api.pages import PAGES
from streamserve.cli.args import parse_args
from streamserve.cli.serve import api_config
from streamserve.errors import ConfigError
from tests.api.harness import Api


@pytest.mark.parametrize("path", PAGES)
async def test_a_page_has_a_strict_policy_and_nothing_from_outside(path):
    async with Api(api_keys=("secret",)).running() as api:
        page = await api.call("GET", path)
        again = await api.call("GET", path)
    assert page.status == 200  # without the key: it is where one is entered
    assert page.body == again.body
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "require-trusted-types-for 'script'" in policy
    text = page.body.decode()
    assert len(re.findall(r"<script\b", text)) == len(re.findall(r"<style\b", text)) == 1
    assert not re.findall(r'(?:src|href)="(?!data:|/)', text)
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)
    assert not re.findall(r'\son\w+="|\sstyle="', text)


def test_the_flag_turns_them_off():
    assert api_config(parse_args(["serve"])).has_pages
    assert not api_config(parse_args(["serve", "--no-ui"])).has_pages


def test_an_empty_key_guards_nothing_and_is_refused():
    with pytest.raises(ConfigError, match="--api-key must not be empty"):
        api_config(parse_args(["serve", "--api-key", "secret", ""]))


@pytest.mark.parametrize("path", PAGES)
async def test_without_pages_there_is_nothing(path):
    async with Api(has_pages=False).running() as api:
        answer = await api.call("GET", path)
        document = await api.call("GET", "/openapi.json")
    assert answer.status == 404
    assert answer.error["code"] == "unknown_url"
    assert document.status == 200
