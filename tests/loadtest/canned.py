"""Runs as if they had been measured."""

from streamserve.engine.byte_tokenizer import ByteTokenizer
from streamserve.engine.chat_template import ChatTemplate
from streamserve_loadtest.prompts import ExactPrompts
from streamserve_loadtest.records import Record, Run


def record(
    *,
    due_at: float = 0.0,
    first: float = 0.1,
    gaps: tuple[float, ...] = (0.01,) * 9,
    group: str = "mix",
    turn: int = 0,
    **fields: object,
) -> Record:
    times = [due_at + first]
    for gap in gaps:
        times.append(times[-1] + gap)
    values = {
        "group": group,
        "kind": "short",
        "conversation": f"{group}/0",
        "turn": turn,
        "planned_prompt_tokens": 64,
        "planned_output_tokens": len(times),
        "due_at": due_at,
        "ended_at": times[-1],
        "chunk_times": times,
        "chunk_chars": [3] * len(times),
        "prompt_tokens": 64,
        "completion_tokens": len(times),
        **fields,
    }
    return Record(**values)  # type: ignore[arg-type]


def run(
    records: list[Record],
    *,
    server: str = "ours",
    workload: str = "W2",
    round_number: int = 0,
    rate: float | None = None,
) -> Run:
    return Run(server, workload, round_number, rate, records, 10.0, 0.02)


def byte_prompts() -> ExactPrompts:
    """Prompts whose tokens are bytes, under the plain template."""
    tokenizer = ByteTokenizer()
    template = ChatTemplate.builtin("plain", special_tokens=tokenizer.special_tokens)
    return ExactPrompts(tokenizer, template)
