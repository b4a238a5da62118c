"""Text completion by a server, with the openai package. Its URL is the first argument."""

import sys

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
with OpenAI(base_url=f"{url}/v1", api_key="EMPTY") as client:
    model = client.models.list().data[0].id
    completion = client.completions.create(
        model=model, prompt="The capital of France is", max_tokens=7, temperature=0
    )
print(completion.choices[0].text)
