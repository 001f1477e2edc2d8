"""What a server and a site say of the same rounds, each in its own log."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fedtune.audit.entry import Entry, Event

AGREED = ("config", "base", "manifest", "roster")


@dataclass
class Comparison:
    """Rounds by number, as far as the server's log goes.

    That a site has answered and was not counted is no contradiction: its answer came too late, or
    something was wrong with it, which the server's log says.
    """

    run: str = ""
    rounds: list[int] = field(default_factory=list)
    counted: list[int] = field(default_factory=list)
    not_counted: list[int] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)


def compare_logs(server: Iterable[Entry], site: Iterable[Entry], name: str) -> Comparison:
    """Where the server's log contradicts that of the site `name`; both are verified already."""
    found, terms = Comparison(), {}
    for entry in server:
        if entry.event is Event.SERVER_STARTED:
            found.run = str(entry.details["run"])
            terms = {key: entry.details[key] for key in AGREED}
        if entry.event is Event.ROUND_COMMITTED and isinstance(entry.details["round"], int):
            found.rounds.append(entry.details["round"])
            counted = entry.details["counted"]
            if isinstance(counted, tuple) and name in counted:
                found.counted.append(found.rounds[-1])
    answered = set()
    own: dict[str, object] = {}
    for entry in site:
        if entry.event is Event.SITE_STARTED:
            own = {key: entry.details[key] for key in AGREED}
        if entry.event is not Event.REQUEST_ANSWERED or entry.details.get("run") != found.run:
            continue
        number = entry.details.get("round")
        if entry.details["request"] != "train" or not isinstance(number, int):
            continue
        answered.add(number)
        found.differences += [
            f"entry {entry.number} of the site: in round {number} it had another {key}, "
            f"{str(own.get(key))[:16]}, than the server, {str(terms[key])[:16]}"
            for key in AGREED
            if own.get(key) != terms[key]
        ]
    found.differences += [
        f"round {number}: the server says that it counted {name}, which has answered no request "
        "to train"
        for number in found.counted
        if number not in answered
    ]
    found.not_counted = sorted((answered & set(found.rounds)) - set(found.counted))
    return found
