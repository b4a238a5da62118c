"""Draft heads in GGUF files, as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from streamserve.errors import ModelLoadError, UnsupportedModelError
from streamserve.models import find_mtp, load_config, load_model, load_mtp_head
from streamserve.models.mtp import MtpHead
from streamserve_kernels import QuantLinear
from tests.models.gguf_files import F32, Kind, write_gguf
from tests.models.gguf_hybrids import HYBRID_CASES
from tests.models.gguf_parity import sizes
from tests.models.guesses import check
from tests.models.mtp_judge import MtpJudge
from tests.models.random_model import random_model

CPU = torch.device("cpu")
CASES = ("qwen3.5", "qwen3.5-moe", "qwen3-next")
# `_QwenMtpMixin.filter_tensors`, and what the converter's map makes of it.
_RENAMED = {
    "fc": "eh_proj",
    "pre_fc_norm_embedding": "enorm",
    "pre_fc_norm_hidden": "hnorm",
    "norm": "shared_head_norm",
}


class WithHead:
    """A model and its head as one of a layer more, as the converter has them."""

    def __init__(self, judge: MtpJudge) -> None:
        self._judge, self._model = judge, judge.target
        self.config = deepcopy(self._model.config)
        self._block = self.config.num_hidden_layers
        self.config.num_hidden_layers += 1

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._model.named_parameters()
        for name, parameter in self._judge.named_parameters():
            yield name.replace("layers.0", f"model.layers.{self._block}"), parameter

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        return self._model.named_buffers()

    def name(self, name: str) -> str | None:
        """In the file, of what is around the head's layer."""
        stem, _, leaf = name.partition(".")
        return f"blk.{self._block}.nextn.{_RENAMED[stem]}.{leaf}" if stem in _RENAMED else None


@pytest.fixture
def write(tmp_path) -> Callable[..., tuple[MtpJudge, Path]]:
    """A case of HYBRID_CASES -> the judge of the head in a file, and the file."""

    def write(case: str, kind=lambda name: F32, extra=None, **changes):
        architecture, config, values, _ = HYBRID_CASES[case]
        judge = MtpJudge(random_model(config()))
        both, path = WithHead(judge), tmp_path / "m.gguf"
        recurrent = [*values["attention.recurrent_layers"], False]
        stated = {
            **sizes(both.config),
            **values,
            "attention.recurrent_layers": recurrent,
            "nextn_predict_layers": 1,
            **changes,
        }
        write_gguf(path, both, architecture, stated, kind=kind, extra=extra, named=both.name)
        return judge, path

    return write


def load(path: Path, kernels: object) -> MtpHead:
    config = load_config(path)
    target = load_model(path, dtype=torch.float32, device=CPU, kernels=kernels, config=config)
    mtp = find_mtp(path, config)
    head = load_mtp_head(mtp, target)
    assert head.nbytes <= mtp.weight_bytes(torch.float32)
    return head


@pytest.mark.parametrize("case", CASES)
def test_a_file_gives_the_heads_own_weights(case, write, kernels):
    judge, path = write(case)
    head = load(path, kernels)
    check(judge, head, chunk=9, tolerance=1e-4)
    assert torch.equal(head._product.unpack(), judge.fc.weight)
    output = head._weights.layers[0].linears["layers.output"].unpack()
    assert torch.equal(output, judge.layers[0].self_attn.o_proj.weight)


@pytest.mark.parametrize("case", ["qwen3.5", "qwen3-next"])
def test_packed_heads_stay_packed(case, write, kernels):
    narrow = ("down_exps", "down_shexp", "ffn_down", "ssm_out", "conv1d")
    judge, path = write(
        case, lambda name: F32 if any(part in name for part in narrow) else Kind.Q8_0
    )
    head = load(path, kernels)
    assert isinstance(head._product, QuantLinear)
    check(judge, head, chunk=9, tolerance=1e-4)


def test_a_file_whose_head_has_a_vocabulary_of_its_own_is_refused(write, kernels):
    own = {"blk.4.nextn.embed_tokens.weight": np.ones((97, 32), dtype=np.float32)}
    _, path = write("qwen3.5", extra=own)
    with pytest.raises(ModelLoadError, match=r"no use for 1 tensor: blk\.4\.nextn\.embed_tokens"):
        load(path, kernels)


def test_a_file_without_a_head_is_named(write, kernels):
    _, path = write("qwen3.5", nextn_predict_layers=0, block_count=4)
    with pytest.raises(ModelLoadError, match=r"has no layers that guess further tokens \(mtp\)"):
        find_mtp(path, load_config(path))


def test_a_file_with_two_layers_is_refused(write):
    _, path = write("qwen3.5", nextn_predict_layers=2, block_count=6)
    with pytest.raises(UnsupportedModelError, match="2 layers that guess further tokens"):
        find_mtp(path, load_config(path))
