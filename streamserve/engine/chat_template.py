"""Messages to one prompt, by the checkpoint's own Jinja template, as transformers renders it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from streamserve.engine.builtin_templates import TEMPLATES, builtin_template_name
from streamserve.engine.tame_templates import is_tame
from streamserve.engine.template_turns import Message, TemplateTurns
from streamserve.engine.tokenizer import read_json
from streamserve.errors import ConfigError, InvalidParameterError, ModelLoadError

_CONTINUE_MARK = "CONTINUE_FINAL_MESSAGE_TAG "


class ChatTemplate:
    """One checkpoint's chat template, compiled. ``render`` may be called from any thread.

    ``source`` says where it comes from; ``is_builtin`` that the checkpoint had none, which is
    worth a warning. ``template`` may be several by name, as some checkpoints have: ``tool_use`` is
    then taken for requests with tools. ``text`` is all of it, ``variables`` are the names it reads,
    ``is_tame`` says that a short chat is certain to be rendered in a short time,
    ``trusts_requests`` that a request may bring a template of its own, ``trusts_messages`` that
    special tokens in users' words are what they say.
    """

    def __init__(
        self,
        template: str | Mapping[str, str],
        *,
        special_tokens: Mapping[str, str] | None = None,
        source: str,
        is_builtin: bool = False,
        trusts_requests: bool = False,
        trusts_messages: bool = False,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        """Raises ``ModelLoadError`` naming ``source`` if a template is not valid Jinja."""
        self.source = source
        self.is_builtin = is_builtin
        self.trusts_requests = trusts_requests
        self.trusts_messages = trusts_messages
        self._special_tokens = dict(special_tokens or {})
        environment = _environment(now)
        named = {"default": template} if isinstance(template, str) else dict(template)
        if not named:
            raise ModelLoadError(f"{source} holds no chat template")
        try:
            self._templates = {name: environment.from_string(t) for name, t in named.items()}
        except jinja2.TemplateError as error:
            raise ModelLoadError(
                f"the chat template of {source} cannot be read: {error}"
            ) from error
        parsed = [environment.parse(source_text) for source_text in named.values()]
        self.text = "\n".join(named.values())
        self.variables = frozenset(
            name for tree in parsed for name in meta.find_undeclared_variables(tree)
        )
        self.is_tame = all(is_tame(tree) for tree in parsed)
        self._turns = {name: self._turns_of(name) for name in self._templates}

    @classmethod
    def from_directory(
        cls,
        path: str | Path,
        *,
        override: str | Path | None = None,
        special_tokens: Mapping[str, str] | None = None,
        token_id: Callable[[str], int | None] = lambda token: None,
    ) -> ChatTemplate:
        """Find a checkpoint's template: ``override`` (a file, a built-in's name, or the template
        itself), ``chat_template.jinja``, ``chat_template.json``, ``tokenizer_config.json``, or the
        built-in one of its family.

        ``special_tokens`` and ``token_id`` are the tokenizer's. Raises ``ModelLoadError`` or,
        for ``override``, ``ConfigError``.
        """
        directory = Path(path)
        if override is not None:
            return cls.given(override, special_tokens=special_tokens)
        for read in (_from_jinja_files, _from_template_json, _from_tokenizer_config):
            found = read(directory)
            if found is not None:
                template_found, source = found
                return cls(template_found, special_tokens=special_tokens, source=source)
        model_type = read_json(directory / "config.json").get("model_type")
        name = builtin_template_name(model_type, token_id)
        return cls.builtin(name, special_tokens=special_tokens)

    @classmethod
    def given(
        cls, override: str | Path, *, special_tokens: Mapping[str, str] | None = None
    ) -> ChatTemplate:
        """A file, a built-in one's name, or the template itself. Raises as ``from_directory``."""
        template, source = _override(override)
        return cls(template, special_tokens=special_tokens, source=source)

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        source: str,
        *,
        override: str | Path | None = None,
        special_tokens: Mapping[str, str] | None = None,
        model_type: str | None = None,
        token_id: Callable[[str], int | None] = lambda token: None,
    ) -> ChatTemplate:
        """As ``from_directory``, of a ``tokenizer_config.json`` that was read from ``source``."""
        if override is not None:
            return cls.given(override, special_tokens=special_tokens)
        found = _named_templates(config.get("chat_template"))
        if found is not None:
            return cls(found, special_tokens=special_tokens, source=source)
        name = builtin_template_name(model_type, token_id)
        return cls.builtin(name, special_tokens=special_tokens)

    @classmethod
    def builtin(cls, name: str, *, special_tokens: Mapping[str, str] | None = None) -> ChatTemplate:
        """One of ``builtin_templates.TEMPLATES``. Raises ``ConfigError`` for another name."""
        if name not in TEMPLATES:
            raise ConfigError(
                f"chat_template must be one of {', '.join(TEMPLATES)} or a file, got {name!r}"
            )
        return cls(
            TEMPLATES[name],
            special_tokens={"bos_token": "", "eos_token": "", **(special_tokens or {})},
            source=f"built-in {name}",
            is_builtin=True,
        )

    def render(
        self,
        messages: Sequence[Message],
        /,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """Return the prompt; encode it without special tokens, the template writes its own.

        ``continue_final_message`` leaves the last message open for the model to go on. What the
        template would refuse or leave out is said in turns that it shows (``TemplateTurns``);
        text parts are joined by newlines where it expects a string. ``kwargs`` reach the template
        (``enable_thinking`` and the like). ``chat_template`` is the request's, in place of this
        one.

        Raises ``InvalidParameterError`` with the template's own message if it refuses the
        messages, and for a ``chat_template`` that is not trusted or not Jinja.
        """
        if chat_template is not None:
            return self._of_request(chat_template).render(
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                **kwargs,
            )
        if add_generation_prompt and continue_final_message:
            raise InvalidParameterError(
                "add_generation_prompt and continue_final_message cannot both be true",
                param="continue_final_message",
            )
        name = self._name_for(tools is not None)
        shown = self._turns[name].fit(messages)
        if continue_final_message:
            _mark_end(shown)
        text = self._render(name, shown, tools, add_generation_prompt, kwargs)
        return _cut_at_mark(text) if continue_final_message else text

    def _of_request(self, text: str) -> ChatTemplate:
        if not self.trusts_requests:
            raise InvalidParameterError(
                "chat_template is not supported: the server was started without"
                " --trust-request-chat-template",
                param="chat_template",
                code="unsupported_parameter",
            )
        try:
            return ChatTemplate(text, special_tokens=self._special_tokens, source="the request")
        except ModelLoadError as error:
            raise InvalidParameterError(str(error), param="chat_template") from error

    def _name_for(self, has_tools: bool) -> str:
        templates = self._templates
        if has_tools and "tool_use" in templates:
            return "tool_use"
        return "default" if "default" in templates else next(iter(templates))

    def _render(
        self,
        name: str,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        kwargs: Mapping[str, Any],
    ) -> str:
        context = {
            **self._special_tokens,
            **kwargs,
            "messages": messages,
            "tools": None if tools is None else list(tools),
            "documents": kwargs.get("documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._templates[name].render(context)
        except jinja2.TemplateError as error:
            raise InvalidParameterError(str(error), param="messages") from error
        except Exception as error:  # a template that meets a shape it does not expect
            raise InvalidParameterError(
                f"the chat template cannot render these messages: {error}", param="messages"
            ) from error

    def _turns_of(self, name: str) -> TemplateTurns:
        def render(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> str:
            return self._render(name, messages, tools, True, {})

        return TemplateTurns.of(render)


class _GenerationTag(Extension):
    """``{% generation %}`` marks what the assistant says, for training: here it means nothing."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up: templates are the checkpoint's, not to be trusted."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _mark_end(messages: list[dict[str, Any]]) -> None:
    """Put a mark behind the last message, to find in the rendered text where it ends."""
    content = messages[-1].get("content") if messages else None
    if isinstance(content, str):
        messages[-1]["content"] = content + _CONTINUE_MARK
        return
    for n, part in reversed(list(enumerate(content or ()))):
        if "text" in part:
            parts = list(content or ())
            parts[n] = {**part, "text": part["text"] + _CONTINUE_MARK}
            messages[-1]["content"] = parts
            return
    raise InvalidParameterError(
        "continue_final_message needs a last message with text", param="continue_final_message"
    )


def _cut_at_mark(text: str) -> str:
    end = text.rfind(_CONTINUE_MARK.strip())
    if end < 0:
        raise InvalidParameterError(
            "continue_final_message cannot be served: the chat template leaves out or changes the "
            "last message",
            param="continue_final_message",
        )
    if text.startswith(_CONTINUE_MARK, end):
        return text[:end]
    return text[:end].rstrip()  # the template strips its messages


def _override(override: str | Path) -> tuple[str | Mapping[str, str], str]:
    text = str(override)
    if text in TEMPLATES:
        return TEMPLATES[text], f"built-in {text}"
    if isinstance(override, str) and ("{%" in text or "{{" in text):
        return text, "--chat-template"
    file = Path(override).expanduser()
    if not file.is_file():
        raise ConfigError(
            f"--chat-template must be a file or one of {', '.join(TEMPLATES)}, got {text!r}"
        )
    if file.suffix == ".json":
        named = _named_templates(read_json(file).get("chat_template"))
        if named is None:
            raise ConfigError(f'--chat-template {file} holds no "chat_template"')
        return named, str(file)
    return _read_text(file), str(file)


def _from_jinja_files(directory: Path) -> tuple[str | Mapping[str, str], str] | None:
    file = directory / "chat_template.jinja"
    named = {
        f.stem: _read_text(f) for f in sorted(directory.glob("additional_chat_templates/*.jinja"))
    }
    if file.is_file():
        named["default"] = _read_text(file)
    return (named, file.name) if named else None


def _from_template_json(directory: Path) -> tuple[str | Mapping[str, str], str] | None:
    named = _named_templates(read_json(directory / "chat_template.json").get("chat_template"))
    return None if named is None else (named, "chat_template.json")


def _from_tokenizer_config(directory: Path) -> tuple[str | Mapping[str, str], str] | None:
    named = _named_templates(read_json(directory / "tokenizer_config.json").get("chat_template"))
    return None if named is None else (named, "tokenizer_config.json")


def _named_templates(value: Any) -> str | Mapping[str, str] | None:
    if isinstance(value, list):  # [{"name": …, "template": …}, …]
        return {entry["name"]: entry["template"] for entry in value}
    return value or None


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{file} cannot be read: {error}") from error
