"""What Flower's SuperLink leaves in its log: what an operator can use, and not without end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WORK = """
import logging, sys
from pathlib import Path
from fedtune.deploy import superlink
from fedtune.flower.internals import take_over_log

superlink.LARGEST_LOG = 2000
superlink._log_to(Path(sys.argv[1]))
take_over_log()
flower = logging.getLogger("flwr")
flower.error("Failed to store object ab: NoObjectInStoreError: Object was not pre-registered.")
flower.info("[Fleet.PushMessages] Push replies from node_id=1")
flower.error("Failed to store object cd: disk I/O error")
if sys.argv[2:]:
    for number in range(1000):
        logging.getLogger("uvicorn.error").warning("Invalid HTTP request received. %d", number)
"""


def logged(path: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", WORK, path, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stdout + done.stderr == ""
    return path.read_text()


def test_only_what_is_wrong_is_logged_once_and_without_colours(tmp_path: Path) -> None:
    [line] = logged(tmp_path / "superlink.log").splitlines()
    assert line.endswith(" ERROR flwr: Failed to store object cd: disk I/O error")


def test_whoever_causes_warnings_does_not_fill_the_disk(tmp_path: Path) -> None:
    last = logged(tmp_path / "superlink.log", "many").splitlines()[-1]
    assert last.endswith(" WARNING uvicorn.error: Invalid HTTP request received. 999")
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["superlink.log", "superlink.log.1"]
    assert all(file.stat().st_size <= 2000 for file in files)
