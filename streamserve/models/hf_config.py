"""Typed reading of a Hugging Face ``config.json``.

The file is read as plain JSON. transformers' own classes would fill in defaults, but importing them
takes seconds, which a server start-up cannot spare; so each family states its defaults where it
reads. Both generations of rotary settings are understood: ``rope_theta`` with ``rope_scaling``, and
``rope_parameters`` as transformers 5 writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamserve.errors import ModelLoadError, UnsupportedModelError
from streamserve.models.rope_magnitude import longrope_attention_factor, yarn_attention_factor
from streamserve.models.spec import Activation, RopeScaling, RopeSpec

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "quick_gelu": "quick_gelu",
}
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


class HfConfig:
    """A config's values, read by name; every error names the key and the value it holds."""

    def __init__(self, values: Mapping[str, Any], source: str = "config.json") -> None:
        self.values = values
        self.source = source

    def integer(self, *names: str, minimum: int = 1) -> int:
        """The first of ``names`` that is set. Raises ModelLoadError when none is."""
        for name in names:
            value = self.optional_integer(name, minimum=minimum)
            if value is not None:
                return value
        raise ModelLoadError(f"{self.source} lacks {' or '.join(names)}, an integer")

    def integer_or(self, default: int, *names: str, minimum: int = 1) -> int:
        for name in names:
            value = self.optional_integer(name, minimum=minimum)
            if value is not None:
                return value
        return default

    def optional_integer(
        self, name: str, *, minimum: int = 1, default: int | None = None
    ) -> int | None:
        """An integer that null switches off; ``default`` where the name is missing."""
        value = self.values.get(name, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ModelLoadError(
                f"{self.source}: {name} must be an integer of at least {minimum}, got {value!r}"
            )
        return value

    def number_or(self, default: float, *names: str) -> float:
        for name in names:
            value = self.values.get(name)
            if value is not None:
                return _number(f"{self.source}: {name}", value)
        return default

    def optional_number(self, default: float | None, name: str) -> float | None:
        """A number that null switches off; ``default`` where the name is missing."""
        value = self.values.get(name, default)
        return None if value is None else _number(f"{self.source}: {name}", value)

    def flag_or(self, default: bool, name: str) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ModelLoadError(f"{self.source}: {name} must be true or false, got {value!r}")
        return value

    def activation_or(self, default: str, *names: str) -> Activation:
        for name in names:
            value = self.values.get(name)
            if value is None:
                continue
            if value not in ACTIVATIONS:
                raise UnsupportedModelError(
                    f"{self.source}: {name} {value!r} is not supported; "
                    f"these are: {', '.join(ACTIVATIONS)}"
                )
            return ACTIVATIONS[value]
        return ACTIVATIONS[default]

    def require_silu(self) -> None:
        """Raises UnsupportedModelError for a ``hidden_act`` of another kind."""
        if self.activation_or("silu", "hidden_act") != "silu":
            raise UnsupportedModelError(
                f"{self.source}: hidden_act {self.values['hidden_act']!r} is not supported for this"
                " architecture; these are: silu"
            )

    def head_size(self, hidden_size: int, num_heads: int) -> int:
        """``head_dim`` where the config names it, else an equal share of the hidden size."""
        named = self.optional_integer("head_dim")
        if named is not None:
            return named
        if hidden_size % num_heads:
            raise ModelLoadError(
                f"{self.source}: hidden_size {hidden_size} is no multiple of "
                f"num_attention_heads {num_heads}, and head_dim is not given"
            )
        return hidden_size // num_heads

    def layer_kinds(self, num_layers: int, known: tuple[str, ...]) -> tuple[str, ...] | None:
        """Each layer's kind from ``layer_types``; None without them."""
        kinds = self.values.get("layer_types")
        if kinds is None:
            return None
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            raise ModelLoadError(
                f"{self.source}: layer_types must list {num_layers} layers, got {kinds!r}"
            )
        for kind in kinds:
            if kind not in known:
                raise UnsupportedModelError(
                    f"{self.source}: layer type {kind!r} is not supported; "
                    f"these are: {', '.join(known)}"
                )
        return tuple(kinds)

    def layer_windows(
        self, num_layers: int, window: int | None, every: int | None = None
    ) -> tuple[int | None, ...]:
        """Each layer's attention window from ``layer_types``.

        Without them it is ``window``, but for the last of ``every`` so many layers, if that is
        given: they have none.
        """
        kinds = self.layer_kinds(num_layers, ("full_attention", "sliding_attention"))
        if kinds is None:
            last = every or num_layers + 1
            return tuple(window if (n + 1) % last else None for n in range(num_layers))
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)

    def rope(
        self,
        head_size: int,
        *,
        theta_names: tuple[str, ...] = ("rope_theta",),
        partial_names: tuple[str, ...] = ("partial_rotary_factor",),
        default_theta: float = 10_000.0,
        default_partial: float = 1.0,
        default_context: int = 2048,
        interleaved: bool = False,
        layer_type: str | None = None,
    ) -> RopeSpec:
        """The rotary settings of either generation, values inside the rope dict first.

        Settings may differ by ``layer_type`` where a family asks for one's; settings for all are
        those of ``full_attention`` then.
        """
        parameters = self._rope_parameters(layer_type)
        source = f"{self.source}: rope"
        theta = parameters.get("rope_theta")
        if theta is None:
            theta = self.number_or(default_theta, *theta_names)
        partial = parameters.get("partial_rotary_factor")
        if partial is None:
            partial = self.number_or(default_partial, *partial_names)
        rotary_dim = int(head_size * _number(f"{source} partial_rotary_factor", partial))
        return RopeSpec(
            base=_number(f"{source} rope_theta", theta),
            rotary_dim=self._checked_rotary_dim(rotary_dim, head_size),
            interleaved=interleaved,
            scaling=self._rope_scaling(parameters, default_context, rotary_dim // 2),
        )

    def rope_number(self, name: str) -> float | None:
        """A number among the rotary settings, whatever it is for; None where they lack it."""
        value = self._rope_parameters(None).get(name)
        return None if value is None else _number(f"{self.source}: rope {name}", value)

    def rotary_dim(self, head_size: int, default: int) -> int:
        """How many elements of each head turn, where the config counts them."""
        return self._checked_rotary_dim(self.integer_or(default, "rotary_dim"), head_size)

    def _checked_rotary_dim(self, rotary_dim: int, head_size: int) -> int:
        if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > head_size:
            raise UnsupportedModelError(
                f"{self.source}: rope: {rotary_dim} rotated elements of a head of {head_size} "
                "must be an even number between 2 and the head size"
            )
        return rotary_dim

    def _rope_parameters(self, layer_type: str | None) -> Mapping[str, Any]:
        for name in ("rope_scaling", "rope_parameters"):
            value = self.values.get(name)
            if not value:
                continue
            if not isinstance(value, dict):
                raise ModelLoadError(f"{self.source}: {name} must be an object, got {value!r}")
            nested = [key for key, inner in value.items() if isinstance(inner, dict)]
            if layer_type is not None:
                flat = value if layer_type == "full_attention" else {}
                return value.get(layer_type) or {} if nested else flat
            if nested:
                raise UnsupportedModelError(
                    f"{self.source}: {name} differs by layer type ({', '.join(nested)}), "
                    "which is not supported for this architecture"
                )
            return value
        return {}

    def _rope_scaling(
        self, given: Mapping[str, Any], default_context: int, num_pairs: int
    ) -> RopeScaling | None:
        kind = given.get("rope_type", given.get("type", "default"))
        if kind in ("su", "yarn") and "long_factor" in given:
            kind = "longrope"  # as it was called before it had a name
        if kind in ("default", "mrope"):
            # Qwen-VL's three positions of a token are the same in a text.
            return None
        if kind not in ROPE_KINDS:
            raise UnsupportedModelError(
                f"{self.source}: rope type {kind!r} is not supported; "
                f"these are: {', '.join(ROPE_KINDS)}"
            )
        context = self.integer_or(default_context, "max_position_embeddings")
        original = context
        if kind in ("llama3", "yarn", "longrope"):
            inner = HfConfig(given, f"{self.source}: rope")
            original = self.integer_or(
                inner.integer_or(context, "original_max_position_embeddings"),
                "original_max_position_embeddings",
            )

        def read(name: str, default: float | None = None) -> float:
            value = given.get(name)
            if value is None:
                if default is None:
                    raise ModelLoadError(f"{self.source}: rope type {kind!r} needs {name}")
                return default
            return _number(f"{self.source}: rope {name}", value)

        implied = context / original if kind in ("yarn", "longrope") else None
        factor = read("factor", implied)
        if factor <= 0:
            raise ModelLoadError(f"{self.source}: rope factor must be positive, got {factor}")
        if kind == "llama3":
            return RopeScaling(
                kind="llama3",
                factor=factor,
                original_max_position_embeddings=original,
                low_freq_factor=read("low_freq_factor"),
                high_freq_factor=read("high_freq_factor"),
            )
        if kind == "yarn":
            magnitude = yarn_attention_factor(
                factor, given.get("mscale"), given.get("mscale_all_dim")
            )
            return RopeScaling(
                kind="yarn",
                factor=factor,
                original_max_position_embeddings=original,
                beta_fast=read("beta_fast", 32.0) or 32.0,
                beta_slow=read("beta_slow", 1.0) or 1.0,
                attention_factor=read("attention_factor", magnitude),
                truncate=given.get("truncate", True) is not False,
            )
        if kind == "longrope":
            magnitude = longrope_attention_factor(factor, original)
            return RopeScaling(
                kind="longrope",
                factor=factor,
                original_max_position_embeddings=original,
                attention_factor=read("attention_factor", magnitude),
                short_factors=self._pair_factors(given, "short_factor", num_pairs),
                long_factors=self._pair_factors(given, "long_factor", num_pairs),
            )
        return RopeScaling(
            kind="linear" if kind == "linear" else "dynamic",
            factor=factor,
            original_max_position_embeddings=original,
        )

    def _pair_factors(
        self, given: Mapping[str, Any], name: str, num_pairs: int
    ) -> tuple[float, ...]:
        factors = given.get(name)
        if not isinstance(factors, list) or len(factors) != num_pairs:
            raise ModelLoadError(
                f"{self.source}: rope {name} must list {num_pairs} numbers, got {factors!r}"
            )
        return tuple(_number(f"{self.source}: rope {name}", factor) for factor in factors)


def _number(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ModelLoadError(f"{what} must be a number, got {value!r}")
    return float(value)
