"""What rounds ask of a site, whatever it trains with: its policy, bytes, time."""

from __future__ import annotations

from fedtune.deploy.doctor.findings import FIRST, Examination, Verdict
from fedtune.deploy.doctor.traffic import predict_traffic, site_disk
from fedtune.deploy.keys import Members
from fedtune.deploy.site_files import SiteFiles
from fedtune.report import words
from fedtune.round.policy import check_policy


def examine_policy(
    examination: Examination, files: SiteFiles, members: Members, base_digest: str
) -> None:
    """Whether the site's policy allows what the federation asks for."""
    config = files.federation
    digest = members.roster.digest if config.secagg.enabled else None

    def policy() -> Verdict[None]:
        check_policy(files.config.policy, config, base_digest, config.aggregate.rule, digest)
        return Verdict("ok", "this site's policy allows what the federation asks for")

    examination.run("policy", policy)


def examine_traffic(
    examination: Examination, files: SiteFiles, adapter: int, members: Members | None
) -> int | None:
    """What a round sends, with an adapter of so many values; bytes that the site needs on disk."""
    config, name = files.federation, files.config.site.name
    examination.begin("a round")
    if members is None:
        examination.skip("traffic", "there is no roster", FIRST)
        return None
    names = list(members.transport)

    def traffic() -> Verdict[int]:
        found = predict_traffic(config, adapter, name, names)
        text = (
            f"about {words.size(found.up)} up and {words.size(found.down)} down in each of "
            f"{words.plural(config.rounds.count, 'round')}, and what HTTP and TLS add"
        )
        numbers = {"bytes_up_per_round": found.up, "bytes_down_per_round": found.down}
        return Verdict("ok", text, numbers=numbers, value=site_disk(config, adapter, len(names)))

    return examination.run("traffic", traffic)


def examine_time(
    examination: Examination, files: SiteFiles, measured: bool, possible: bool
) -> None:
    """How long training takes, if `measured` and `possible`."""
    examination.begin("a round")
    train, timeout = files.federation.train, files.federation.rounds.timeout

    def timed() -> Verdict[None]:
        from fedtune.deploy.doctor.measure import measure

        found = measure(files.path)
        seconds = found.seconds_per_step * train.steps
        text = (
            f"{words.duration(seconds)} of training per round ({train.steps} steps of "
            f"{found.seconds_per_step:.3f} s), at most {words.size(found.peak_bytes)} of memory"
        )
        numbers = {
            "seconds_per_step": found.seconds_per_step,
            "seconds_per_round": seconds,
            "peak_bytes": found.peak_bytes,
        }
        advice = "lower train.steps or raise rounds.timeout, with all parties"
        if seconds > timeout:
            text += f", but rounds.timeout is {words.duration(timeout)}"
            return Verdict("problem", text, advice, numbers)
        if seconds > timeout / 2:
            text += f", and rounds.timeout is {words.duration(timeout)}"
            return Verdict("warning", text, advice, numbers)
        return Verdict("ok", text, numbers=numbers)

    if measured and possible:
        examination.run("training", timed, FIRST)
    elif measured:
        examination.skip("training", "there is no model to train, or there are no rows", FIRST)
    else:
        examination.skip(
            "training", "not timed, since it loads the base model", "fedtune doctor --measure"
        )
