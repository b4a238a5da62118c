"""The service behind an `LLM`: the same objects as behind ``streamserve serve``, minus HTTP."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from streamserve.cli.environment import prepare_environment
from streamserve.llm.answers import Answers
from streamserve.llm.keywords import flags_of, named_as_keywords

if TYPE_CHECKING:
    from streamserve.cli.compose import Service

logger = logging.getLogger("streamserve")


def build(model: str | None, keywords: Mapping[str, Any]) -> tuple[Service, Answers]:
    """Load the model as the keywords say; minutes for a big one. Raises ``StreamServeError``."""
    args = flags_of(model, keywords)
    prepare_environment()
    # Not before the keywords are known to be right: torch takes seconds to import.
    from streamserve.cli.compose import build_service

    with named_as_keywords():
        service = build_service(args, say=logger.info, warn=logger.warning)
    return service, _answers(service, args)


def _answers(service: Service, args: Namespace) -> Answers:
    return Answers(
        service.engine,
        service.tokenizer,
        service.chat_template,
        special_tokens=service.tokenizer.special_tokens,
        max_num_requests=args.max_num_waiting,
        max_model_len=service.max_model_len,
        adapters=service.adapters,
    )
