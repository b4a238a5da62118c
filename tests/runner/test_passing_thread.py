"""Work beside the steps."""

import subprocess
import sys

PROGRAM = """
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
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "left in order\n"
