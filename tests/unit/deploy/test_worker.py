"""The two processes of a site: one does not outlive the other."""

from __future__ import annotations

import subprocess
import sys

BUSY = """
import sys, threading
from fedtune.deploy.worker import end_with
threading.Thread(target=end_with, args=(0,), daemon=True).start()
print("begun", flush=True)
while True:
    pass
"""


def test_a_training_process_ends_in_the_middle_of_its_work_when_nobody_asks_any_more(
    child_environment: dict[str, str],
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BUSY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=child_environment,
    ) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == b"begun\n"
            process.stdin.write(b"a request that is not read")
            process.stdin.flush()
            assert process.poll() is None
            process.stdin.close()
            assert process.wait(30) == 0
        finally:
            process.kill()
