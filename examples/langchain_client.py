"""LangChain's own chat model against a server. The server's URL is the first argument."""

import sys

from langchain_openai import ChatOpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
chat = ChatOpenAI(base_url=f"{url}/v1", api_key="EMPTY", model="box", temperature=0)

print(chat.invoke("What is the capital of France?").content)
for chunk in chat.stream([("user", "What is the capital of Japan?")]):
    print(chunk.content, end="", flush=True)
print()
