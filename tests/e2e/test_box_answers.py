"""The model in the box, asked what it was never trained on, through the server."""

import asyncio
import re

from tests.e2e.servers import running_server
from tools.box_model.evaluate import floors_met
from tools.box_model.heldout import FLOORS, ci_sample


async def _answers(box, dialogues):
    async with box.async_client(timeout=120) as client:

        async def ask(messages):
            reply = await client.chat.completions.create(
                model="box", messages=messages, temperature=0
            )
            return reply.choices[0].message.content

        return await asyncio.gather(*(ask(messages) for messages in dialogues))


async def _meets_its_floors(box):
    dialogues = [item.messages for item in ci_sample()]
    assert len(dialogues) == 200
    answers = {
        repr(messages): answer
        for messages, answer in zip(dialogues, await _answers(box, dialogues), strict=True)
    }
    accuracy = floors_met(lambda messages: answers[repr(messages)])
    assert accuracy.keys() == FLOORS.keys()
    below = {name: share for name, share in accuracy.items() if share < FLOORS[name]}
    assert not below, f"{below} of {FLOORS}"


async def test_held_out_questions_meet_their_floors(box):
    await _meets_its_floors(box)


async def test_int8_weights_meet_them_too():
    with running_server("--quantization", "int8", "--kv-cache-memory", "64MiB") as server:
        assert "with int8 weights" in server.output
        # 4.1 MiB of matrices, their scales, and the norms, in place of 9.6 MiB.
        assert re.search(r"weights +4\.\d MiB", server.output)
        await _meets_its_floors(server)


async def test_it_says_politely_what_it_does_not_know(box):
    (answer,) = await _answers(
        box, [[{"role": "user", "content": "Who won the chess championship of 1931?"}]]
    )
    assert any(word in answer for word in ("sorry", "don't know", "can't", "beyond", "afraid"))
