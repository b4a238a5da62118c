"""What litellm makes of a server: run by ``test_litellm.py``, in a process of its own.

It imports three thousand modules, and keeps an event loop and clients until the process ends.
"""

import asyncio
import json
import sys

import litellm

URL = sys.argv[1]
CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
MODELS = {
    "openai/box": {"api_base": f"{URL}/v1"},
    "hosted_vllm/box": {"api_base": f"{URL}/v1"},
    "anthropic/box": {"api_base": URL},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "place",
        "parameters": {
            "type": "object",
            "properties": {"is_capital": {"type": "boolean"}},
            "required": ["is_capital"],
            "additionalProperties": False,
        },
    },
}


def text_of(chunks):
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def asked_of(model):
    asked = {"model": model, "messages": CAPITAL, "temperature": 0, "max_tokens": 100}
    return {**asked, "api_key": "none", "max_retries": 0, **MODELS[model]}


async def awaited(model):
    whole = await litellm.acompletion(**asked_of(model))
    stream = await litellm.acompletion(**asked_of(model), stream=True)
    return [whole.choices[0].message.content, text_of([chunk async for chunk in stream])]


async def all_awaited():
    return {model: await awaited(model) for model in MODELS}


def answers(model):
    asked = asked_of(model)
    whole = litellm.completion(**asked)
    chunks = list(litellm.completion(**asked, stream=True))
    choice = {"type": "function", "function": {"name": "place"}}
    called = litellm.completion(**asked, tools=[TOOL], tool_choice=choice).choices[0].message
    try:
        litellm.completion(**{**asked, "model": model.replace("box", "nobody")})
    except litellm.NotFoundError as error:
        refused = str(error)
    return {
        "texts": [whole.choices[0].message.content, text_of(chunks)],
        "num_chunks": len(chunks),
        "ends": [whole.choices[0].finish_reason, chunks[-1].choices[0].finish_reason],
        "num_tokens": whole.usage.completion_tokens,
        "call": called.tool_calls[0].function.arguments,
        "refused": refused,
    }


found = {model: answers(model) for model in MODELS}
for model, texts in asyncio.run(all_awaited()).items():
    found[model]["texts"] += texts
print(json.dumps(found))
