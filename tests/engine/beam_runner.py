"""A runner with a tree of likely tokens: what may follow depends on what was generated."""

from __future__ import annotations

from concurrent.futures import Future

from streamserve.core.plan import (
    ModelRunnerOutput,
    PromptLogprobs,
    SchedulerOutput,
    TokenLogprobs,
)
from tests.engine.fakes import EOS, FakeRunner


class BeamRunner(FakeRunner):
    """``tree``: text generated so far -> ``"a-0.5 $-2.0"``, tokens with their logprobs.

    ``$`` is the end of sequence. Without a tree every text can go on with letters, the likelier the
    earlier; which is the earliest depends on the text.
    """

    def __init__(self, tree: dict[str, str] | None = None, *, hold: bool = False) -> None:
        super().__init__(hold=hold)
        self._tree = tree
        self._texts: dict[str, list[int]] = {}

    def launch(self, plan: SchedulerOutput) -> None:
        super().launch(plan)
        for new in plan.new_requests:
            self._texts[new.request_id] = list(new.token_ids[new.num_prompt_tokens :])
        for s in plan.scheduled:
            num_prompt = self.known[s.request_id].num_prompt_tokens
            output = self._texts[s.request_id]
            for position, token_id in enumerate(s.token_ids, start=s.start):
                if position >= num_prompt + len(output) and token_id >= 0:
                    output.append(token_id)

    def likely(self, text: list[int]) -> list[tuple[int, float]]:
        if self._tree is None:
            first = sum(text) * 7 % 20
            return [(97 + (first + i) % 20, -0.3 - 0.37 * i) for i in range(20)]
        found = []
        for entry in self._tree[bytes(text).decode()].split():
            token_id = EOS if entry[0] == "$" else ord(entry[0])
            found.append((token_id, float(entry[1:])))
        return found + [(48 + i, -50.0 - i) for i in range(4)]

    def _resolve(self, future: Future[ModelRunnerOutput], plan: SchedulerOutput) -> None:
        error = self._error_of(plan)
        if error is not None:
            future.set_exception(error)
            return
        sampled, logprobs, of_prompts = [], [], {}
        for s in plan.scheduled:
            new = self.known[s.request_id]
            top = self.likely(self._texts[s.request_id][: s.output_position])
            sampled.append([top[0][0]] if s.sample else [])
            count = new.sampling_params.logprobs
            wants = s.sample and count is not None
            logprobs.append([TokenLogprobs(*top[0], tuple(top[:count]))] if wants else [])
            end = min(s.start + len(s.token_ids) + 1, new.num_prompt_tokens)
            if new.sampling_params.prompt_logprobs is not None and s.start + 1 < end:
                entries = [TokenLogprobs(i, -1.0, (), 1) for i in new.token_ids[s.start + 1 : end]]
                of_prompts[s.request_id] = PromptLogprobs(s.start + 1, entries)
        future.set_result(
            ModelRunnerOutput(plan.step_id, sampled, logprobs, prompt_logprobs=of_prompts or None)
        )
