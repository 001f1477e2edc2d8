"""What the tests of the doctor have in common."""

from __future__ import annotations

from fedtune.deploy.doctor.findings import Examination, Finding


def only(examination: Examination, check: str) -> Finding:
    """The one finding of a check."""
    [found] = [finding for finding in examination.findings if finding.check == check]
    return found


def statuses(examination: Examination) -> dict[str, str]:
    """Of each check, what was found last."""
    return {finding.check: finding.status for finding in examination.findings}
