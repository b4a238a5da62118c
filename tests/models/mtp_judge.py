"""Multi-token prediction in plain torch, around a layer of transformers, which leaves it out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from streamserve.models.mtp import MtpHead
from tests.models.packers import edit_config
from tests.models.paged import PagedHarness, Sequence
from tests.models.parity import prompts
from tests.models.random_model import random_model

NUM_GUESSES = 4


class MtpJudge(nn.Module):
    """The head of ``model``, with random weights; its parameters are named as checkpoints do."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        super().__init__()
        config, norm = model.config, type(model.model.norm)
        size, eps = config.hidden_size, config.rms_norm_eps
        # The last of each that is tested has experts, where some have.
        index = [i for i, layer in enumerate(model.model.layers) if hasattr(layer, "self_attn")][-1]
        self.fc = nn.Linear(2 * size, size, bias=False)
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden = norm(size, eps), norm(size, eps)
        self.layers = nn.ModuleList([type(model.model.layers[index])(config, index)])
        self.norm = norm(size, eps)
        random_model(self)
        self._targets = [model]  # not a module of this one

    @property
    def target(self) -> transformers.PreTrainedModel:
        return self._targets[0]

    def forward(self, tokens: list[int], hidden_states: Tensor) -> Tensor:
        """The tokens behind each position and the states [T, H] there -> what is found [T, H]."""
        model = self.target.model
        embedding = self.pre_fc_norm_embedding(model.embed_tokens(torch.tensor([tokens])))
        joined = torch.cat((embedding, self.pre_fc_norm_hidden(hidden_states[None])), dim=-1)
        x = self.fc(joined)
        turned = model.rotary_emb(x, torch.arange(len(tokens))[None])
        return self.norm(self.layers[0](x, position_embeddings=turned))[0]

    def likeliest(self, found: Tensor) -> Tensor:
        return self.target.lm_head(found).argmax(-1)

    def states_of_target(self, tokens: list[int]) -> Tensor:
        """[T, H], as they are given to its head."""
        return self.target.model(torch.tensor([tokens])).last_hidden_state[0]

    def tensors(self, *, apart: bool) -> dict[str, Tensor]:
        """As a checkpoint has them; with ``apart`` each expert by itself."""
        tensors: dict[str, Tensor] = {}
        for name, tensor in self.state_dict().items():
            base, _, leaf = name.rpartition(".")
            if apart and leaf in ("gate_up_proj", "down_proj") and tensor.dim() == 3:
                parts = leaf.replace("gate_up", "gate up").split(" ")
                names = ["gate_proj", "up_proj"] if len(parts) == 2 else ["down_proj"]
                for expert, weight in enumerate(tensor):
                    for part, rows in zip(names, weight.chunk(len(names)), strict=True):
                        tensors[f"mtp.{base}.{expert}.{part}.weight"] = rows.contiguous()
            else:
                tensors[f"mtp.{name}"] = tensor
        return tensors


def save_with_head(
    config: transformers.PretrainedConfig, directory: Path, *, apart: bool = False, **changes: Any
) -> MtpJudge:
    """Writes a checkpoint of a model and its head, whose judge is returned."""
    model = random_model(config)
    model.save_pretrained(directory)
    judge = MtpJudge(model)
    file = directory / "model.safetensors"
    save_file({**load_file(file), **judge.tensors(apart=apart)}, file)
    edit_config(directory, **changes)
    return judge


class Guesses:
    """A head's caches, and what it has found at each position of some sequences."""

    def __init__(self, head: MtpHead, block_size: int = 4) -> None:
        self.harness = PagedHarness(head, block_size=block_size)
        self.head = head
        self.found: dict[int, list[torch.Tensor]] = {}
        self.tokens: dict[int, list[int]] = {}

    def step(self, work, states, *, all_rows: bool = True) -> None:
        """``states`` are those of each sequence's next tokens, one beside the other."""
        batch = self.harness.batch(work, all_rows=all_rows)
        batch = replace(batch, hidden_states=torch.cat(states).to(self.head.dtype))
        with torch.inference_mode():
            tokens, found = self.head.guess(batch, self.harness.caches)
        counts = [c if all_rows else int(s.num_computed + c == len(s.tokens)) for s, c in work]
        parts = zip(work, tokens.split(counts), found.split(counts), strict=True)
        for (sequence, count), of_tokens, rows in parts:
            sequence.num_computed += count
            self.tokens.setdefault(id(sequence), []).extend(of_tokens.tolist())
            self.found.setdefault(id(sequence), []).extend(rows)

    def feed(
        self, sequences: list[Sequence], states: list[torch.Tensor], chunk: int, **options: bool
    ) -> None:
        """All of their tokens, in chunks, the sequences together."""
        while any(s.num_computed < len(s.tokens) for s in sequences):
            work, rows = [], []
            for sequence, given in zip(sequences, states, strict=True):
                start = sequence.num_computed
                if count := min(chunk, len(sequence.tokens) - start):
                    work.append((sequence, count))
                    rows.append(given[start : start + count])
            self.step(work, rows, **options)

    def go_on(self, sequences: list[Sequence], count: int) -> None:
        """Guesses on from what was found."""
        for _ in range(count):
            for sequence in sequences:
                sequence.tokens.append(self.tokens[id(sequence)][-1])
            own = [self.found[id(sequence)][-1][None] for sequence in sequences]
            self.step([(sequence, 1) for sequence in sequences], own)


def judge_states(judge: MtpJudge) -> tuple[list[Sequence], list[torch.Tensor]]:
    """Sequences of the tokens behind each position of prompts, and the states there."""
    texts = [tokens for tokens in prompts(shared=0) if len(tokens) > 1]
    with torch.inference_mode():
        states = [judge.states_of_target(tokens)[:-1] for tokens in texts]
    return [Sequence(tokens[1:]) for tokens in texts], states


def check(judge: MtpJudge, head: MtpHead, chunk: int, tolerance: float) -> None:
    """In chunks, all sequences together, and then on from its own states."""
    sequences, states = judge_states(judge)
    guesses = Guesses(head)
    guesses.feed(sequences, states, chunk)
    guesses.go_on(sequences, NUM_GUESSES)
    for sequence, given in zip(sequences, states, strict=True):
        found = torch.stack(guesses.found[id(sequence)])
        with torch.inference_mode():
            expected = given[:0]
            for _ in range(NUM_GUESSES + 1):
                # What it has found at the last positions stands in for the target's states there.
                inputs = torch.cat((given, expected[len(given) - 1 : len(expected)]))
                expected = judge(sequence.tokens[: len(inputs)], inputs)
            tokens = judge.likeliest(expected).tolist()
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        assert guesses.tokens[id(sequence)] == tokens
