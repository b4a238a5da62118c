"""Greedy accuracy on held-out dialogues, per kind of question.

python -m tools.box_model.evaluate --model streamserve/assets/box --count 100 --json out.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from tools.box_model.heldout import BUILDERS, FLOORS, HeldOut, ci_sample, floor_of, held_out_sample

Answer = Callable[[list[dict[str, str]]], str]


def score(answer: Answer, sample: list[HeldOut]) -> tuple[float, list[dict[str, object]]]:
    """The share of right answers, and what went wrong."""
    wrong: list[dict[str, object]] = []
    for item in sample:
        text = answer(item.messages)
        if not item.check(text):
            wrong.append(
                {
                    "kind": item.kind,
                    "messages": item.messages,
                    "answer": text,
                    "wanted": item.pattern,
                }
            )
    return 1 - len(wrong) / len(sample), wrong


def floors_met(answer: Answer) -> dict[str, float]:
    """Accuracy per entry of `FLOORS` on the sample of 200 that CI asks."""
    groups: dict[str, list[HeldOut]] = {name: [] for name in FLOORS}
    for item in ci_sample():
        groups[floor_of(item.kind)].append(item)
    return {name: score(answer, items)[0] for name, items in groups.items()}


def transformers_answer(folder: Path, max_new_tokens: int = 320) -> Answer:
    """Greedy answers from transformers: the reference that the server is compared with."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def answer(messages: list[dict[str, str]]) -> str:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        ids = out[0, inputs["input_ids"].shape[1] :].tolist()
        return tokenizer.decode(ids[: ids.index(end)] if end in ids else ids)

    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--count", type=int, default=100, help="dialogues per kind")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    answer = transformers_answer(args.model)
    result: dict[str, object] = {"floors": floors_met(answer)}
    print(json.dumps(result["floors"]), flush=True)
    mistakes = []
    kinds = {}
    for kind in BUILDERS:
        kinds[kind], wrong = score(answer, held_out_sample(kind, args.count, seed=11))
        mistakes += wrong
        print(f"{kind:32s} {kinds[kind]:6.1%}", flush=True)
    if args.json:
        result |= {"kinds": kinds, "count": args.count, "mistakes": mistakes}
        args.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
