"""Checks, and what they find: each runs on its own, and none ends the others."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, Literal, TypeVar

from fedtune.errors import FedtuneError

Status = Literal["ok", "warning", "problem", "skipped"]
Value = TypeVar("Value")
FIRST = "solve the problems above first"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict(Generic[Value]):
    """What one check found, in one line each: what is, and unless ok what to do.

    `numbers` are for programs; `value` is for the checks that follow, and None where they cannot
    be made.
    """

    status: Status
    finding: str
    advice: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)
    value: Value | None = None


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    group: str
    check: str
    status: Status
    finding: str
    advice: str
    numbers: Mapping[str, float]


class Examination:
    """Runs checks in order and keeps what they find."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self._group = ""

    def begin(self, group: str) -> None:
        """The checks that follow are of this group."""
        self._group = group

    def run(
        self, check: str, look: Callable[[], Verdict[Value]], advice: str = "correct it"
    ) -> Value | None:
        """Add what `look` finds; its value. An error that it raises is a problem.

        `advice` is for errors that say none themselves.
        """
        try:
            verdict = look()
        except FedtuneError as error:
            # By the convention of our errors: what was wrong; what to do.
            what, _, todo = str(error).partition("; ")
            verdict = Verdict("problem", what, todo or advice)
        except Exception as error:  # a text of an exception can quote data: it stays here
            logger.debug("the check %r failed", check, exc_info=True)
            verdict = Verdict(
                "problem",
                f"the check itself failed with {type(error).__name__}",
                "see why with --debug, and report it",
            )
        self.add(check, verdict)
        return verdict.value

    def skip(self, check: str, why: str, advice: str) -> None:
        """Say that a check could not be made."""
        self.add(check, Verdict("skipped", why, advice))

    def add(self, check: str, verdict: Verdict[Any]) -> None:
        """Add what was found."""
        self.findings.append(
            Finding(
                self._group,
                check,
                verdict.status,
                verdict.finding,
                verdict.advice,
                verdict.numbers,
            )
        )

    @property
    def failed(self) -> bool:
        """Whether there is a problem."""
        return any(finding.status == "problem" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        counts = Counter(finding.status for finding in self.findings)
        return {
            "problems": counts["problem"],
            "warnings": counts["warning"],
            "findings": [asdict(finding) for finding in self.findings],
        }
