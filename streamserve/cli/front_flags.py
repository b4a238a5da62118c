"""Flags of the HTTP front that few need: request logs, TLS, a prefix, limits."""

from __future__ import annotations

import argparse
import json
import ssl
from collections.abc import Sequence
from typing import Any

from streamserve.cli.logs import LOG_FORMATS
from streamserve.cli.values import count, integer, number, size

UVICORN_LOG_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")


def add_front_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("HTTP, further")
    group.add_argument(
        "--config",
        metavar="FILE",
        help="a YAML file with flags by name; those of the command line override it",
    )
    group.add_argument(
        "--enable-log-requests",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="log a line when a request is admitted and one when it has ended (default: off)",
    )
    group.add_argument(
        "--disable-log-requests",
        action="store_false",
        dest="enable_log_requests",
        help="the same as --no-enable-log-requests",
    )
    group.add_argument(
        "--max-log-len",
        type=count,
        default=0,
        metavar="N",
        help="characters of each prompt in the request log (default: none)",
    )
    group.add_argument(
        "--response-role",
        default="assistant",
        metavar="ROLE",
        help="the role that chat answers have (default: %(default)s)",
    )
    group.add_argument(
        "--root-path",
        default="",
        metavar="PATH",
        help="the prefix under which a proxy shows this server",
    )
    group.add_argument("--ssl-keyfile", metavar="FILE", help="the key of --ssl-certfile")
    group.add_argument("--ssl-certfile", metavar="FILE", help="serve HTTPS with this certificate")
    group.add_argument("--ssl-ca-certs", metavar="FILE", help="who may sign clients' certificates")
    group.add_argument(
        "--ssl-cert-reqs",
        type=integer,
        choices=[mode.value for mode in ssl.VerifyMode],
        default=ssl.CERT_NONE.value,
        help="clients' certificates: 0: none, 1: optional, 2: required (default: 0)",
    )
    group.add_argument("--ssl-ciphers", metavar="LIST", help="as OpenSSL names them")
    group.add_argument(
        "--uvicorn-log-level",
        choices=UVICORN_LOG_LEVELS,
        default="warning",
        help="what the HTTP server itself logs (default: %(default)s)",
    )
    group.add_argument(
        "--allowed-methods",
        nargs="+",
        action=JsonListAction,
        default=["GET", "POST", "DELETE"],
        metavar="METHOD",
        help="CORS: methods that a browser may use (default: GET POST DELETE)",
    )
    group.add_argument(
        "--allowed-headers",
        nargs="+",
        action=JsonListAction,
        default=["*"],
        metavar="HEADER",
        help="CORS: headers that a browser may send (default: *)",
    )
    group.add_argument(
        "--max-stored-responses",
        type=count,
        default=1024,
        metavar="N",
        help="responses of /v1/responses that are kept in memory, the oldest go first; 0: none "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--stored-responses-memory",
        type=size,
        default="64MiB",
        metavar="SIZE",
        help="what these may take together (default: %(default)s)",
    )
    group.add_argument(
        "--sse-keep-alive-interval",
        type=number,
        default=15.0,
        metavar="S",
        help="seconds of silence after which a stream gets a comment (default: %(default)s)",
    )
    group.add_argument(
        "--h11-max-incomplete-event-size",
        type=integer,
        default=64 * 2**10,
        metavar="BYTES",
        help="of a request's headers (default: %(default)s)",
    )
    _add_limit_flags(group)
    _add_operator_flags(parser.add_argument_group("operators"))


def _add_limit_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-body-bytes",
        type=integer,
        default=16 * 2**20,
        metavar="BYTES",
        help="of a request's body (default: %(default)s)",
    )
    group.add_argument(
        "--max-connections",
        type=integer,
        default=4096,
        metavar="N",
        help="open at the same time; beyond, an idle one is closed or the new one gets 503 "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--receive-timeout",
        type=number,
        default=60.0,
        metavar="S",
        help="seconds in which a request's headers and body must arrive (default: %(default)s)",
    )
    group.add_argument(
        "--timeout-keep-alive",
        type=number,
        default=75.0,
        metavar="S",
        help="seconds after which an idle connection is closed (default: %(default)s)",
    )


def _add_operator_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--admin-port",
        type=integer,
        metavar="PORT",
        help="serve /metrics, /version and /debug there, and no longer on --port; /health, /live "
        "and /ready are on both",
    )
    group.add_argument(
        "--admin-host",
        default="127.0.0.1",
        metavar="HOST",
        help="where --admin-port listens (default: %(default)s)",
    )
    group.add_argument(
        "--log-format",
        choices=LOG_FORMATS,
        default="text",
        help="of what goes to stderr: json is one object a line (default: %(default)s)",
    )
    group.add_argument(
        "--otlp-traces-endpoint",
        metavar="URL",
        help="send OpenTelemetry traces there, over HTTP (needs the extra otel; default: none)",
    )
    group.add_argument("--no-metrics", action="store_true", help="serve no /metrics")
    group.add_argument(
        "--disable-fastapi-docs",
        action="store_true",
        help="serve neither /docs nor /openapi.json (vLLM's name)",
    )
    group.add_argument(
        "--enable-fault-injection",
        action="store_true",
        help="for tests: POST /debug/inject_fault makes steps fail, come late or run out of memory",
    )
    group.add_argument(
        "--hang-timeout",
        type=number,
        default=60.0,
        metavar="S",
        help="seconds after which a step that does not end makes /live answer 503 "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--stream-buffer",
        type=integer,
        default=128 * 2**10,
        metavar="BYTES",
        help="what a stream may hold for a slow reader, its socket's buffer included, before "
        "nothing more is generated for it (default: %(default)s)",
    )
    group.add_argument(
        "--stream-stall-timeout",
        type=number,
        default=60.0,
        metavar="S",
        help="seconds that a reader may leave its connection full before its stream ends with an "
        "error (default: %(default)s)",
    )
    group.add_argument(
        "--stream-resume-timeout",
        type=number,
        default=60.0,
        metavar="S",
        help="seconds that an answer which may be resumed goes on, and is kept, without a reader "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--stream-replay-bytes",
        type=integer,
        default=2**20,
        metavar="BYTES",
        help="what such an answer keeps of its text (default: %(default)s)",
    )


class JsonListAction(argparse.Action):
    """For lists that may be written as words or, as in vLLM, as one JSON array."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        words: Sequence[Any] = values
        if len(words) == 1 and words[0].startswith("["):
            try:
                words = json.loads(words[0])
            except ValueError as error:
                parser.error(f"{option_string} must be words or a JSON array: {error}")
            if not all(isinstance(word, str) for word in words):
                parser.error(f"{option_string} must be an array of strings, got {values[0]}")
        setattr(namespace, self.dest, list(words))
