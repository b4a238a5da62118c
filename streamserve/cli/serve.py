"""``streamserve serve``: bind the port, load the model, listen, and say so."""

from __future__ import annotations

import ssl
import sys
import time
from argparse import Namespace
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import orjson

from streamserve import __version__
from streamserve.cli.args import check_flags, model_name, scheduling_policy
from streamserve.cli.environment import (
    api_key_of_environment,
    unread_vllm_variables,
    whole_text,
)
from streamserve.cli.logs import set_up_logs
from streamserve.config import ApiConfig, StreamConfig, TlsConfig
from streamserve.errors import ConfigError
from streamserve.runner.memory import parse_bytes

if TYPE_CHECKING:
    from streamserve.api.app import ApiApp
    from streamserve.api.traces import RequestTraces
    from streamserve.core.plan import ModelRunner
    from streamserve.engine.chat_template import ChatTemplate
    from streamserve.engine.parsers.answer_format import AnswerFormat


def run_serve(args: Namespace) -> int:
    """Serve until a signal. Returns the exit code; raises ``StreamServeError``."""
    started = time.monotonic()
    # Before torch is imported and a model is loaded: a port in use is known in a moment.
    from streamserve.api.chat_request import read_template_kwargs
    from streamserve.api.server import bind_admin_sockets, bind_sockets, serve

    config = api_config(args)
    check_flags(args)
    read_template_kwargs("--default-chat-template-kwargs", args.default_chat_template_kwargs)
    set_up_logs(args.log_format, log_requests=config.log_requests)
    sockets = bind_sockets(config)
    admin_sockets = bind_admin_sockets(config)
    with ExitStack() as stack:
        for sock in (*sockets, *admin_sockets):
            stack.callback(sock.close)
        say(f"streamserve {__version__}")
        if unread := unread_vllm_variables():
            say(f"of no effect here, in the environment: {', '.join(unread)}")
        traces = _traces(args)
        app = _build_app(args, config)
        app.context.request_log.traces = traces
        if traces is not None:
            stack.callback(traces.close)

        def ready(url: str) -> None:
            say(f"ready in {time.monotonic() - started:.1f} s: {url}")
            for sock in admin_sockets[:1]:
                say(f"for operators: {config.admin_host}:{sock.getsockname()[1]}")
            say(_curl_line(url, config))
            if config.has_pages:
                say(f"or open {url} in a browser")

        def draining(num_requests: int) -> None:
            answers = "answer" if num_requests == 1 else "answers"
            say(f"finishing {num_requests} {answers}; Ctrl-C again to stop at once")

        serve(
            app,
            config,
            sockets=sockets,
            admin_sockets=admin_sockets,
            on_ready=ready,
            on_draining=draining,
        )
    say("stopped")
    return 0


def _traces(args: Namespace) -> RequestTraces | None:
    if args.otlp_traces_endpoint is None:
        return None
    from streamserve.api.traces import traces_to
    from streamserve.core.clock import monotonic

    return traces_to(args.otlp_traces_endpoint, monotonic, time.time)


def _build_app(args: Namespace, config: ApiConfig) -> ApiApp:
    from streamserve.api.app import create_app
    from streamserve.cli.compose import build_service
    from streamserve.engine.fault_injection import FaultInjectingRunner
    from streamserve.engine.garbage import freeze_gc
    from streamserve.engine.preprocess import Preprocessor

    faults: list[FaultInjectingRunner] = []
    formats: list[AnswerFormat] = []

    def observed(runner: ModelRunner) -> ModelRunner:
        if not args.enable_fault_injection:
            return runner
        warn("faults can be injected: POST /debug/inject_fault")
        faults.append(FaultInjectingRunner(runner))
        return faults[0]

    service = build_service(
        args,
        say=say,
        warn=warn,
        observed=observed,
        on_template=lambda template: formats.append(_answer_format(args, template)),
    )
    app = create_app(
        engine=service.engine,
        preprocessor=Preprocessor(service.tokenizer, service.chat_template),
        tokenizer=service.tokenizer,
        config=config,
        max_model_len=service.max_model_len,
        generation_config=service.sampling_defaults,
        load_text=service.text_source,
        answer_format=formats[0],
        embedding=service.embedding,
        faults=faults[0] if faults else None,
        adapters=service.adapters,
    )
    freeze_gc()
    return app


def _answer_format(args: Namespace, template: ChatTemplate) -> AnswerFormat:
    from streamserve.engine.parsers.answer_format import choose_answer_format

    chosen = choose_answer_format(
        template,
        tool_parser=args.tool_call_parser,
        reasoning_parser=args.reasoning_parser,
        enable_auto_tool_choice=args.enable_auto_tool_choice,
        template_defaults=args.default_chat_template_kwargs,
    )
    if unread := [name for name in chosen.template_defaults if name not in template.variables]:
        warn(f"--default-chat-template-kwargs: the template does not read {', '.join(unread)}")
    for what, parser in (
        ("tool calls", chosen.tool_parser),
        ("reasoning", chosen.reasoning_parser),
    ):
        if parser is not None:
            say(f"  {what:<13} {parser}")
    return chosen


def _curl_line(url: str, config: ApiConfig) -> str:
    has_keys = config.api_keys or config.api_key_file
    key = " -H 'Authorization: Bearer YOUR_KEY'" if has_keys else ""
    body = {
        "model": config.served_model_names[0],
        "stream": True,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    }
    return (
        f"try: curl -N {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n"
        f"     -d '{orjson.dumps(body).decode()}'"
    )


def api_config(args: Namespace) -> ApiConfig:
    """Return the front's config. Raises ``ConfigError``."""
    from streamserve.api.tenants import KeyRing

    keys = args.api_key
    if keys is None:
        key = api_key_of_environment()
        keys = [] if key is None else [key]
    if "" in keys:
        raise ConfigError("--api-key must not be empty")
    if args.api_key_file is not None:
        # What is wrong with it is known before a model is loaded.
        KeyRing(keys, args.api_key_file)
    names = map(whole_text, args.served_model_name or [model_name(args)])
    return ApiConfig(
        served_model_names=tuple(names),
        host=args.host,
        port=args.port,
        api_keys=tuple(keys),
        api_key_file=args.api_key_file,
        allowed_origins=tuple(args.allowed_origins),
        allow_credentials=args.allow_credentials,
        strict_fields=args.strict_fields,
        honours_priority=scheduling_policy(args) in {"priority", "fair"},
        drain_timeout_s=args.drain_timeout,
        streams=StreamConfig(
            max_buffer_bytes=args.stream_buffer,
            stall_timeout_s=args.stream_stall_timeout,
            resume_timeout_s=args.stream_resume_timeout,
            max_replay_bytes=args.stream_replay_bytes,
        ),
        allowed_methods=tuple(args.allowed_methods),
        allowed_headers=tuple(args.allowed_headers),
        root_path=args.root_path.rstrip("/"),
        tls=_tls_config(args),
        uvicorn_log_level=args.uvicorn_log_level,
        response_role=args.response_role,
        log_requests=args.enable_log_requests,
        max_logged_characters=args.max_log_len,
        ping_interval_s=args.sse_keep_alive_interval,
        max_header_bytes=args.h11_max_incomplete_event_size,
        has_pages=not args.no_ui,
        has_docs=not args.disable_fastapi_docs,
        has_metrics=not args.no_metrics,
        admin_host=args.admin_host,
        admin_port=args.admin_port,
        hang_timeout_s=args.hang_timeout,
        max_body_bytes=args.max_body_bytes,
        max_connections=args.max_connections,
        receive_timeout_s=args.receive_timeout,
        keep_alive_timeout_s=args.timeout_keep_alive,
        updates_adapters=args.allow_runtime_lora_updating,
        max_stored_responses=args.max_stored_responses,
        stored_responses_memory_bytes=parse_bytes(args.stored_responses_memory),
    )


def _tls_config(args: Namespace) -> TlsConfig | None:
    if args.ssl_certfile is None:
        for name in ("ssl_keyfile", "ssl_ca_certs", "ssl_ciphers"):
            if getattr(args, name) is not None:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} must be given with --ssl-certfile")
        return None
    # What is wrong with them is known before a model is loaded.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(args.ssl_certfile, args.ssl_keyfile)
        if args.ssl_ca_certs is not None:
            context.load_verify_locations(args.ssl_ca_certs)
        if args.ssl_ciphers is not None:
            context.set_ciphers(args.ssl_ciphers)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"--ssl-certfile {args.ssl_certfile!r}: {error}") from error
    return TlsConfig(
        certfile=args.ssl_certfile,
        keyfile=args.ssl_keyfile,
        ca_certs=args.ssl_ca_certs,
        cert_reqs=args.ssl_cert_reqs,
        **({} if args.ssl_ciphers is None else {"ciphers": args.ssl_ciphers}),
    )


def say(line: str) -> None:
    """Print a line at once, also into a pipe, and even if nobody reads it any more."""
    with suppress(BrokenPipeError):
        print(line, flush=True)


def warn(line: str) -> None:
    """Print a line that should not be missed."""
    print(f"warning: {line}", file=sys.stderr, flush=True)
