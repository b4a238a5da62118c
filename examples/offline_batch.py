"""A hundred prompts in one batch, in this process. The model is the first argument, or the box."""

import sys

from streamserve import LLM, SamplingParams

model = sys.argv[1] if len(sys.argv) > 1 else None
prompts = [f"What is {a} plus {b}?" for a in range(10) for b in range(10)]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=16)

with LLM(model) as llm:
    outputs = llm.generate(prompts, sampling_params)

for output in outputs:
    print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
