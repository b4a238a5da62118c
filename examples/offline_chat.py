"""Several conversations in one batch, by the model's chat template, without a server."""

from streamserve import LLM, SamplingParams

questions = ["What is the capital of France?", "What is the capital of Japan?"]
conversations = [[{"role": "user", "content": question}] for question in questions]

with LLM() as llm:
    outputs = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=40))

for question, output in zip(questions, outputs, strict=True):
    print(f"{question} {output.outputs[0].text}")
