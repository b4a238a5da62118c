"""Flags that say where a model's files come from, and what its own recommendations are worth."""

from __future__ import annotations

import argparse

from streamserve.cli.values import integer, json_object

TOKENIZER_MODES = ("auto", "hf", "slow")
_NO_TOKENIZER_MODES = {
    "mistral": "mistral-common's tokenizers are not built; auto reads the tokenizer.json that is "
    "beside a tekken.json",
    "custom": "classes that a program registers are not built; slow runs a checkpoint's own",
}
MODEL_IMPLS = ("auto", "native", "transformers")


def add_source_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model", default=argparse.SUPPRESS, metavar="MODEL", help="the same as MODEL"
    )
    group.add_argument(
        "--model-impl",
        type=_model_impl,
        metavar="auto|native|transformers",
        default="auto",
        help="native: this server's own decoder; transformers: the model as transformers builds "
        "it, on this server's cache and kernels; auto: native where the family is there, else "
        "transformers (default: auto)",
    )
    group.add_argument(
        "--tokenizer", metavar="NAME", help="a directory or a hub id (default: the model's)"
    )
    group.add_argument(
        "--tokenizer-mode",
        type=_tokenizer_mode,
        metavar="auto|hf|slow",
        default="auto",
        help="auto and hf: tokenizer.json, or what is made of the other files; slow: the one in "
        "Python that transformers or, if it is trusted, the checkpoint has (default: auto)",
    )
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    group.add_argument(
        "--tokenizer-revision",
        metavar="REV",
        help="of the tokenizer's hub id (default: --revision)",
    )
    group.add_argument(
        "--download-dir",
        metavar="DIR",
        help="where hub ids are downloaded to, and looked for (default: the hub's own cache)",
    )
    group.add_argument(
        "--hf-token", nargs="?", const=True, metavar="TOKEN", help="of the hub, for gated models"
    )
    group.add_argument(
        "--trust-remote-code",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="run the checkpoint's own code, if it has some: its tokenizer's, and its model's "
        "where --model-impl comes to transformers (default: off)",
    )
    group.add_argument(
        "--hf-overrides",
        type=json_object,
        default={},
        metavar="JSON",
        help="values in place of those of config.json, like "
        '\'{"rope_scaling": {"rope_type": "yarn", "factor": 4.0, '
        '"original_max_position_embeddings": 32768}}\'; for the native decoder (default: none)',
    )
    group.add_argument(
        "--generation-config",
        default="auto",
        metavar="auto|vllm|DIR",
        help="where the sampling defaults come from: auto: the model's generation_config.json; "
        "vllm: OpenAI's defaults; a directory with such a file (default: auto)",
    )
    group.add_argument(
        "--override-generation-config",
        type=json_object,
        metavar="JSON",
        help="sampling defaults that override those, like '{\"temperature\": 0.5}'",
    )


def add_seed_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seed",
        type=integer,
        metavar="N",
        help="of requests that bring none, drawn from it in the order of their arrival, and of "
        "--load-format dummy (default: another one at every start)",
    )


def _model_impl(text: str) -> str:
    name = "native" if text == "vllm" else text  # whose own models are native there
    if name not in MODEL_IMPLS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(MODEL_IMPLS)}, got {text!r}")
    return name


def _tokenizer_mode(text: str) -> str:
    if text in _NO_TOKENIZER_MODES:
        raise argparse.ArgumentTypeError(f"{text!r}: {_NO_TOKENIZER_MODES[text]}")
    if text not in TOKENIZER_MODES:
        raise argparse.ArgumentTypeError(
            f"must be one of {', '.join(TOKENIZER_MODES)}, got {text!r}"
        )
    return text
