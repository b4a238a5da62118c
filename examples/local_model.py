"""A model of your own: any directory that Hugging Face's tools have written.

python examples/local_model.py ./Qwen2.5-0.5B-Instruct
"""

import sys

from streamserve import LLM, SamplingParams

if len(sys.argv) != 2:
    sys.exit(f"usage: python {sys.argv[0]} DIRECTORY")

llm = LLM(
    model=sys.argv[1],
    trust_remote_code=False,
    dtype="auto",
    max_model_len=512,
    gpu_memory_utilization=0.9,
    seed=0,
)
output = llm.generate("Once upon a time", SamplingParams(max_tokens=20))[0]
print(output.prompt + output.outputs[0].text)
