"""A model that says what a test tells it to, and a chat template that knows tools and thinking."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from streamserve.core.plan import mask_of
from streamserve.engine.chat_template import ChatTemplate
from streamserve.engine.null_runner import NullRunner
from streamserve.engine.parsers.answer_format import AnswerFormat, choose_answer_format
from tests.api.harness import Api

EOS = 257
ENDS = (EOS, *b'"}]')

TEMPLATE = """\
{%- if tools %}<tools>{{ tools | tojson }}</tools>
{% endif -%}
{%- for m in messages %}
{{- m.role }}: {{ m.content }}
{%- for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }} \
{{- call.function.arguments | tojson }} {{ call.id }}</tool_call>{% endfor %}
{%- if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}
{%- if m.tool_call_id %} (of {{ m.tool_call_id }}){% endif %}
{% endfor -%}
{%- if add_generation_prompt %}assistant: {% if enable_thinking is defined %}\
{{- '<think>\\n' if enable_thinking else '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""


class ScriptedRunner(NullRunner):
    """Answers ``script(prompt)``, both as text, then ends; ``prompts`` are those it has seen.

    Where a mask does not let its script's token pass, it takes another that may: one that ends
    something, if there is one.
    """

    def __init__(self, script: Callable[[str], str]) -> None:
        super().__init__()
        self._script = script
        self._answers: dict[str, list[int]] = {}
        self.prompts: list[str] = []

    def launch(self, plan: Any) -> None:
        for new in plan.new_requests:
            prompt = bytes(new.token_ids[: new.num_prompt_tokens]).decode()
            self.prompts.append(prompt)
            self._answers[new.request_id] = [*self._script(prompt).encode(), EOS]
        super().launch(plan)

    def _output_of(self, plan: Any, masks: Any) -> Any:
        output = super()._output_of(plan, masks)
        for scheduled, ids in zip(plan.scheduled, output.sampled_token_ids, strict=True):
            answer = self._answers[scheduled.request_id]
            if ids:
                ids[:] = samples(scheduled, answer, masks)
        if output.logprobs is None:
            return output
        logprobs = [
            self._logprobs_of(ids, self._num_logprobs.get(scheduled.request_id))
            for scheduled, ids in zip(plan.scheduled, output.sampled_token_ids, strict=True)
        ]
        return replace(output, logprobs=logprobs)


def samples(scheduled: Any, answer: list[int], masks: Any) -> list[int]:
    """What counts of an answer's next tokens, as far as masks allow them."""
    found = [
        allowed(
            answer[min(scheduled.output_position + i, len(answer) - 1)],
            mask_of(masks, scheduled.request_id, i),
        )
        for i in range(scheduled.sample)
    ]
    return found[: scheduled.num_kept(found)]


def allowed(token_id: int, mask: bytes | None) -> int:
    if mask is None or mask[token_id >> 3] >> (token_id & 7) & 1:
        return token_id
    others = [i for i in range(8 * len(mask)) if mask[i >> 3] >> (i & 7) & 1]
    visible = next((i for i in others if i > ord(" ")), others[0])
    return next((i for i in ENDS if i in others), visible)


def scripted_parts(
    script: Callable[[str], str] | str,
    *,
    template: str = TEMPLATE,
    answer_format: AnswerFormat | None = None,
    **flags: Any,
) -> dict[str, Any]:
    """The arguments of an ``Api`` whose model says ``script``, and which has ``template``."""
    compiled = ChatTemplate(template, source="the test")
    return {
        "runner": ScriptedRunner((lambda _: script) if isinstance(script, str) else script),
        "template": compiled,
        "answer_format": answer_format or choose_answer_format(compiled, **flags),
    }


def scripted(script: Callable[[str], str] | str, **options: Any) -> Api:
    """An ``Api`` of ``scripted_parts``."""
    return Api(**scripted_parts(script, **options))


async def assert_refused(fields: Mapping[str, Any], param: str, message: str) -> None:
    """A chat with these fields is a 400 that names ``param``, and leaves nothing behind."""
    async with scripted("ok").running() as api:
        answer = await api.chat(**fields)
        assert api.engine.is_idle
    assert answer.status == 400
    assert answer.error["param"] == param
    assert message in answer.error["message"]
