"""Work beside the steps."""

from tests.interpreter import run_python

BACKGROUND = """
import time
from threading import Event
from streamserve.runner.passing_thread import in_background

begun = Event()

def work(is_exiting):
    begun.set()
    while not is_exiting():
        time.sleep(0.001)
    print("left in order", flush=True)

in_background(work)
begun.wait()
"""


def test_the_end_of_the_process_waits_for_work_in_the_background():
    assert run_python("-c", BACKGROUND, timeout_s=60).stdout == "left in order\n"


INTERRUPTED = """
import os
import signal
import time
from streamserve.runner.passing_thread import on_passing_thread

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored

def work():
    os.kill(os.getpid(), signal.SIGINT)
    while True:
        time.sleep(0.001)

try:
    on_passing_thread(work)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_an_interrupt_ends_the_work_and_with_it_the_process():
    done = run_python("-c", INTERRUPTED, timeout_s=60)
    assert (done.stdout, done.stderr) == ("interrupted\n", "")
