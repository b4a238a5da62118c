"""Grammars that answers follow: compiled once, off the event loop, within limits.

A request's grammar is first tried in another process (`grammar_worker`), which may be ended, and
what has passed there is compiled on a thread: llguidance lets go of the interpreter lock meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamserve.core.structured_output import StructuredOutput
from streamserve.engine.grammar_trial import GrammarTrial, Task
from streamserve.engine.tokenizer import Tokenizer
from streamserve.engine.turns import Turns
from streamserve.errors import EngineDeadError, InvalidParameterError, QueueFullError

if TYPE_CHECKING:
    # At run time it is imported by the first grammar, or by a server that warms up.
    from llguidance import LLMatcher, LLTokenizer

logger = logging.getLogger(__name__)

MAX_GRAMMAR_CHARACTERS = 256 * 1024
_NICENESS = 10  # of the compiling thread: the model's threads come first


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A grammar that is ready, or what is wrong with it."""

    matcher: LLMatcher | None
    error: str
    num_characters: int


class _Vocabulary:
    """A model's vocabulary as ``LLTokenizer`` wants it; ids that are no token have no bytes."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: Iterable[int], size: int) -> None:
        eos = sorted(eos_token_ids)
        self.eos_token_id = eos[0]
        self.special_token_ids = sorted({*tokenizer.all_special_ids, *eos})
        known = tokenizer.vocab_size
        self.tokens = [tokenizer.token_bytes(i) if i < known else b"" for i in range(size)]
        for i in self.special_token_ids:
            self.tokens[i] = self.tokens[i] or b"<|%d|>" % i
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return self._tokenizer.encode(text, add_special_tokens=False)


class Grammars:
    """Compiles for one tokenizer and remembers. Event-loop thread only, but for ``warm``.

    The newest ``max_entries`` grammars are kept, refused ones too, of ``max_characters`` together.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_token_ids: frozenset[int],
        vocab_size: int,
        *,
        timeout_s: float = 10.0,
        max_entries: int = 32,
        max_characters: int = 2 * 2**20,
        new_trial: Callable[[list[bytes]], GrammarTrial] = GrammarTrial,
    ) -> None:
        """``vocab_size`` is the model's: masks have so many bits, or a few more.

        ``timeout_s`` is how long a grammar may be compiled, and how long it may wait for that:
        a busy machine's limit. What is too complex is known by its processor time in the trial,
        which ``new_trial`` makes for special tokens.
        """
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._timeout_s = timeout_s
        self._max_entries = max_entries
        self._max_characters = max_characters
        self._new_trial = new_trial
        self._cache: OrderedDict[StructuredOutput, _Compiled] = OrderedDict()
        self._num_characters = 0
        self._running: dict[StructuredOutput, asyncio.Task[_Compiled]] = {}
        self._turns = Turns(1)
        self._is_closed = False
        self._lock = threading.Lock()
        self._ll_tokenizer: LLTokenizer | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._trial: GrammarTrial | None = None
        self._special_ids: list[int] = []  # in the order of the trial's special tokens

    @property
    def num_cached(self) -> int:
        """Grammars that are remembered."""
        return len(self._cache)

    def __contains__(self, output: StructuredOutput) -> bool:
        """Whether ``matcher`` may be asked for this one."""
        compiled = self._cache.get(output)
        return compiled is not None and compiled.matcher is not None

    def warm(self) -> None:
        """Prepare the vocabulary, on any thread: half a second for a large one.

        The interpreter lock is held all the while, so a server does it before it is ready.
        """
        if not self._is_supported:
            return
        try:
            self._prepared()
        except Exception:  # a server without grammars is still a server
            logger.exception("no grammars over this vocabulary")

    async def compile(self, output: StructuredOutput) -> None:
        """Have the grammar ready for ``matcher``.

        Those of another salt take turns. Raises ``InvalidParameterError`` naming ``output.param``:
        it is not a grammar, nothing matches it, or it is past a limit; and ``QueueFullError`` when
        too many are compiled before it, or the machine is too busy to compile it in time.
        """
        if not self._is_supported:
            raise InvalidParameterError(
                f"{output.param} is not supported with this model's tokenizer",
                param=output.param,
                code="unsupported_parameter",
            )
        size = len(output.text) + len(output.whitespace_pattern or "")
        if size > MAX_GRAMMAR_CHARACTERS:
            raise InvalidParameterError(
                f"{output.param} must be at most {MAX_GRAMMAR_CHARACTERS} characters long, "
                f"got {size}",
                param=output.param,
                code="invalid_value",
            )
        compiled = self._cache.get(output)
        if compiled is None:
            task = self._running.get(output)
            if task is None:
                task = asyncio.create_task(self._compile(output))
                self._running[output] = task
                task.add_done_callback(lambda _: self._running.pop(output, None))
            compiled = await asyncio.shield(task)
        self._keep(output, compiled)
        if compiled.matcher is None:
            raise InvalidParameterError(
                f"{output.param} cannot be used as a grammar: {compiled.error}",
                param=output.param,
                code="invalid_value",
            )

    def matcher(self, output: StructuredOutput) -> LLMatcher:
        """A matcher at the start of a grammar that was compiled just now. Raises ``KeyError``."""
        compiled = self._cache[output]
        assert compiled.matcher is not None
        return compiled.matcher.deep_copy()

    def close(self) -> None:
        """Compile nothing more. Idempotent; does not wait for work that runs."""
        self._is_closed = True
        self._let_go()

    def _let_go(self) -> None:
        """Leave the thread and the worker to what they do."""
        pool, self._pool = self._pool, None
        trial, self._trial = self._trial, None
        if trial is not None:
            trial.close()
        if pool is not None:
            pool.shutdown(wait=False)

    @property
    def _is_supported(self) -> bool:
        # Without a decoder that works by the byte, what a token adds to a text is not known.
        has_bytes = self._tokenizer.pieces(skip_special_tokens=False) is not None
        return has_bytes and bool(self._eos_token_ids)

    def _prepared(self) -> LLTokenizer:
        with self._lock:
            if self._ll_tokenizer is None:
                self._ll_tokenizer = self._new_ll_tokenizer()
            return self._ll_tokenizer

    def _new_ll_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        vocabulary = _Vocabulary(self._tokenizer, self._eos_token_ids, self._vocab_size)
        return LLTokenizer(
            vocabulary,  # type: ignore[arg-type]
            n_vocab=self._vocab_size,
            eos_token=sorted(self._eos_token_ids),
        )

    async def _compile(self, output: StructuredOutput) -> _Compiled:
        async with AsyncExitStack() as place:
            try:
                async with asyncio.timeout(self._timeout_s):
                    await place.enter_async_context(self._turns.place(output.salt))
            except TimeoutError:
                raise self._busy(f"too many grammars are compiled before {output.param}") from None
            return await self._compile_now(output)

    def _busy(self, message: str) -> QueueFullError:
        return QueueFullError(
            f"{message}: the limit is {self._timeout_s:g} s", retry_after_s=self._timeout_s
        )

    async def _compile_now(self, output: StructuredOutput) -> _Compiled:
        if self._is_closed:
            raise EngineDeadError("the server is shutting down")
        if self._pool is None or self._trial is None:
            names = {i: self._tokenizer.token_bytes(i) for i in self._tokenizer.all_special_ids}
            self._special_ids = [i for i, name in names.items() if name]
            self._trial = self._new_trial([names[i] for i in self._special_ids])
            self._pool = ThreadPoolExecutor(1, "grammar", initializer=_yield_to_others)
        future = asyncio.get_running_loop().run_in_executor(
            self._pool, self._work, output, self._trial
        )
        try:
            async with asyncio.timeout(self._timeout_s):
                return await future
        except TimeoutError:
            # The thread cannot be stopped: leave it its pool, so that it delays nobody else.
            self._let_go()
            raise self._busy(f"the machine is too busy to compile {output.param}") from None

    def _work(self, output: StructuredOutput, trial: GrammarTrial) -> _Compiled:
        verdict = trial(Task(output.kind.value, output.text, output.whitespace_pattern))
        size = len(output.text)
        if verdict.error:
            return _Compiled(None, verdict.error, size)
        from llguidance import LLMatcher

        from streamserve.engine.grammar_worker import parser_limits, short
        from streamserve.engine.lark_writer import with_special_ids

        tokenizer = self._prepared()
        grammar = with_special_ids(verdict.grammar, self._special_ids)
        matcher = LLMatcher(tokenizer, grammar, limits=parser_limits(), log_level=0)
        matcher.compute_bitmask()  # the first is the slowest
        if matcher.is_error():
            return _Compiled(None, short(matcher.get_error()), size)
        return _Compiled(matcher, "", size)

    def _keep(self, output: StructuredOutput, compiled: _Compiled) -> None:
        """Make it the newest, and forget the oldest beyond the limits."""
        if output not in self._cache:
            self._num_characters += compiled.num_characters
            self._cache[output] = compiled
        self._cache.move_to_end(output)
        while len(self._cache) > 1 and (
            len(self._cache) > self._max_entries or self._num_characters > self._max_characters
        ):
            _, oldest = self._cache.popitem(last=False)
            self._num_characters -= oldest.num_characters


def _yield_to_others() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
