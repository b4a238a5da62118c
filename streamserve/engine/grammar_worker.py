"""The process in which a grammar is tried before the server takes it.

Compiling may take any time and memory (a remainder by a large prime is an automaton of as many
states), and nothing can stop a thread that does it. A process ends: by itself when it has used its
processor time, at its limit of memory, or when it is killed. What comes out of here alive is cheap
to compile again. The trial is made over the 256 bytes instead of the model's vocabulary, so that
the worker is small and soon there.
"""

from __future__ import annotations

import random
import resource
import signal
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from streamserve.core.structured_output import GrammarKind
from streamserve.engine.grammar_source import llguidance_grammar
from streamserve.engine.grammar_trial import Task, Verdict
from streamserve.engine.lark_writer import with_special_ids

_NUM_STEPS = 48
_NUM_FEW_PARTS = 16  # more are walked through less far
_MAX_MASK_S = 0.01
_PART_CPU_S = 0.025
_MAX_MESSAGE = 400


class ByteVocabulary:
    """A vocabulary as ``LLTokenizer`` wants it: bytes, then special tokens by name, then EOS."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, special_tokens: Sequence[bytes]) -> None:
        self.tokens = [bytes([i]) for i in range(256)] + [*special_tokens, b"<|end|>"]
        self.special_token_ids = list(range(256, len(self.tokens)))
        self.eos_token_id = len(self.tokens) - 1

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def parser_limits() -> LLParserLimits:
    """How far a grammar may go, in the trial and in the server: bounds on memory and on a mask."""
    return LLParserLimits(
        step_lexer_fuel=100_000, max_lexer_states=20_000, max_grammar_size=200_000,
        verbose_errors=False,
    )  # fmt: skip


def main(fd: int, cpu_limit_s: float, memory_limit: int) -> None:
    """Read the special tokens, then answer every ``Task`` with a ``Verdict`` while any comes."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_limit, memory_limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection = Connection(fd)
    special_tokens: list[bytes] = connection.recv()
    trier = _Trier(special_tokens)
    while True:
        try:
            task = Task(*connection.recv())
        except EOFError:
            return
        # Its default action ends the process, in whatever code it is.
        signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)
        verdict = trier(task)
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send(tuple(verdict))


class _Trier:
    def __init__(self, special_tokens: Sequence[bytes]) -> None:
        vocabulary = ByteVocabulary(special_tokens)
        self._special_ids = vocabulary.special_token_ids
        self._special_tokens = [token.decode("utf-8", "replace") for token in special_tokens]
        self._tokenizer = LLTokenizer(vocabulary)  # type: ignore[arg-type]

    def __call__(self, task: Task) -> Verdict:
        kind = GrammarKind(task.kind)
        try:
            grammar, parts = llguidance_grammar(
                kind, task.text, task.whitespace_pattern, self._special_tokens
            )
            left_s, _ = signal.getitimer(signal.ITIMER_PROF)
            signal.setitimer(signal.ITIMER_PROF, left_s + _PART_CPU_S * len(parts))
            # A walk through the whole may never leave its free text.
            num_steps = _NUM_STEPS if len(parts) <= _NUM_FEW_PARTS else _NUM_STEPS // 4
            errors = (self._error_of(part, num_steps) for part in (grammar, *parts))
            error = next(filter(None, errors), "")
        except Exception as exception:  # converters fail in their own ways
            return Verdict("", short(str(exception) or type(exception).__name__))
        return Verdict("" if error else grammar, short(error))

    def _error_of(self, grammar: str, num_steps: int) -> str:
        grammar = with_special_ids(grammar, self._special_ids)
        matcher = LLMatcher(self._tokenizer, grammar, limits=parser_limits(), log_level=0)
        return matcher.get_error() or _walk(matcher, self._tokenizer, num_steps)


def _walk(matcher: LLMatcher, tokenizer: LLTokenizer, num_steps: int) -> str:
    """Write a few random bytes of the language; returns why one cannot, "" if one can."""
    draw = random.Random(0).choice
    for _ in range(num_steps):
        started = time.process_time()
        mask = matcher.compute_bitmask()
        taken_s = time.process_time() - started
        if matcher.is_error():
            return matcher.get_error()
        if taken_s > _MAX_MASK_S:
            return f"too complex: a token takes {taken_s * 1e3:.0f} ms to find, the limit is 10"
        if matcher.is_stopped():
            return "" if matcher.is_accepting() else "nothing matches it"
        allowed = [i for i in range(tokenizer.vocab_size) if mask[i >> 3] >> (i & 7) & 1]
        matcher.consume_token(draw(allowed))
    return ""


def short(message: str) -> str:
    """What a client is told of llguidance's messages, which may quote a whole grammar."""
    message = message.removesuffix("\n<non-verbose/>")
    if message.startswith("NoExtension"):
        return "nothing matches it"
    return message if len(message) <= _MAX_MESSAGE else f"{message[:_MAX_MESSAGE]}…"
