"""An answer as it is written, from ordinary code and from an event loop, without a server."""

import asyncio

from streamserve import LLM, AsyncLLM, SamplingParams

messages = [{"role": "user", "content": "What is the capital of France?"}]
params = SamplingParams(temperature=0, max_tokens=40)

with LLM() as llm:
    for piece in llm.stream(messages, params):
        print(piece, end="", flush=True)
    print()


async def main() -> None:
    async with AsyncLLM() as llm:
        async for output in llm.chat(messages, params):
            print(output.outputs[0].text)


asyncio.run(main())
