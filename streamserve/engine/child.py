"""A process of our own code, and the socket to it."""

from __future__ import annotations

import socket
import subprocess
import sys

_PROGRAM = "import sys; sys.path[:] = {path!r}; from {module} import main; main({args})"


def start_child(
    module: str, *args: float, is_silent: bool = False
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start Python with ``module``'s ``main(fd, *args)``; ``fd`` is the other end of the socket.

    It is in a session of its own: a terminal's Ctrl-C is for the server. ``is_silent`` drops what
    it prints.
    """
    ours, theirs = socket.socketpair()
    output = subprocess.DEVNULL if is_silent else None
    with theirs:
        arguments = ", ".join(map(repr, (theirs.fileno(), *args)))
        program = _PROGRAM.format(path=sys.path, module=module, args=arguments)
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", program],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
    return process, ours
