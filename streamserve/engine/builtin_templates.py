"""Chat templates for checkpoints that come without one, by family.

Each is what the family's authors publish for their chat models; a base model, which was never
taught turns, gets the plain ``User:``/``Assistant:`` dialogue that it has seen in its training.
"""

from __future__ import annotations

from collections.abc import Callable

LLAMA2 = """\
{% if messages and messages[0]['role'] == 'system' %}\
{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}\
{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}\
{% for message in turns %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}\
{% endif %}\
{% if message['role'] == 'user' %}\
{% set content = message['content'].strip() %}\
{% if loop.first and system %}\
{% set content = '<<SYS>>\\n' ~ system.strip() ~ '\\n<</SYS>>\\n\\n' ~ content %}\
{% endif %}\
{{ bos_token ~ '[INST] ' ~ content ~ ' [/INST]' }}\
{% else %}{{ ' ' ~ message['content'].strip() ~ ' ' ~ eos_token }}{% endif %}\
{% endfor %}"""

MISTRAL = """\
{% if messages and messages[0]['role'] == 'system' %}\
{% set system = messages[0]['content'] ~ '\\n\\n' %}{% set turns = messages[1:] %}\
{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}\
{{ bos_token }}\
{% for message in turns %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}\
{% endif %}\
{% if message['role'] == 'user' %}\
{{ '[INST] ' ~ (system if loop.first else '') ~ message['content'] ~ ' [/INST]' }}\
{% else %}{{ ' ' ~ message['content'] ~ eos_token }}{% endif %}\
{% endfor %}"""

# Since the tokenizer's version 7: Mistral Small 3 and later.
MISTRAL7 = """\
{{ bos_token }}\
{% for message in messages %}\
{% if message['role'] == 'user' %}{{ '[INST]' ~ message['content'] ~ '[/INST]' }}\
{% elif message['role'] == 'system' %}\
{{ '[SYSTEM_PROMPT]' ~ message['content'] ~ '[/SYSTEM_PROMPT]' }}\
{% else %}{{ message['content'] ~ eos_token }}{% endif %}\
{% endfor %}"""

LLAMA3 = """\
{{ bos_token }}\
{% for message in messages %}\
{{ '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' }}\
{{ message['content'].strip() ~ '<|eot_id|>' }}\
{% endfor %}\
{% if add_generation_prompt %}\
{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\
{% endif %}"""

CHATML = """\
{% for message in messages %}\
{{ '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>\\n' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# Qwen 1's own code says this where nobody has said anything.
QWEN = (
    """\
{% if messages and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}\
{% endif %}"""
    + CHATML
)

PHI3 = """\
{% for message in messages %}\
{{ '<|' ~ message['role'] ~ '|>\\n' ~ message['content'] ~ '<|end|>\\n' }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

PHI = """\
{% for message in messages %}\
{% if message['role'] == 'assistant' %}{{ 'Output: ' ~ message['content'] ~ '\\n' }}\
{% elif message['role'] == 'user' %}{{ 'Instruct: ' ~ message['content'] ~ '\\n' }}\
{% else %}{{ message['content'] ~ '\\n' }}{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}{{ 'Output:' }}{% endif %}"""

CHATGLM2 = """\
{{ '[gMASK]sop' }}\
{% set counter = namespace(rounds=0) %}\
{% for message in messages %}\
{% if message['role'] == 'user' %}\
{% set counter.rounds = counter.rounds + 1 %}\
{{ '[Round ' ~ counter.rounds ~ ']\\n\\n问：' ~ message['content'] ~ '\\n\\n答：' }}\
{% else %}{{ message['content'] ~ '\\n\\n' }}{% endif %}\
{% endfor %}"""

CHATGLM3 = """\
{{ '[gMASK]sop' }}\
{% for message in messages %}\
{% set role = 'observation' if message['role'] == 'tool' else message['role'] %}\
{{ '<|' ~ role ~ '|>\\n ' ~ message['content'] }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

GLM4 = """\
{{ '[gMASK]<sop>' }}\
{% for message in messages %}\
{% set role = 'observation' if message['role'] == 'tool' else message['role'] %}\
{{ '<|' ~ role ~ '|>\\n' ~ message['content'] }}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

BAICHUAN = """\
{% for message in messages %}\
{% if message['role'] == 'user' %}{{ '<reserved_106>' ~ message['content'] }}\
{% elif message['role'] == 'assistant' %}{{ '<reserved_107>' ~ message['content'] }}\
{% else %}{{ message['content'] }}{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}{{ '<reserved_107>' }}{% endif %}"""

# The same turns under other numbers: the tokens are 195 and 196 of either vocabulary.
BAICHUAN1 = BAICHUAN.replace("reserved_106", "reserved_102").replace("reserved_107", "reserved_103")

PLAIN = """\
{% for message in messages %}\
{% if message['role'] == 'assistant' %}{{ 'Assistant: ' ~ message['content'] ~ '\\n' }}\
{% elif message['role'] == 'user' %}{{ 'User: ' ~ message['content'] ~ '\\n' }}\
{% else %}{{ message['content'] ~ '\\n\\n' }}{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

TEMPLATES = {
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "mistral7": MISTRAL7,
    "chatml": CHATML,
    "qwen": QWEN,
    "phi3": PHI3,
    "phi": PHI,
    "chatglm2": CHATGLM2,
    "chatglm3": CHATGLM3,
    "glm4": GLM4,
    "baichuan": BAICHUAN,
    "baichuan1": BAICHUAN1,
    "plain": PLAIN,
}

# A template whose control tokens the vocabulary lacks would be read as so much punctuation.
_BY_CONTROL_TOKEN = (
    ("<|im_start|>", "chatml"),
    ("<|start_header_id|>", "llama3"),
    ("<|end|>", "phi3"),
    ("[SYSTEM_PROMPT]", "mistral7"),
)
_BY_MODEL_TYPE = {
    "llama": "llama2",
    "mistral": "mistral",
    "mixtral": "mistral",
    "phi": "phi",
}
_BAICHUAN_USER = 195
"""The id of who asks: `user_token_id` in the generation configs of both generations."""


def builtin_template_name(model_type: str | None, token_id: Callable[[str], int | None]) -> str:
    """Choose one of ``TEMPLATES`` for a checkpoint's ``model_type`` and vocabulary."""

    def has(token: str) -> bool:
        return token_id(token) is not None

    if model_type == "qwen" and has("<|im_start|>"):
        return "qwen"
    if model_type == "chatglm":
        return "glm4" if has("<sop>") else "chatglm3" if has("<|user|>") else "chatglm2"
    if model_type == "baichuan" and token_id("<reserved_102>") == _BAICHUAN_USER:
        return "baichuan1"
    if has("<reserved_106>"):
        return "baichuan"
    for token, name in _BY_CONTROL_TOKEN:
        if has(token):
            return name
    return _BY_MODEL_TYPE.get(model_type or "", "plain")
