"""Stream a chat through Anthropic's API of a server. Its URL is the first argument."""

import sys

import anthropic

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
with (
    anthropic.Anthropic(base_url=url, api_key="none") as client,
    client.messages.stream(
        model=client.models.list().data[0].id,
        max_tokens=100,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        extra_body={"temperature": 0},
    ) as stream,
):
    for text in stream.text_stream:
        print(text, end="", flush=True)
    message = stream.get_final_message()
print(f"\n({message.stop_reason}, {message.usage.output_tokens} tokens)")
