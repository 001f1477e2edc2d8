"""A site's training process: it alone holds the base model, the data and the identity.

See `fedtune.deploy.worker` for who starts it and how they talk.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, Protocol

from fedtune.deploy.site_files import SiteFiles
from fedtune.deploy.worker import (
    ANSWER,
    FAILURE,
    QUESTIONS,
    READY,
    REFUSAL,
    STOP,
    end_with,
    read_frame,
    write_frame,
)
from fedtune.errors import AuditWriteError, FedtuneError, WireError
from fedtune.round.machine import Machine

logger = logging.getLogger(__name__)


class SiteMachine(Machine, Protocol):
    """What answers at a site."""

    @property
    def largest_request(self) -> int:
        """Bytes that no acceptable request exceeds."""


def main() -> NoReturn:
    """What the process does: load everything, then answer until its input ends."""
    from fedtune.deploy.machine import make_machine

    serve(lambda: make_machine(SiteFiles.read(Path(sys.argv[1]))))


def serve(make: Callable[[], tuple[SiteMachine, str]]) -> NoReturn:
    """Answer on the standard output what is asked on the standard input, until that ends.

    `make` gives the machine, and in words what it has loaded.
    """
    # It ends with its input. A signal to all processes of a terminal or of a service is for the
    # process that started it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    # What anything prints must not get into the answers.
    os.dup2(2, 1)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    threading.Thread(target=end_with, args=(requests.fileno(),), daemon=True).start()
    try:
        machine, words = make()
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
        except AuditWriteError as error:
            kind, answer = STOP, str(error).encode()
        except FedtuneError as error:
            kind, answer = FAILURE, str(error).encode()
        except Exception as error:  # a text of an exception can quote data: it stays here
            logger.exception("a request failed")
            kind, answer = FAILURE, f"raised {type(error).__name__}".encode()
        write_frame(answers, kind, answer)
    sys.exit(0)


if __name__ == "__main__":
    main()
