"""A place that is given away is held by somebody, whoever gives up at the same time."""

import asyncio

from streamserve.engine.turns import Turns


async def test_a_place_given_to_who_gives_up_goes_to_the_next():
    turns, held = Turns(1), []

    async def hold(owner):
        async with turns.place(owner):
            held.append(owner)

    async with turns.place("first"):
        given_up, next_one = (asyncio.create_task(hold(owner)) for owner in ("second", "third"))
        await asyncio.sleep(0)
    given_up.cancel()  # it has the place, and does not know yet
    for _ in range(5):
        await asyncio.sleep(0)
    assert given_up.cancelled()
    assert held == ["third"]
    assert next_one.done()
