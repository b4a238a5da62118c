"""Where a checkpoint keeps each weight: a table of names per family.

The decoder's modules have names of our own (the keys of ``WeightNames.modules``, listed below), and
a family says which modules of its checkpoint, stacked by rows, make one of ours. ``{layer}`` and
``{expert}`` stand for their numbers.

    embedding  position_embedding  embedding_norm  final_norm  head
    per_layer.embedding  per_layer.product  per_layer.norm
    join.embedding_norm  join.hidden_norm  join.product  join.taps_norm  join.tap_norms.0 (1, …)
    layers.attention_norm  layers.attention_post_norm  layers.mlp_norm  layers.mlp_post_norm
    layers.qkv (or layers.query_key, layers.query)  layers.q_norm  layers.k_norm  layers.output
    layers.head_gate  layers.sinks  layers.scalar
    layers.latent.input  layers.latent.query_norm  layers.latent.query  layers.latent.norm
    layers.latent.heads
    layers.delta.qkvz  layers.delta.gates  layers.delta.conv  layers.delta.decay
    layers.delta.time_bias  layers.delta.norm  layers.delta.output
    layers.space.input  layers.space.conv  layers.space.decay  layers.space.time_bias
    layers.space.skip  layers.space.norm  layers.space.output
    layers.short_conv.input  layers.short_conv.conv  layers.short_conv.output
    layers.gate_up (or layers.up when not gated)  layers.down
    layers.router  layers.router.correction  layers.experts.gate_up  layers.experts.down
    layers.shared.gate  layers.shared.gate_up  layers.shared.down  (or …up when not gated)
    layers.router.norm  layers.router.scales  layers.experts.norm  layers.experts.post_norm
    layers.shared.norm  layers.shared.post_norm
    layers.per_layer.gate  layers.per_layer.output  layers.per_layer.norm
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

QkvLayout = Literal["stacked", "grouped", "gated"]
"""How a checkpoint that fuses q, k and v orders the rows.

``stacked``: all q, all k, all v. ``grouped``: for each kv head its queries, its key, its value;
with as many kv heads as heads that is head by head. ``gated``: q, k and v are apart, and the
queries' module has for each head its query and its output gate.
"""
DeltaLayout = Literal["stacked", "grouped"]
"""How a checkpoint that fuses q, k, v and z of a delta net orders the rows.

``stacked``: all of each. ``grouped``: for each key head its query, its key, its values and their
z's; and of the gates those of its values.
"""


@dataclass(frozen=True, slots=True)
class WeightNames:
    """``modules`` maps each module of ours to the checkpoint modules whose rows it stacks.

    A single checkpoint module for ``layers.qkv`` or ``layers.gate_up`` is already fused.
    ``transposed`` modules keep ``[in, out]`` (GPT-2's Conv1D). ``sliced`` experts share a tensor
    ``[experts, …]``, whose name stands here whole; that of their biases ends in ``_bias`` besides.
    ``apart`` are their names in checkpoints that keep each expert by itself, if there are such.
    ``interleaved`` gates and ups take turns, row by row. ``optional_prefix`` may be absent from a
    checkpoint's names. ``ignored`` are regular expressions, matched at the end of a name, of
    buffers that old checkpoints carry and no decoder needs. ``renamed`` are beginnings of names as
    a checkpoint has them and as they stand here, ``respelled`` parts of names; names that begin
    with one of ``skipped``, or with none of ``kept`` where that is given, are of parts that nobody
    asks for.
    """

    modules: Mapping[str, tuple[str, ...]]
    qkv_layout: QkvLayout = "stacked"
    delta_layout: DeltaLayout = "stacked"
    transposed: frozenset[str] = field(default_factory=frozenset)
    sliced: frozenset[str] = field(default_factory=frozenset)
    apart: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    interleaved: frozenset[str] = field(default_factory=frozenset)
    optional_prefix: str = ""
    ignored: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    respelled: tuple[tuple[str, str], ...] = ()
    skipped: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    def asked(self, stored: Iterable[str]) -> list[str]:
        """Those of a checkpoint's names that are of parts that somebody asks for."""
        kept = self.kept or ("",)
        return [n for n in stored if n.startswith(kept) and not n.startswith(self.skipped)]

    def of_files(self, stored: Iterable[str]) -> WeightNames:
        """These names for a checkpoint with tensors so named: its experts share them, or do not."""
        if not self.apart or not any(".experts.0." in name for name in self.asked(stored)):
            return self
        sliced = self.sliced - self.apart.keys()
        return replace(self, modules={**self.modules, **self.apart}, sliced=sliced)

    def full(self, stored: str) -> str:
        """A name as it stands here."""
        for before, after in self.respelled:
            stored = stored.replace(before, after)
        for before, after in self.renamed:
            if stored.startswith(before):
                return after + stored.removeprefix(before)
        return stored
