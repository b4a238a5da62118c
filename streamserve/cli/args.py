"""The command line: flags named as in vLLM where the meaning is the same."""

from __future__ import annotations

import argparse
import difflib
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NoReturn

from streamserve import __version__
from streamserve.cli.config_file import config_flags, split_config_flag
from streamserve.cli.device_flags import GPU_DEFAULTS, default_text
from streamserve.cli.environment import whole_text
from streamserve.cli.front_flags import JsonListAction, add_front_flags
from streamserve.cli.lora_flags import adapter_config, add_lora_flags, add_lora_serving_flags
from streamserve.cli.peer_flags import add_peer_flags
from streamserve.cli.quantization import QUANTIZATIONS, STORED_METHODS, check_quantization
from streamserve.cli.source_flags import add_seed_flag, add_source_flags
from streamserve.cli.speculative import speculative_config
from streamserve.cli.spelling import usual_spelling
from streamserve.cli.tools import add_tool_commands
from streamserve.cli.values import (
    gibibytes,
    integer,
    json_object,
    milliseconds,
    number,
    positive,
    size,
    tokens,
)
from streamserve.cli.vllm_flags import add_foreign_flags
from streamserve.config import POLICIES, POOLING_KINDS
from streamserve.engine.builtin_templates import TEMPLATES
from streamserve.errors import ConfigError

DTYPES = ("auto", "float32", "float", "bfloat16", "float16", "half")
LOAD_FORMATS = ("auto", "safetensors", "pt", "gguf", "dummy")
TOOL_CALL_PARSERS = (
    *("hermes", "llama3_json", "mistral", "glm4", "phi4_mini_json", "qwen3_coder", "seed_oss"),
    *("glm45", "minimax_m2", "kimi_k2", "deepseek_v3", "deepseek_v31", "lfm2", "pythonic", "olmo3"),
    *("gemma4", "cohere", "openai", "glm47", "qwen3_xml", "llama4_json", "llama4_pythonic"),
)
REASONING_PARSERS = (
    *("qwen3", "deepseek_r1", "openai_gptoss", "mistral", "seed_oss", "gemma4"),
    *("glm45", "deepseek_v3", "kimi_k2", "minimax_m2", "cohere"),
)
KV_CACHE_DTYPES = ("auto", "fp8")
_LOAD_FORMATS_OF_VLLM = {
    **dict.fromkeys(("hf", "bitsandbytes"), "auto"),
    **dict.fromkeys(("fastsafetensors", "runai_streamer"), "safetensors"),
}

_EXAMPLES = """examples:
  streamserve serve                       the model in the box, on http://127.0.0.1:8000
  streamserve serve ./my-llama --port 9000 --max-model-len 4096
  streamserve chat                        talk to the model in the box, no server needed
  streamserve chat --url http://127.0.0.1:8000
"""


class CommandParser(argparse.ArgumentParser):
    """Says what is wrong in one line: the usage of a command with a hundred flags hides it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; `{self.prog} --help` lists the flags\n")

    def parse(self, argv: Sequence[str]) -> Namespace:
        """As ``parse_args``, and what nobody knows is said with what may have been meant."""
        args, unknown = self.parse_known_args(argv)
        if unknown:
            self.commands.get(getattr(args, "command", ""), self).refuse(unknown)
        return args

    def refuse(self, words: Sequence[str]) -> NoReturn:
        """End the process with an error about words that are no flags."""
        flag = words[0].partition("=")[0]
        ours = [
            name
            for name, action in self._option_string_actions.items()
            if action.help != argparse.SUPPRESS
        ]
        meant = difflib.get_close_matches(flag, ours, 1, cutoff=0.75)
        hint = f" (did you mean {meant[0]}?)" if meant else ""
        self.error(f"unrecognized arguments: {' '.join(words)}{hint}")

    commands: Mapping[str, CommandParser] = MappingProxyType({})
    """By their names."""


def build_parser() -> CommandParser:
    """Return the parser of the whole command line."""
    parser = CommandParser(
        prog="streamserve",
        description="A low-latency streaming chat server for open-weight language models.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"streamserve {__version__}")
    commands = parser.add_subparsers(
        dest="command",
        metavar="COMMAND",
        required=True,
        parser_class=CommandParser,
    )

    serve = commands.add_parser(
        "serve",
        help="serve a model over an OpenAI-compatible HTTP API",
        description="Serves a model over OpenAI's and Anthropic's HTTP APIs, with a page to chat"
        " on. No flag is needed: docs/api.md lists them with what they do.",
        usage="%(prog)s [MODEL] [flags]",
        allow_abbrev=False,
    )
    add_model_flags(serve)
    add_engine_flags(serve)
    _add_http_flags(serve)
    add_front_flags(serve)
    add_lora_serving_flags(serve)
    add_seed_flag(serve)
    add_foreign_flags(serve)
    add_peer_flags(serve)

    chat = commands.add_parser(
        "chat",
        help="chat in the terminal",
        description="Chats in the terminal, with a model in this process or with a server's.",
        usage="%(prog)s [MODEL] [flags]",
        allow_abbrev=False,
    )
    add_model_flags(chat)
    add_engine_flags(chat)
    _add_chat_flags(chat)
    add_seed_flag(chat)

    add_tool_commands(commands)
    parser.commands = commands.choices
    return parser


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    # Its name may come as a flag as well: neither form may put its default over the other's value.
    parser.set_defaults(model=None)
    group = parser.add_argument_group("model")
    group.add_argument(
        "model",
        nargs="?",
        default=argparse.SUPPRESS,
        metavar="MODEL",
        help="a local Hugging Face directory, a GGUF file or a hub id (default: the small model in "
        "the box)",
    )
    group.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="auto, cpu, cuda or cuda:N; auto: a GPU if torch has one, else the CPU "
        "(default: auto)",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="weights and activations; auto on a GPU: float16 or bfloat16, as the checkpoint; on a "
        "CPU: bfloat16 where that is faster, else float32 (default: auto)",
    )
    group.add_argument(
        "--max-model-len",
        type=tokens,
        metavar="N",
        help="tokens of prompt and answer together (default: what the model was made for)",
    )
    group.add_argument(
        "--load-format",
        type=lambda text: _LOAD_FORMATS_OF_VLLM.get(text, text),
        choices=LOAD_FORMATS,
        default="auto",
        help="gguf: the GGUF file of a directory that holds others too; dummy: random weights from "
        "the config alone (default: auto)",
    )
    add_source_flags(group)
    group.add_argument(
        "--chat-template",
        metavar="FILE",
        help="a Jinja file in place of the checkpoint's, or the name of a format that is built in, "
        f"one of {', '.join(TEMPLATES)}",
    )
    group.add_argument(
        "--pooling",
        choices=POOLING_KINDS,
        help="what /v1/embeddings makes a vector of: the last token's hidden state, or the mean of "
        "all (default: as the checkpoint's sentence-transformers files say, else last)",
    )
    group.add_argument(
        "--quantization",
        "-q",
        metavar="METHOD",
        help=f"quantise the weights while they are loaded: {', '.join(QUANTIZATIONS)} "
        "(default: leave them as they are); a checkpoint that is quantised already "
        f"needs no flag, or its own: {', '.join(STORED_METHODS)}",
    )


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    add_lora_flags(parser)
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--max-num-seqs",
        type=positive,
        metavar="N",
        help=f"requests that generate at the same time {default_text('max_num_seqs')}",
    )
    group.add_argument(
        "--max-num-batched-tokens",
        type=tokens,
        metavar="N",
        help="tokens computed in one step, prompts and answers together "
        f"{default_text('max_num_batched_tokens')}",
    )
    group.add_argument(
        "--max-num-waiting",
        "--max-num-queued-reqs",
        type=positive,
        default=1024,
        metavar="N",
        help="requests that may queue before others get a 429 (default: %(default)s)",
    )
    group.add_argument(
        "--max-num-queued-tokens",
        type=tokens,
        default=2**20,
        metavar="N",
        help="tokens of their prompts, likewise (default: %(default)s)",
    )
    group.add_argument(
        "--scheduling-policy",
        choices=POLICIES,
        help="sjf: shortest uncached prompt first, with ageing; fcfs: first come, first served; "
        "priority: the request's `priority` field first, smaller is sooner; fair: shares per "
        "tenant by served tokens, within them by priority and as sjf (default: fair with several "
        "API keys, else sjf)",
    )
    group.add_argument(
        "--itl-target-ms",
        type=milliseconds,
        metavar="MS",
        help="how long a step may take while answers stream: prompts get what is left of it "
        "(default: twice what the step takes without prompts, more where first tokens would come "
        "late)",
    )
    group.add_argument(
        "--block-size",
        type=positive,
        metavar="N",
        help=f"tokens in one KV block {default_text('block_size')}",
    )
    group.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="share the KV cache of equal prefixes (default: on)",
    )
    group.add_argument(
        "--async-scheduling",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="queue the next step before the last one's tokens are known: no wait between steps,"
        " and a new prompt waits for one step more (default: on)",
    )
    group.add_argument(
        "-sc",
        "--speculative-config",
        metavar="JSON",
        help="draft tokens, where that is predicted to pay, by prompt lookup: "
        '{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 2, '
        '"prompt_lookup_max": 4}, by layers of the checkpoint that guess further tokens: '
        '{"method": "mtp"}, an EAGLE-3 head: {"method": "eagle3", "model": PATH}, or on a CPU a '
        'small model: {"method": "draft_model", "model": PATH, "num_speculative_tokens": 4}; the '
        "answers stay the same (default: none)",
    )
    for name, key, kind in (
        ("--spec-method", "method", str),
        ("--spec-model", "model", str),
        ("--spec-tokens", "num_speculative_tokens", int),
    ):
        group.add_argument(name, type=kind, help=f"--speculative-config's {key}, by itself")
    group.add_argument(
        "--disable-cascade-attn",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="let each request read its whole KV, also what others share with it",
    )
    group.add_argument(
        "--kv-cache-memory",
        "--kv-cache-memory-bytes",
        type=size,
        metavar="SIZE",
        help="memory for the KV cache, like 2GiB (default: on a GPU what "
        "--gpu-memory-utilization leaves, at most 8 times what max-num-seqs × max-model-len can "
        "use; on a CPU the least of 25%% of the free memory, 4GiB, and what these can use)",
    )
    group.add_argument(
        "--kv-cache-dtype",
        type=lambda text: "fp8" if text == "fp8_e4m3" else text,
        choices=KV_CACHE_DTYPES,
        default="auto",
        help="auto: as --dtype; fp8 holds twice as many tokens, on a GPU only (default: auto)",
    )
    group.add_argument(
        "--swap-space",
        type=gibibytes,
        metavar="SIZE",
        help="host memory for KV blocks that leave a GPU, like 16GiB (a number alone: GiB): they "
        "come back by a copy instead of being computed again (default: none); no effect on a CPU",
    )
    group.add_argument(
        "--gpu-memory-utilization",
        "--device-memory-utilization",
        type=number,
        metavar="F",
        help="share of a GPU's memory that may be in use, by others too (default: "
        f"{GPU_DEFAULTS.gpu_memory_utilization}); no effect on a CPU",
    )
    group.add_argument(
        "--enforce-eager",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="record no CUDA graphs: ready sooner, every step slower; no effect on a CPU",
    )
    group.add_argument(
        "--cuda-graph-sizes",
        "--cudagraph-capture-sizes",
        nargs="+",
        type=positive,
        metavar="N",
        help="numbers of decoding requests to record a CUDA graph for; others are padded to the "
        "next (default: a ladder up to max-num-seqs); no effect on a CPU",
    )
    group.add_argument(
        "--tensor-parallel-size",
        "-tp",
        type=positive,
        default=1,
        metavar="N",
        help="divide every layer among N GPUs of this machine, or N processes on a CPU; N must "
        "divide the model's heads and widths (default: %(default)s)",
    )


def _add_http_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("HTTP")
    group.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 to be reachable (default: %(default)s)"
    )
    group.add_argument("--port", type=integer, default=8000, help="(default: %(default)s)")
    group.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="the model's name in the API, and further names for it (default: MODEL)",
    )
    group.add_argument(
        "--api-key",
        nargs="+",
        metavar="KEY",
        help="require one of these as bearer token (default: STREAMSERVE_API_KEY or "
        "VLLM_API_KEY in the environment, else none)",
    )
    group.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="tenants by name, with their keys, weights and limits: docs/tenants.md; read again on "
        "SIGHUP and when it changes",
    )
    group.add_argument(
        "--default-chat-template-kwargs",
        type=json_object,
        default={},
        metavar="JSON",
        help="variables that the chat template gets where a request does not say them, like "
        "'{\"enable_thinking\": false}' (default: none)",
    )
    group.add_argument(
        "--trust-request-chat-template",
        action="store_true",
        help="render a request's chat_template in place of the checkpoint's (default: refuse it)",
    )
    group.add_argument(
        "--trust-message-special-tokens",
        action="store_true",
        help="special tokens written in messages act as such (default: only in the assistant's,"
        " elsewhere they are text)",
    )
    group.add_argument(
        "--shared-system-prompt",
        action="append",
        metavar="FILE",
        help="a system prompt whose cached prefix all API keys may share; may be repeated"
        " (default: they share nothing)",
    )
    group.add_argument(
        "--allowed-origins",
        nargs="+",
        action=JsonListAction,
        default=["*"],
        metavar="ORIGIN",
        help="CORS: origins that a browser may call from (default: *)",
    )
    group.add_argument(
        "--allow-credentials",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="CORS: let browsers send credentials (default: off)",
    )
    group.add_argument(
        "--strict-fields",
        action="store_true",
        help="refuse request fields that nobody knows (default: name them in X-Ignored-Fields)",
    )
    group.add_argument(
        "--tool-call-parser",
        choices=TOOL_CALL_PARSERS,
        help="how the model writes tool calls (default: what the chat template says)",
    )
    group.add_argument(
        "--enable-auto-tool-choice",
        action=argparse.BooleanOptionalAction,
        help="let the model choose to call tools; with it there must be a parser (default: if "
        "there is one)",
    )
    group.add_argument(
        "--reasoning-parser",
        choices=REASONING_PARSERS,
        help="how the model writes what it thinks: <think>…</think>, which deepseek_r1 may leave "
        "out the beginning of, [THINK]…[/THINK], or gpt-oss's channels (default: what the chat "
        "template says)",
    )
    group.add_argument(
        "--no-ui", action="store_true", help="serve no pages: neither the chat at / nor /docs"
    )
    group.add_argument(
        "--drain-timeout",
        "--shutdown-timeout",
        type=number,
        default=30.0,
        metavar="S",
        help="seconds that running answers get to finish after Ctrl-C or SIGTERM (default: "
        "%(default)s)",
    )


def _add_chat_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("chat")
    group.add_argument("--url", help="a running server (default: start an engine of its own)")
    group.add_argument(
        "--api-key", metavar="KEY", help="of the server (default: as `serve` has it)"
    )
    group.add_argument(
        "--model-name", metavar="NAME", help="with --url: which model (default: the first listed)"
    )
    group.add_argument("--system", metavar="TEXT", help="a system prompt")
    group.add_argument("--max-tokens", type=positive, metavar="N", help="of one answer")
    group.add_argument(
        "--temperature", type=number, metavar="T", help="(default: what the model recommends)"
    )


def check_flags(args: Namespace) -> None:
    """Refuse by name what is not built, before anything is loaded. Raises ``ConfigError``.

    What depends on the device is for `device_flags`.
    """
    if args.model == "":
        raise ConfigError("MODEL must be a directory or a hub id, got ''")
    check_quantization(args.quantization)
    adapter_config(args)
    speculative_config(args)
    utilization = args.gpu_memory_utilization
    if utilization is not None and not 0.0 < utilization <= 1.0:
        raise ConfigError(
            f"--gpu-memory-utilization must be above 0 and at most 1, got {utilization}"
        )


def scheduling_policy(args: Namespace) -> str:
    """The policy that was asked for, or that suits how many tenants there are."""
    if args.scheduling_policy is not None:
        return str(args.scheduling_policy)
    keys = getattr(args, "api_key", None)
    has_tenants = isinstance(keys, list) and len(keys) > 1
    return "fair" if has_tenants or getattr(args, "api_key_file", None) else "sjf"


def model_name(args: argparse.Namespace) -> str:
    """What the model is called where the flags give it no other name."""
    return "box" if args.model is None else whole_text(args.model)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse ``argv`` (default: the process's); exits with 2 and a usage line on a wrong flag.

    What a ``--config`` file says are defaults, which the other flags override. Raises
    ``ConfigError`` for a file that cannot be read.
    """
    argv = usual_spelling(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    if not argv:
        parser.print_help(sys.stderr)
        parser.exit(2)
    file, argv = split_config_flag(argv)
    if file is None:
        return parser.parse(argv)
    serve = parser.commands["serve"]
    settings = vars(serve.parse(config_flags(file, serve)))
    model = settings.pop("model")
    serve.set_defaults(**settings)
    args = parser.parse(argv)
    args.model = args.model or model
    return args
