"""The body of ``POST /v1/embeddings``, parsed at the edge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamserve.api.completion_request import GivenPrompt, prompts_reader
from streamserve.api.extras import EXTRA_FIELDS, ExtraFields, read_extras
from streamserve.api.fields import (
    FieldTable,
    Reader,
    Refused,
    integer,
    one_of,
    read_bool,
    require,
)
from streamserve.api.sampling import ANNOTATIONS, COMMON_FIELDS, REFUSED, Common, read_common
from streamserve.core.pooling import Pooling
from streamserve.core.sampling_params import SamplingParams

MAX_INPUTS = 2048  # OpenAI's

_OF_ALL = ("cache_salt", "model", "priority", "user")

EMBEDDING_FIELDS: dict[str, Reader] = {
    **{name: COMMON_FIELDS[name] for name in _OF_ALL},
    **{name: EXTRA_FIELDS[name] for name in ("truncate_prompt_tokens", "truncation_side")},
    "add_special_tokens": read_bool,
    "dimensions": integer(1),
    "encoding_format": one_of("float", "base64"),
    "input": prompts_reader(MAX_INPUTS, "inputs"),
    "normalize": read_bool,
}

EMBEDDING_REFUSED: dict[str, Refused] = {
    "chat_template": Refused((), "is not supported here: input is text, or its token ids"),
    "embed_dtype": Refused(("float32",)),
    "endianness": Refused(("native", "little")),
    "messages": Refused((), "is not supported here: send input, text or its token ids"),
    "mm_processor_kwargs": Refused(),
    "request_id": REFUSED["request_id"],
    "use_activation": Refused((), "is not supported: send normalize"),
}

EMBEDDING_TABLE = FieldTable(EMBEDDING_FIELDS, EMBEDDING_REFUSED, ANNOTATIONS, ("input",))


@dataclass(frozen=True, slots=True)
class EmbeddingRequest:
    """A request for vectors whose every field is valid; one for each input, in order.

    ``params.pooling`` has the kind that counts where the checkpoint names none.
    """

    common: Common
    prompts: tuple[GivenPrompt, ...]
    params: SamplingParams
    extras: ExtraFields
    encoding_format: str
    add_special_tokens: bool


def parse_embedding_request(body: Mapping[str, Any]) -> EmbeddingRequest:
    """Parse and check. Raises ``InvalidParameterError`` for the first field that is wrong."""
    values, unknown = EMBEDDING_TABLE.read(body)
    pooling = Pooling(dimensions=values.get("dimensions"), normalize=values.get("normalize", True))
    return EmbeddingRequest(
        common=read_common(values, unknown),
        prompts=require(values, "input"),
        params=SamplingParams(max_tokens=1, temperature=0.0, pooling=pooling),
        extras=read_extras(values),
        encoding_format=values.get("encoding_format", "float"),
        add_special_tokens=values.get("add_special_tokens", True),
    )
