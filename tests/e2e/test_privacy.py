"""Masks, dropouts, budgets and a site's policy, as a person meets them on the command line."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from e2e_helpers import (
    Command,
    Launcher,
    adapter_bytes,
    read_journal,
    read_metrics,
    read_summary,
    tree,
    wait_until,
)

RunMain = Callable[..., tuple[int, str, str]]
Plan = Callable[..., float]
Finished = tuple[Path, str, str]
Private = tuple[str, Path, Command]

ROUNDS = 3
NAMES = ["clinic-0", "clinic-1", "clinic-2", "clinic-3"]
EXAMPLES = (48, 40, 32, 24)
PLAIN = ("--set", "secagg.enabled=false")
FIFTH, HALF = ("--drop", "0.2"), ("--drop", "0.5")  # one and two of the four clients
NOISE = ("--set", "privacy.noise-multiplier=1.0")
UNITS = {
    "client": ("--set", "privacy.unit=client", "--set", "aggregate.weighting=uniform"),
    "record": ("--set", "privacy.unit=record"),
}
IN_WORDS = {"client": "all data of one client", "record": "one training example of one client"}
# By the stage at which two of four clients disappear: how far all of them have come.
COME_TO = {
    "advertise": {"advertised": 2},
    "share": {"advertised": 2, "shared": 2},
    "train": {"shared": 2, "masked": 2},
    "sign": {"masked": 2, "signed": 2},
    "reveal": {"signed": 2, "revealed": 2},
}
STAGES = tuple(COME_TO)
BEFORE_THE_SUM = STAGES[:3]


@pytest.fixture(scope="module")
def shared_launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Starts the runs that several tests look at."""
    launcher = Launcher(tmp_path_factory.mktemp("shared"), tmp_path_factory.mktemp("outputs"))
    yield launcher
    launcher.end_all()


def succeed(launcher: Launcher, *arguments: str | Path) -> Command:
    """Run a command that must not fail."""
    code, command = launcher.run(*arguments)
    assert code == 0, command.stderr
    return command


def fail(launcher: Launcher, *arguments: str | Path) -> str:
    """Run a command whose job must fail; the last line of what it says to a person."""
    code, command = launcher.run(*arguments)
    assert code == 1, command.stderr
    assert "Traceback" not in command.stdout + command.stderr
    return command.stderr.strip().splitlines()[-1]


def rows_of(database: Path, query: str) -> list[tuple[Any, ...]]:
    """What a query finds in one of a run's databases, read without fedtune."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=0)) as opened:
        return opened.execute(query).fetchall()


def stages_of(run: Path) -> dict[str, int]:
    """How many sites have come to which stage of their last session."""
    found = rows_of(run / "sites.db", "SELECT stage FROM sessions WHERE client != ''")
    return dict(Counter(stage for (stage,) in found))


def server_releases(run: Path) -> list[str]:
    """The server's ledger, the oldest entry first."""
    return [text for (text,) in rows_of(run / "journal.db", "SELECT release FROM releases")]


def site_releases(run: Path) -> dict[str, list[str]]:
    """Each site's own ledger, the oldest entry first."""
    found: dict[str, list[str]] = {name: [] for name in NAMES}
    for client, text in rows_of(
        run / "sites.db", "SELECT client, release FROM releases ORDER BY rowid"
    ):
        found[client].append(text)
    return found


def charged(run: Path) -> list[int]:
    """How many entries each site's own ledger has."""
    return [len(entries) for entries in site_releases(run).values()]


def passport_of(run: Path) -> dict[str, Any]:
    passport: dict[str, Any] = json.loads((run / "adapter" / "passport.json").read_text())
    return passport


@pytest.fixture(scope="module")
def fewer(shared_launcher: Launcher, quick: list[str]) -> Path:
    """A run in the clear in which one client of each round never trains."""
    succeed(shared_launcher, *quick, "--out", "fewer", *PLAIN, *FIFTH)
    return shared_launcher.folder / "fewer"


@pytest.fixture(scope="module", params=list(UNITS))
def private(request: pytest.FixtureRequest, shared_launcher: Launcher, quick: list[str]) -> Private:
    """The unit and a finished run under it, of two rounds with a noise multiplier of 1."""
    unit = request.param
    flags = ("--rounds", "2", *UNITS[unit], *NOISE)
    command = succeed(shared_launcher, *quick, "--out", unit, *flags)
    return unit, shared_launcher.folder / unit, command


@pytest.fixture
def plan(finished_run: Finished, run_main: RunMain) -> Plan:
    """The epsilon that `fedtune privacy plan` gives for so many rounds of a unit."""
    config = finished_run[0] / "config.toml"
    parameters = read_summary(finished_run[0])["adapter_parameters"]

    def ask(unit: str, rounds: int, examples: int = 48, *more: str) -> float:
        given = {
            "--config": config,
            "--rounds": rounds,
            "--clients": len(NAMES),
            "--parameters": parameters,
            "--examples": examples,
        }
        flags = [word for pair in given.items() for word in pair]
        code, out, err = run_main(
            "privacy", "plan", *flags, *UNITS[unit], *(more or NOISE), "--json"
        )
        assert code == 0, err
        answer: dict[str, Any] = json.loads(out)
        assert (answer["unit"], answer["rounds"]) == (unit, rounds)
        return float(answer["epsilon"])

    return ask


class TestMasks:
    def test_they_change_no_bit_of_the_adapter(
        self, finished_run: Finished, launcher: Launcher, quick: list[str]
    ) -> None:
        masked = finished_run[0]
        succeed(launcher, *quick, "--out", "plain", *PLAIN, "--workers", "0", "--wire")
        plain = launcher.folder / "plain"

        assert adapter_bytes(plain) == adapter_bytes(masked)
        assert passport_of(plain)["adapter_digest"] == passport_of(masked)["adapter_digest"]
        one, other = read_summary(plain), read_summary(masked)
        assert one["final"] == other["final"]
        assert (one["masked"], other["masked"]) == (False, True)
        for clear, hidden in zip(read_metrics(plain), read_metrics(masked), strict=True):
            assert clear["clients"] == hidden["clients"] == NAMES
            # Under masks losses are counted in steps of 2⁻¹⁰, each rounded.
            assert clear["train_loss"] == pytest.approx(hidden["train_loss"], abs=2**-10)
        assert "sums only" in (masked / "report.html").read_text()
        assert "each update" in (plain / "report.html").read_text()
        assert not (plain / "sites.db").exists()

    def test_rules_that_look_at_single_updates_are_refused_by_name(
        self,
        launcher: Launcher,
        quick: list[str],
        run_main: RunMain,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(launcher.folder)
        short = (*quick, "--rounds", "1", "--set", "aggregate.weighting=uniform", "--out")
        for rule in ("median", "krum"):
            code, out, err = run_main(*short, "run", "--set", f"aggregate.rule={rule}")
            assert (code, out, err.count("\n")) == (2, "", 1)
            for part in (f"aggregate.rule = {rule}", "secagg.enabled", "server-optimizer = adam"):
                assert part in err
            assert list(launcher.folder.iterdir()) == []
        # What it says to use instead works, and so does the rule where updates are seen.
        succeed(launcher, *short, "instead", "--set", "aggregate.server-optimizer=adam")
        seen = (*PLAIN, "--set", "update.bits=unset", "--set", "update.clip=unset")
        succeed(launcher, *short, "seen", *seen, "--set", "aggregate.rule=krum")
        assert passport_of(launcher.folder / "seen")["rule"] == "krum"


class TestDropouts:
    @pytest.mark.parametrize("stage", STAGES)
    def test_the_run_finishes_and_who_left_late_is_in_the_sum(
        self, stage: str, finished_run: Finished, fewer: Path, launcher: Launcher, quick: list[str]
    ) -> None:
        command = succeed(launcher, *quick, "--out", "run", *FIFTH, "--drop-at", stage)
        run = launcher.folder / "run"
        metrics, summary = read_metrics(run), read_summary(run)
        late = stage not in BEFORE_THE_SUM

        # The same as a run in which nobody, or just those, were missing.
        assert adapter_bytes(run) == adapter_bytes(finished_run[0] if late else fewer)
        assert adapter_bytes(fewer) != adapter_bytes(finished_run[0])
        assert (summary["status"], summary["rounds"]) == ("finished", ROUNDS)
        lost = [list(row["failed"]) for row in metrics]
        assert lost == ([[]] * ROUNDS if late else [list(r["failed"]) for r in read_metrics(fewer)])
        assert {len(names) for names in lost} == ({0} if late else {1})
        for row, names in zip(metrics, lost, strict=True):
            assert row["clients"] == [name for name in NAMES if name not in names]
        per_client = {client["name"]: client for client in summary["per_client"]}
        for name in NAMES:
            times = sum(name in names for names in lost)
            assert per_client[name]["rounds_failed"] == times
            assert per_client[name]["rounds_completed"] == ROUNDS - times
        page = (run / "report.html").read_text()
        told = 0 if late else ROUNDS
        assert page.count("absent, as rehearsed") == told
        assert len(re.findall(r"clinic-\d failed \(.*absent, as rehearsed", command.stderr)) == told
        # Who left with its update in the sum is told too, as something else.
        assert [len(row["late"]) for row in metrics] == [1 if late else 0] * ROUNDS
        left = re.findall(r"clinic-\d left with its update in the sum", command.stderr)
        assert len(left) == ROUNDS - told

    @pytest.mark.parametrize("stage", STAGES)
    def test_below_the_threshold_nothing_is_opened_and_the_run_can_go_on(
        self, stage: str, finished_run: Finished, launcher: Launcher, quick: list[str]
    ) -> None:
        """Of four clients three must stay, and two are gone."""
        run = launcher.folder / "run"

        code, command = launcher.run(*quick, "--out", "run", *HALF, "--drop-at", stage)

        assert code == 1
        assert "Traceback" not in command.stdout + command.stderr
        last = command.stderr.strip().splitlines()[-1]
        assert re.match(r"fedtune: the run failed: round 1: 2 clients .* needs 3 \(", last)
        why = re.search(r"\((clinic-\d), (clinic-\d): .*absent, as rehearsed\)$", last)
        assert why, last
        summary = read_summary(run)
        assert (summary["status"], summary["rounds"]) == ("failed", 0)
        assert last.removeprefix("fedtune: ") in summary["warnings"]
        assert why[1] in (run / "report.html").read_text().partition("Warnings")[2]
        # Two shares of a mask are less than the three that it takes.
        assert stages_of(run) == COME_TO[stage]
        assert read_journal(run) == []
        sealed = rows_of(run / "journal.db", "SELECT sealed FROM open_round WHERE sealed NOT NULL")
        assert len(sealed) == (stage not in BEFORE_THE_SUM)
        for (notes,) in sealed:
            assert_masked(notes)

        # As the words on the screen say, and without the rehearsal.
        [advice] = re.findall(r"continue with: *fedtune (.*)", command.stdout)
        succeed(launcher, *advice.split())
        assert adapter_bytes(run) == adapter_bytes(finished_run[0])
        assert [row["clients"] for row in read_metrics(run)] == [NAMES] * ROUNDS
        assert read_summary(run)["status"] == "finished"


def assert_masked(notes: bytes) -> None:
    """The sum in the server's notes is uniform on the ring of 18 bits, not a sum of updates."""
    from safetensors.numpy import load

    total = load(notes)["total"].astype(np.int64)
    assert 0 <= total.min() <= total.max() < 2**18
    counts = np.bincount(total >> 14, minlength=16)
    expected = len(total) / 16
    # Chi-squared with 15 degrees of freedom is above 60 with a probability of 2e-7. A sum of
    # updates is near 0 modulo the ring: then all values are in the first and the last part.
    assert ((counts - expected) ** 2 / expected).sum() < 60


class TestEpsilon:
    def test_it_stands_everywhere_as_planned(self, private: Private, plan: Plan) -> None:
        unit, run, command = private
        summary, passport = read_summary(run), passport_of(run)

        # The smallest client has the largest epsilon: each example is in more of its batches.
        assert summary["epsilon"] == pytest.approx(plan(unit, 2, min(EXAMPLES)), rel=1e-9)
        assert passport["epsilon"] == summary["epsilon"]
        assert passport["epsilon_unit"] == summary["epsilon_unit"]
        assert summary["epsilon_unit"].startswith(IN_WORDS[unit])
        for text in ((run / "report.html").read_text(), " ".join(command.stdout.split())):
            assert IN_WORDS[unit] in text
            assert "delta 1e-05" in text
        assert f"ε = {summary['epsilon']:.2f}" in (run / "report.html").read_text()
        assert f"privacy spent: epsilon {summary['epsilon']:.3g}" in command.stdout
        # A plan that differs in what matters differs in epsilon.
        assert plan(unit, 1, min(EXAMPLES)) < summary["epsilon"] < plan(unit, 3, min(EXAMPLES))
        if unit == "record":
            assert plan(unit, 2, max(EXAMPLES)) < summary["epsilon"]

    def test_it_is_hardly_more_than_what_is_exact(self, private: Private) -> None:
        """Exact: of the Gaussian mechanism for large Skellam noise, numerically for DP-SGD."""
        unit, run, _ = private
        exact = gaussian_epsilon(math.sqrt(2), 1e-5)
        if unit == "record":
            from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
            from dp_accounting.pld import PLDAccountant

            step = PoissonSampledDpEvent(8 / min(EXAMPLES), GaussianDpEvent(1.0))
            exact = PLDAccountant().compose(step, 2 * 6).get_epsilon(1e-5)
        assert exact < read_summary(run)["epsilon"] < 1.15 * exact

    def test_every_release_was_entered_once(self, private: Private) -> None:
        unit, run, _ = private
        assert len(server_releases(run)) == (2 if unit == "client" else 0)
        assert charged(run) == [2] * 4
        entries = [json.loads(text) for texts in site_releases(run).values() for text in texts]
        kinds = {release["kind"] for entry in entries for release in entry["releases"]}
        assert kinds == {unit}

    def test_a_calibrated_run_spends_its_budget_and_no_more(
        self, launcher: Launcher, quick: list[str], plan: Plan
    ) -> None:
        budget = ("--set", "privacy.epsilon=4")
        succeed(launcher, *quick, "--out", "run", *UNITS["client"], *budget)
        epsilon = read_summary(launcher.folder / "run")["epsilon"]
        assert 3.99 < epsilon <= 4
        assert epsilon == pytest.approx(plan("client", ROUNDS, 48, *budget), rel=1e-9)

    def test_a_round_above_the_federations_budget_is_refused_after_a_resume_too(
        self, launcher: Launcher, quick: list[str], plan: Plan
    ) -> None:
        one, two = plan("client", 1), plan("client", 2)
        budget = ("--set", f"privacy.epsilon={(one + two) / 2}")
        run = launcher.folder / "run"

        said = fail(launcher, *quick, "--out", "run", *UNITS["client"], *NOISE, *budget)

        assert f"round 2 would bring epsilon to {two:.3f} at delta 1e-05" in said
        assert "above privacy.epsilon = " in said
        before, adapter = read_summary(run), adapter_bytes(run)
        assert (before["status"], before["rounds"]) == ("failed", 1)
        assert before["epsilon"] == pytest.approx(one, rel=1e-9)
        assert passport_of(run)["epsilon"] == before["epsilon"]
        entered = server_releases(run), site_releases(run)
        assert (len(entered[0]), charged(run)) == (1, [1] * 4)

        assert fail(launcher, "simulate", "--resume", "run", "--workers", "0") == said

        assert read_summary(run)["epsilon"] == before["epsilon"]
        assert (server_releases(run), site_releases(run)) == entered
        assert adapter_bytes(run) == adapter
        assert [row["round"] for row in read_journal(run)] == [1]

    @pytest.mark.parametrize("unit", list(UNITS))
    def test_a_budget_below_one_round_releases_nothing(
        self, unit: str, launcher: Launcher, quick: list[str], plan: Plan
    ) -> None:
        least = plan(unit, 1, max(EXAMPLES))
        budget = ("--set", f"privacy.epsilon={0.9 * least}")
        run = launcher.folder / "run"

        said = fail(launcher, *quick, "--out", "run", *UNITS[unit], *NOISE, *budget)

        assert re.search(r"round 1 would bring epsilon to \d+\.\d+ at delta 1e-05, above", said)
        assert f"{0.9 * least:g}" in said
        assert (read_summary(run)["epsilon"], read_journal(run)) == (0, [])
        assert (server_releases(run), charged(run)) == ([], [0] * 4)
        assert not {"masked", "signed", "revealed"} & set(stages_of(run))

    def test_sites_refuse_a_round_above_their_budget_after_a_resume_too(
        self, launcher: Launcher, quick: list[str], plan: Plan
    ) -> None:
        """Every example is in every batch, so all sites have spent their budgets at once."""
        steps = (*NOISE, "--set", "train.batch-size=64", "--set", "train.steps=1")
        one, two = (plan("record", rounds, max(EXAMPLES), *steps) for rounds in (1, 2))
        assert one < two
        flags = (*UNITS["record"], *steps, "--set", f"privacy.epsilon={(one + two) / 2}")
        run = launcher.folder / "run"

        said = fail(launcher, *quick, "--out", "run", *flags)

        assert f"clinic-1 and 2 more: round 2 would bring epsilon to {two:.3f}" in said
        assert [row["round"] for row in read_journal(run)] == [1]
        entered, adapter = site_releases(run), adapter_bytes(run)
        assert charged(run) == [1] * 4
        assert read_summary(run)["epsilon"] == pytest.approx(one, rel=1e-9)

        said = fail(launcher, "simulate", "--resume", "run", "--workers", "0")

        assert f"would bring epsilon to {two:.3f}" in said
        assert [row["clients"] for row in read_journal(run) if row["clients"]] == [NAMES]
        assert (site_releases(run), adapter_bytes(run)) == (entered, adapter)
        assert read_summary(run)["epsilon"] == pytest.approx(one, rel=1e-9)

    def test_the_ledgers_only_grow_whatever_fails(
        self, launcher: Launcher, quick: list[str], plan: Plan
    ) -> None:
        """What was masked twice is charged twice at the site; what was summed once, once."""
        run = launcher.folder / "run"
        entered: tuple[list[str], dict[str, list[str]]] = ([], {name: [] for name in NAMES})

        def grown() -> None:
            nonlocal entered
            now = server_releases(run), site_releases(run)
            assert now[0][: len(entered[0])] == entered[0]
            for name in NAMES:
                assert now[1][name][: len(entered[1][name])] == entered[1][name]
            entered = now

        start = (*quick, "--rounds", "2", "--out", "run", *UNITS["client"], *NOISE)
        fail(launcher, *start, *HALF, "--drop-at", "train")
        grown()
        assert (len(entered[0]), sorted(charged(run))) == (0, [0, 0, 1, 1])
        assert read_summary(run)["epsilon"] == 0  # nothing was opened
        fail(launcher, "simulate", "--resume", "run", *HALF, "--drop-at", "sign")
        grown()
        assert (len(entered[0]), sorted(charged(run))) == (1, [1, 1, 2, 2])
        assert read_summary(run)["epsilon"] == pytest.approx(plan("client", 1), rel=1e-9)
        succeed(launcher, "simulate", "--resume", "run")
        grown()
        assert (len(entered[0]), sorted(charged(run))) == (2, [2, 2, 3, 3])
        assert read_summary(run)["epsilon"] == pytest.approx(plan("client", 2), rel=1e-9)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The least epsilon of a Gaussian mechanism of sensitivity `mu` and deviation 1, exactly.

    Balle and Wang 2018 (arXiv 1805.06530), theorem 8; compositions add up squares of `mu`.
    """

    def normal(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    def excess(epsilon: float) -> float:
        low, high = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
        return normal(low) - math.exp(epsilon) * normal(high) - delta

    low, high = 0.0, 100.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return high


class TestPolicy:
    @pytest.mark.parametrize(
        ("policy", "flags", "says"),
        [
            ("min-threshold = 0.9", (), "policy.min-threshold does not allow a lower threshold"),
            (
                'share-metrics = "never"',
                (),
                "policy.share-metrics does not allow weighting by examples",
            ),
            ("min-noise = 1.5", (*UNITS["record"], *NOISE), "policy.min-noise of this site is 1.5"),
            (
                "max-epsilon = 0.1",
                (*UNITS["client"], *NOISE),
                "this site's budget for all its runs of 0.1",
            ),
            ("min-cohort = 5", (), "policy.min-cohort is 5"),
            (
                "require-masking = true",
                ("--set", "secagg.enabled=false"),
                "policy.require-masking does not allow no masking",
            ),
        ],
    )
    def test_what_the_sites_forbid_does_not_happen(
        self, policy: str, flags: tuple[str, ...], says: str, launcher: Launcher, quick: list[str]
    ) -> None:
        (launcher.folder / "client.toml").write_text(f"[policy]\n{policy}\n")
        run = launcher.folder / "run"

        said = fail(launcher, *quick, "--out", "run", *flags, "--policy", "client.toml")

        assert said.startswith("fedtune: the run failed: ")
        assert says in said
        assert not {"masked", "signed", "revealed"} & set(stages_of(run))
        assert (read_journal(run), charged(run)) == ([], [0] * 4)
        assert read_summary(run)["status"] == "failed"
        assert says in unescape((run / "report.html").read_text())

    def test_the_packaged_example_allows_the_preset(
        self, finished_run: Finished, launcher: Launcher, quick: list[str], root: Path
    ) -> None:
        policy = root / "client" / "client.toml"
        command = succeed(launcher, *quick, "--out", "run", "--policy", policy)
        assert "refused" not in command.stderr
        assert adapter_bytes(launcher.folder / "run") == adapter_bytes(finished_run[0])

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            (None, "client.toml"),
            ("[policy", "client.toml: not valid TOML"),
            ("[policy]\nmin-treshold = 0.9", "did you mean policy.min-threshold?"),
            ("[policy]\nmin-cohort = 0", "policy.min-cohort"),
            ("min-cohort = 3", "min-cohort: unknown key"),
        ],
    )
    def test_a_policy_that_cannot_be_read_is_told_before_anything_is_written(
        self,
        text: str | None,
        says: str,
        run_main: RunMain,
        quick: list[str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        if text is not None:
            (tmp_path / "client.toml").write_text(text)
        before = tree(tmp_path)

        code, out, err = run_main(*quick, "--out", "run", "--policy", "client.toml")

        assert (code, out, err.count("\n")) == (2, "", 1)
        assert says in err
        assert tree(tmp_path) == before


class TestInterrupt:
    @pytest.mark.parametrize("moment", ["masking", "sealed"])
    def test_ctrl_c_in_the_middle_of_a_masked_round(
        self, moment: str, finished_run: Finished, launcher: Launcher, quick: list[str]
    ) -> None:
        """While some sites have sent their values, or when all have and the sum is not open."""
        run = launcher.folder / "run"
        command = launcher.warm(*quick, "--out", "run")
        reached = in_sealed_round if moment == "sealed" else in_training

        def stopped() -> bool:
            """Whether the whole process group stands still at the moment."""
            assert command.running, command.stderr
            if not reached(run):
                return False
            os.killpg(command.pid, signal.SIGSTOP)
            wait_until(lambda: all_stopped(command), "the processes to stop")
            if reached(run):
                return True
            os.killpg(command.pid, signal.SIGCONT)
            return False

        wait_until(stopped, "the middle of a round")
        committed = len(read_journal(run))
        command.interrupt()
        os.killpg(command.pid, signal.SIGCONT)

        assert command.wait() == 130
        assert "Traceback" not in command.stderr
        assert read_summary(run)["status"] == "interrupted"
        assert len(read_journal(run)) == committed < ROUNDS
        code, again = launcher.run(*quick, "--out", "run")
        assert code == 2
        assert "run exists already" in again.stderr
        advice = command.stderr.strip().rpartition("go on with: fedtune ")[2]
        succeed(launcher, *advice.split())
        assert adapter_bytes(run) == adapter_bytes(finished_run[0])
        assert [row["clients"] for row in read_metrics(run)] == [NAMES] * ROUNDS


def in_training(run: Path) -> bool:
    """Whether some sites have masked their values in the open round, and some have not."""
    try:
        return {"masked", "shared"} <= set(stages_of(run))
    except sqlite3.OperationalError:  # not there yet, or just being written
        return False


def in_sealed_round(run: Path) -> bool:
    """Whether the sum of the open round is in the journal, masked."""
    try:
        return bool(rows_of(run / "journal.db", "SELECT 1 FROM open_round WHERE sealed NOT NULL"))
    except sqlite3.OperationalError:
        return False


def all_stopped(command: Command) -> bool:
    """Whether the command and its workers stand still."""
    states = [
        (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
        for pid in (command.pid, *command.workers())
    ]
    return set(states) == {"T"}
