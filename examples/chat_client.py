"""Chat with a server: a whole answer, then one as it is written. Its URL is the first argument."""

import sys

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
messages = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is the capital of France?"},
]
with OpenAI(base_url=f"{url}/v1", api_key="EMPTY") as client:
    model = client.models.list().data[0].id
    answer = client.chat.completions.create(model=model, messages=messages, temperature=0)
    print(answer.choices[0].message.content)

    stream = client.chat.completions.create(
        model=model, messages=messages, temperature=0, stream=True
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()
