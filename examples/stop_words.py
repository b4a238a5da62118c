"""Where an answer ends: stop strings, stop ids, a number of tokens."""

from streamserve import LLM, SamplingParams

messages = [{"role": "user", "content": "What is the capital of France?"}]

with LLM() as llm:
    for params in (
        SamplingParams(temperature=0, max_tokens=40, stop=["Paris", "\n"]),
        SamplingParams(temperature=0, max_tokens=40, stop="Paris", include_stop_str_in_output=True),
        SamplingParams(temperature=0, max_tokens=3),
    ):
        answer = llm.chat(messages, params, use_tqdm=False)[0].outputs[0]
        print(f"{answer.text!r} {answer.finish_reason} {answer.stop_reason!r}")
