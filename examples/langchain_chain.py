"""A model in this process behind LangChain: `prompt | llm`, at once and streamed.

Needs `pip install langchain-core`. The model is the first argument, or the box.
"""

import sys

from langchain_core.prompts import PromptTemplate

from streamserve.langchain import VLLM

llm = VLLM(
    model=sys.argv[1] if len(sys.argv) > 1 else "",
    max_new_tokens=48,
    temperature=0,
    top_k=10,
    top_p=0.95,
    vllm_kwargs={"max_model_len": 512},
)
prompt = PromptTemplate.from_template("Question: What is the capital of {country}?\n\nAnswer:")
chain = prompt | llm

print(chain.invoke({"country": "France"}))
for piece in chain.stream({"country": "Japan"}):
    print(piece, end="", flush=True)
print()
