"""A request's answer does not depend on who else is being served (float32: the same tokens)."""

import asyncio

TOPICS = ["France", "dogs", "the sea", "seven", "a friend", "rain", "the moon", "a red bike"]


def _request(index):
    return {
        "model": "box",
        "messages": [
            {"role": "system", "content": "You are a helpful assistant named Nadia."},
            {"role": "user", "content": f"{index}: tell me about {TOPICS[index % len(TOPICS)]}"},
        ],
        "max_tokens": 24,
        # Half are greedy, half sampled with a seed of their own.
        "temperature": 0 if index % 2 else 0.9,
        "seed": index,
        "extra_body": {"ignore_eos": True},
    }


async def _stream(client, index):
    stream = await client.chat.completions.create(**_request(index), stream=True)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


async def test_64_streams_equal_their_solo_runs(box):
    async with box.async_client(timeout=120) as client:
        crowd = await asyncio.gather(*(_stream(client, index) for index in range(64)))
        for index in range(64):
            assert crowd[index] == await _stream(client, index), f"request {index}"


async def test_a_shared_system_prompt_is_computed_once(start_server):
    """16 chats arrive together with one 500-token system prompt and a question each."""
    server = start_server("--dtype", "float32", "--max-num-batched-tokens", "256")
    system = " ".join(f"Rule {n}: be kind." for n in range(70))
    async with server.async_client(timeout=120) as client:

        async def ask(index):
            reply = await client.chat.completions.create(
                model="box",
                messages=[
                    {"role": "system", "content": system},
                    {"role": "user", "content": f"What is {index} plus 1?"},
                ],
                max_tokens=2,
            )
            return reply.usage

        usages = await asyncio.gather(*(ask(index) for index in range(16)))
    prompt = [usage.prompt_tokens for usage in usages]
    computed = [u.prompt_tokens - u.prompt_tokens_details.cached_tokens for u in usages]
    assert min(prompt) > 512
    # The first computes its whole prompt; each other one at most its own question, which the
    # template surrounds, and less than one block of what could not be shared.
    assert sorted(computed)[-1] == max(
        p for p, c in zip(prompt, computed, strict=True) if c == max(computed)
    )
    for tokens in sorted(computed)[:-1]:
        assert tokens <= 40, computed
