"""What the other ranks do: the first one's calls, on a runner of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future

from streamserve.core.plan import ModelRunner, ModelRunnerOutput
from streamserve.runner.tensor_parallel.messages import Call, Launch, Message, Sample

# Of nobody: it says that the first rank draws in another way than by arg-max.
_SOME_MASKS = {"": b""}


def follow(
    receive: Callable[[], Message],
    runner: ModelRunner,
    commands: Mapping[str, Callable[[], None]],
    fail: Callable[[BaseException], None],
) -> None:
    """Does what comes until no more comes, then closes the runner.

    ``fail`` is called, on the runner's thread, with the error of a step, or that of its death.
    """

    def check(future: Future[ModelRunnerOutput]) -> None:
        error = future.exception()
        if error is not None:
            fail(error)

    runner.on_death(fail)
    while (message := receive()) is not None:
        match message:
            case Launch(plan):
                runner.launch(plan)
            case Sample(step_id, has_masks):
                masks = _SOME_MASKS if has_masks else None
                runner.sample(step_id, masks).add_done_callback(check)
            case Call(name):
                commands[name]()
    runner.close()
