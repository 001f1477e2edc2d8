"""A site's training process: it alone holds the base model, the data and the identity.

See `fedtune.deploy.worker` for who starts it and how they talk.
"""

from __future__ import annotations

import json
import logging
import os
import select
import sys
import threading
from pathlib import Path
from typing import NoReturn

from fedtune.deploy.machine import make_machine
from fedtune.deploy.site_files import SiteFiles
from fedtune.deploy.worker import (
    ANSWER,
    FAILURE,
    QUESTIONS,
    READY,
    REFUSAL,
    read_frame,
    write_frame,
)
from fedtune.errors import FedtuneError, WireError

logger = logging.getLogger(__name__)


def main() -> NoReturn:
    """What the process does: load everything, then answer until its input ends."""
    threading.Thread(target=_end_with_the_other_process, daemon=True).start()
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    # What anything prints must not get into the answers.
    os.dup2(2, 1)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        machine, words = make_machine(SiteFiles.read(Path(sys.argv[1])))
    except FedtuneError as error:
        write_frame(answers, FAILURE, str(error).encode())
        sys.exit(2)
    write_frame(
        answers, READY, json.dumps({"words": words, "largest": machine.largest_request}).encode()
    )
    while (request := read_frame(requests)) is not None:
        question, payload = request
        try:
            answer = getattr(machine, QUESTIONS[question])(payload)
            kind = ANSWER
        except WireError as error:
            kind, answer = REFUSAL, str(error).encode()
        except FedtuneError as error:
            kind, answer = FAILURE, str(error).encode()
        except Exception as error:  # a text of an exception can quote data: it stays here
            logger.exception("a request failed")
            kind, answer = FAILURE, f"raised {type(error).__name__}".encode()
        write_frame(answers, kind, answer)
    sys.exit(0)


def _end_with_the_other_process() -> None:
    """End when nobody asks any more, even in the middle of training.

    The process that asked was killed: the next one starts a training process of its own, which
    must not find this one at the same work, on the same accelerator.
    """
    closed = select.poll()
    closed.register(sys.stdin.fileno(), 0)  # no event but that the other end is closed
    closed.poll()
    os._exit(0)


if __name__ == "__main__":
    main()
