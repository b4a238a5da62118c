"""Adapters as models of their own: listed, asked for, loaded and unloaded while answers stream."""

import asyncio
import threading
from pathlib import Path

import pytest

from streamserve.engine.adapters import Adapter, Adapters
from streamserve.errors import AdapterError
from tests.api.harness import MODEL, Answer, Api, Exchange, chat_body, until

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
PATH, SLOW = Path("/adapters/sql"), Path("/adapters/slow")


class Bank:
    """Says which slots hold what. What is called "slow" is read when ``go_on`` is set."""

    def __init__(self, num_slots: int = 2) -> None:
        self.num_slots = num_slots
        self.held: dict[int, Path] = {}
        self.num_begun = 0
        self.go_on = threading.Event()

    def load(self, slot: int, path: Path) -> None:
        self.num_begun += 1
        if path.name == "broken":
            raise AdapterError(f"{path} holds no adapter")
        if path.name == "slow":
            assert self.go_on.wait(60)
        assert slot not in self.held
        self.held[slot] = path

    def clear(self, slot: int) -> None:
        del self.held[slot]

    def close(self) -> None:
        self.held.clear()


@pytest.fixture
async def api():
    api = Api(adapter_bank=Bank(), updates_adapters=True)
    api.adapters.load_now("sql", PATH)
    return api


async def test_an_adapter_is_a_model_of_its_own(api):
    async with api.running():
        listed = (await api.call("GET", "/v1/models")).json["data"]
        assert [(card["id"], card["parent"], card["root"]) for card in listed] == [
            (MODEL, None, MODEL),
            ("alias", None, MODEL),
            ("sql", MODEL, str(PATH)),
        ]
        assert (await api.call("GET", "/v1/models/sql")).json["id"] == "sql"
        answer = await api.chat(model="sql")
        assert (answer.status, answer.json["model"]) == (200, "sql")
        refused = await api.chat(model="css")
        assert refused.status == 404
        assert "this server has org/null-model, alias, sql" in refused.json["error"]["message"]
        assert (await api.call("POST", "/tokenize", {"model": "sql", "prompt": "a"})).status == 200


async def test_nothing_cached_is_shared_between_adapters(api):
    api.adapters.load_now("css", Path("/adapters/css"))
    prompt = "x" * 100

    async def cached(model: str) -> int:
        answer = await api.complete(model=model, prompt=prompt)
        return answer.json["usage"]["prompt_tokens_details"]["cached_tokens"]

    async with api.running():
        for _ in range(2):
            found = [await cached(model) for model in (MODEL, "sql", "css")]
        assert all(num > 90 for num in found)
        await api.call("POST", UNLOAD, {"lora_name": "sql"})
        await api.call("POST", LOAD, {"lora_name": "sql", "lora_path": str(PATH)})
        assert await cached("sql") == 0, "the same name, another adapter"


async def test_what_is_public_is_so_for_the_models_own_weights_only():
    prompt = [72] * 100
    api = Api(adapter_bank=Bank(), public_prefixes=[prompt], api_keys=("a", "b"))
    api.adapters.load_now("sql", PATH)

    async def cached(key: str, model: str) -> int:
        body = {"model": model, "prompt": [*prompt, 73], "max_tokens": 1}
        headers = {"authorization": f"Bearer {key}"}
        answer = await api.call("POST", "/v1/completions", body, headers=headers)
        return answer.json["usage"]["prompt_tokens_details"]["cached_tokens"]

    async with api.running():
        asked = [("a", MODEL), ("b", MODEL), ("a", "sql"), ("b", "sql")]
        assert [await cached(*each) for each in asked] == [0, 96, 0, 0]


async def test_who_runs_keeps_an_adapter_that_is_unloaded(api):
    bank = api.adapters._bank
    async with api.running():
        api.pace.is_held = True
        exchange = Exchange(
            api.app, "POST", "/v1/chat/completions", chat_body(model="sql", stream=True)
        )
        await until(lambda: api.pace.waiting)
        assert (await api.call("POST", UNLOAD, {"lora_name": "sql"})).status == 200
        assert (await api.chat(model="sql")).status == 404
        assert PATH in bank.held.values()
        api.pace.let_go()
        await exchange.finished()
        assert Answer(exchange.messages).events[-1] == "[DONE]"
        await until(lambda: not bank.held)
        for name in ("a", "b"):
            loaded = await api.call("POST", LOAD, {"lora_name": name, "lora_path": "/x"})
            assert loaded.status == 200
        assert set(bank.held) == {0, 1}


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "words"),
    [
        (LOAD, {"lora_name": "sql", "lora_path": "/x"}, 400, "lora_path", "loaded already"),
        (LOAD, {"lora_name": "b", "lora_path": "/broken"}, 400, "lora_path", "holds no adapter"),
        (LOAD, {"lora_name": MODEL, "lora_path": "/x"}, 400, "lora_name", "no name of the model"),
        (LOAD, {"lora_name": "", "lora_path": "/x"}, 400, "lora_name", "1 to 256 characters"),
        (LOAD, {"lora_name": "b"}, 400, "lora_path", "required"),
        (LOAD, {"lora_name": "b", "lora_path": 5}, 400, "lora_path", "string"),
        (LOAD, {"lora_name": "b", "lora_path": "/x", "c": 1}, 400, "c", "Unknown field"),
        (UNLOAD, {"lora_name": "nobody"}, 404, "lora_name", "nobody"),
        (UNLOAD, {}, 400, "lora_name", "required"),
    ],
)
async def test_what_cannot_be_is_refused_and_takes_no_slot(api, path, body, status, param, words):
    async with api.running():
        answer = await api.call("POST", path, body)
        assert answer.status == status
        assert answer.json["error"]["param"] == param
        assert words in answer.json["error"]["message"]
        last = {"lora_name": "last", "lora_path": "/x"}
        assert (await api.call("POST", LOAD, last)).status == 200
        full = await api.call("POST", LOAD, {"lora_name": "more", "lora_path": "/x"})
        assert full.status == 400
        assert "all 2 places" in full.json["error"]["message"]


async def test_without_the_flag_there_are_no_such_paths():
    api = Api(adapter_bank=Bank())
    async with api.running():
        for path in (LOAD, UNLOAD):
            assert (await api.call("POST", path, {})).status == 404


async def test_two_load_one_name_at_the_same_time():
    bank = Bank()
    adapters = Adapters(bank)
    loading = (adapters.load("a", PATH), adapters.load("a", PATH))
    found = await asyncio.gather(*loading, return_exceptions=True)
    assert {type(one) for one in found} == {Adapter, AdapterError}
    assert [adapter.name for adapter in adapters] == ["a"]
    assert bank.num_begun == 1
    await adapters.load("b", PATH)
    assert len(bank.held) == 2


async def test_who_asks_for_an_adapter_gets_it_loaded_once_and_waits_for_no_other():
    bank = Bank()
    adapters = Adapters(bank)
    used: list[int] = []
    adapters.serve(used.__contains__)
    first = await adapters.get("a", PATH)
    slow = [asyncio.create_task(adapters.get("slow", SLOW)) for _ in range(2)]
    await until(lambda: bank.num_begun == 2)
    assert await adapters.get("a", PATH) is first
    with pytest.raises(AdapterError, match=f"'a' is loaded already, from {PATH}"):
        await adapters.get("a", SLOW)
    bank.go_on.set()
    second, again = await asyncio.gather(*slow)
    assert second is again
    used.append(first.slot)
    third = await adapters.get("c", Path("/x"))
    assert third.slot == second.slot, "the oldest that nothing uses made room"
    used.append(third.slot)
    waits = asyncio.create_task(adapters.get("d", Path("/x")))
    await asyncio.sleep(0.12)
    assert await adapters.get("c", Path("/x")) is third, "who waits for room is in nobody's way"
    assert not waits.done()
    assert bank.num_begun == 3
    used.remove(first.slot)
    assert (await waits).slot == first.slot


async def test_a_slot_is_given_away_once():
    bank = Bank()
    adapters = Adapters(bank)
    for name in "ab":
        await adapters.load(name, PATH)
    adapters.unload("a")
    third = await adapters.load("c", Path("/c"))
    adapters.unload("b")
    assert bank.held == {third.slot: Path("/c")}
    await adapters.load("d", Path("/d"))
    assert sorted(bank.held.values()) == [Path("/c"), Path("/d")]
    with pytest.raises(AdapterError, match="all 2 places"):
        await adapters.load("e", PATH)


async def test_nobody_is_read_into_the_slot_of_who_gave_up_before_that_was_read():
    bank = Bank(num_slots=1)
    adapters = Adapters(bank)
    given_up = asyncio.create_task(adapters.load("slow", SLOW))
    await until(lambda: bank.num_begun)
    given_up.cancel()
    await asyncio.wait([given_up])
    with pytest.raises(AdapterError, match="all 1 places"):
        await adapters.load("a", PATH)
    bank.go_on.set()
    await until(lambda: adapters._free)
    assert not bank.held
    await adapters.load("a", PATH)
    assert bank.held == {0: PATH}
