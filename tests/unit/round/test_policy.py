"""What a site forbids it does not do, whoever asks; and it stops when its budget is spent."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from unit.round.masked_run import CLIENT_UNIT, MASKED, RECORD_UNIT, UPDATE

from fedtune.config import OPEN_POLICY, Policy, parse_config
from fedtune.errors import (
    BudgetExceeded,
    PolicyRefusal,
    ProtocolViolation,
    TooFewClients,
)
from fedtune.privacy.accountant import Ledger
from fedtune.round.policy import check_noise, check_policy
from fedtune.secagg.keys import SERVER, Roster
from fedtune.train.trainer import LocalResult
from fedtune.wire import codec

FOUR = (7, 12, 5, 9)
BASE = "ab" * 32
ROSTER = Roster({SERVER: bytes(32), "a": bytes([1] * 32)}).digest
UNIFORM = "aggregate.weighting=uniform"
RECORD = (*MASKED, *RECORD_UNIT)
CLIENT = CLIENT_UNIT
PLAIN = UPDATE
WHOLE = ("base.task=visual-question-answering", "adapter.kind=nano", *MASKED)
CUT = (*WHOLE, "base.placement=server")
NOISE = ("split.clip=2.0", "split.eta=5.0")  # 2 · 2 · 5 = 20


def _policy(**keys: Any) -> Policy:
    """One key at a time on top of a policy that allows everything."""
    return OPEN_POLICY.model_copy(update=keys)


# Key, its value, configurations that it forbids, configurations that it allows.
TABLE: list[tuple[str, Any, list[tuple[str, ...]], list[tuple[str, ...]]]] = [
    ("require-masking", True, [PLAIN], [MASKED]),
    ("require-masking", False, [], [PLAIN, MASKED]),
    (
        "min-threshold",
        2 / 3,
        [(*MASKED, "secagg.threshold=0.6"), (*MASKED, "secagg.threshold=0.6666")],
        [MASKED, (*MASKED, "secagg.threshold=0.9"), (*PLAIN, "secagg.threshold=0.6")],
    ),
    (
        "min-colluding",
        0.25,
        [(*MASKED, "secagg.colluding=0.2"), (*MASKED, "secagg.colluding=0.0")],
        [MASKED, (*MASKED, "secagg.colluding=0.3"), (*PLAIN, "secagg.colluding=0.1")],
    ),
    ("require-privacy", "none", [], [PLAIN, MASKED, RECORD, CLIENT]),
    ("require-privacy", "record", [PLAIN, MASKED], [RECORD, CLIENT]),
    ("require-privacy", "client", [PLAIN, MASKED, RECORD], [CLIENT]),
    ("max-epsilon", 3.0, [PLAIN, MASKED], [RECORD, CLIENT]),
    (
        "max-delta",
        1e-6,
        [RECORD, CLIENT, (*CLIENT, "privacy.delta=1.01e-6")],
        [(*CLIENT, "privacy.delta=1e-6"), (*RECORD, "privacy.delta=1e-7"), MASKED],
    ),
    ("max-token-epsilon", 0.0, [CUT, (*CUT, *NOISE)], [PLAIN, MASKED, WHOLE]),
    (
        "max-token-epsilon",
        20.0,
        [CUT, (*CUT, "split.clip=2.0", "split.eta=5.01")],
        [(*CUT, *NOISE), (*CUT, "split.clip=1.0", "split.eta=1.0"), WHOLE, MASKED],
    ),
    ("max-token-epsilon", math.inf, [], [CUT, (*CUT, *NOISE), WHOLE, MASKED]),
    ("base-digests", ("cd" * 32,), [PLAIN, MASKED], []),
    ("base-digests", ("cd" * 32, BASE), [], [PLAIN, MASKED]),
    ("rules", ("median",), [PLAIN, MASKED], []),
    ("rules", ("median", "fedavg"), [], [PLAIN, MASKED]),
    (
        "max-update-norm",
        0.6,
        [(*MASKED, "update.clip=0.61"), ("seed=1",)],  # the second: nothing is clipped at all
        [MASKED, (*MASKED, "update.clip=0.5")],
    ),
    ("share-metrics", "never", [MASKED, PLAIN, (*PLAIN, UNIFORM)], [(*MASKED, UNIFORM), CLIENT]),
    ("share-metrics", "sum", [PLAIN, (*PLAIN, UNIFORM)], [MASKED, CLIENT]),
    ("share-metrics", "each", [], [PLAIN, MASKED, CLIENT]),
    ("roster-digest", "00" * 32, [MASKED, PLAIN], []),
    ("roster-digest", ROSTER.hex(), [PLAIN], [MASKED]),
]
# These are looked at where there is something to look at: see the tests below.
ELSEWHERE = {"min-cohort", "min-noise", "report-failures"}


def _ids(row: Any) -> str:
    return f"{row[0]}={row[1]}"


def test_the_table_has_every_key():
    keys = {name.replace("_", "-") for name in Policy.model_fields}
    assert {row[0] for row in TABLE} | ELSEWHERE == keys


def _check(policy: Policy, overrides: tuple[str, ...]) -> None:
    config = parse_config("", "test", overrides)
    roster = ROSTER if config.secagg.enabled else None
    check_policy(policy, config, BASE, config.aggregate.rule, roster)


@pytest.mark.parametrize("row", TABLE, ids=_ids)
def test_what_a_key_forbids_and_allows(row):
    key, value, forbidden, allowed = row
    policy = _policy(**{key.replace("-", "_"): value})
    for overrides in forbidden:
        with pytest.raises(PolicyRefusal, match=rf"policy\.{key} "):
            _check(policy, overrides)
    for overrides in allowed:
        _check(policy, overrides)


@pytest.mark.parametrize(
    ("least", "noise", "allowed"),
    [(None, 1e-9, True), (0.5, 0.5, True), (0.5, 0.499, False), (2.0, 1.0, False), (0.1, 9, True)],
)
def test_least_noise(least, noise, allowed):
    policy = _policy(min_noise=least)
    if allowed:
        check_noise(policy, noise)
    else:
        with pytest.raises(PolicyRefusal, match="min-noise"):
            check_noise(policy, noise)


def test_a_site_that_says_nothing_trains_under_masks_only():
    default = Policy()
    _check(default, MASKED)
    _check(default, CLIENT)
    for overrides in (PLAIN, (*MASKED, "secagg.threshold=0.5")):
        with pytest.raises(PolicyRefusal):
            _check(default, overrides)


# ---------------------------------------------------------------------------- at every door alike
FORBID_MASKED: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("min-threshold", {"min_threshold": 0.9}, MASKED),
    ("min-colluding", {"min_colluding": 0.4}, MASKED),
    ("require-privacy", {"require_privacy": "record"}, MASKED),
    ("max-epsilon", {"max_epsilon": 1.0}, MASKED),
    ("max-delta", {"max_delta": 1e-9}, CLIENT),
    ("base-digests", {"base_digests": ("00" * 32,)}, MASKED),
    ("rules", {"rules": ("median",)}, MASKED),
    ("max-update-norm", {"max_update_norm": 0.1}, MASKED),
    ("share-metrics", {"share_metrics": "never"}, MASKED),
    ("roster-digest", {"roster_digest": "00" * 32}, MASKED),
]


@pytest.mark.parametrize(("key", "keys", "base"), FORBID_MASKED, ids=lambda v: str(v)[:30])
def test_a_masking_client_refuses_at_every_door(masked_federation, key, keys, base):
    """It took part until now; from the moment that the policy is there, nothing is answered."""
    fed = masked_federation(base=base, sizes=FOUR)
    question = codec.encode_hello_request("run")
    evaluate = _evaluation(fed)
    victim = "client-1"
    opened, exchange = fed.federation.open_round()
    stages = 0
    while exchange is not None:
        request, kept = exchange.requests[victim], fed.kept(victim)
        fed.obey(victim, _policy(**keys))
        machine = fed.machines[victim]
        door = machine.train if exchange.stage == "train" else machine.converse
        for ask, payload in (
            (machine.hello, question),
            (door, request),
            (machine.converse, b"anything"),
            (machine.train, b"anything"),
            (machine.evaluate, evaluate),
        ):
            with pytest.raises(PolicyRefusal, match=rf"policy\.{key} "):
                ask(payload)
        assert fed.kept(victim) == kept
        fed.obey(victim, OPEN_POLICY)
        fed.hold(opened, exchange)
        exchange = opened.proceed()
        stages += 1
    assert stages == 5


def _evaluation(fed: Any) -> bytes:
    context = codec.RoundContext(
        "run", 1, BASE, fed.small.attached.manifest.digest, fed.config.digest
    )
    return codec.encode_evaluate_request(codec.EvaluateRequest(context, fed.adapter))


@pytest.mark.parametrize(
    ("key", "keys"),
    [
        ("require-masking", {"require_masking": True}),
        ("require-privacy", {"require_privacy": "record"}),
        ("rules", {"rules": ("median",)}),
        ("share-metrics", {"share_metrics": "sum"}),
        ("max-update-norm", {"max_update_norm": 0.5}),
    ],
)
def test_a_client_in_the_clear_refuses_at_every_door(masked_federation, key, keys):
    fed = masked_federation(base=PLAIN, sizes=FOUR)
    opened, exchange = fed.federation.open_round()
    fed.obey("client-1", _policy(**keys))
    machine = fed.machines["client-1"]
    for ask, payload in (
        (machine.hello, codec.encode_hello_request("run")),
        (machine.train, exchange.requests["client-1"]),
        (machine.evaluate, _evaluation(fed)),
    ):
        with pytest.raises(PolicyRefusal, match=rf"policy\.{key} "):
            ask(payload)
    fed.hold(opened, exchange)
    assert "policy" in opened.failed["client-1"]
    assert fed.finish(opened, None).clients == ("client-0", "client-2", "client-3")


def test_a_site_with_the_right_roster_takes_part(masked_federation):
    fed = masked_federation(sizes=FOUR)
    for name in fed.names:
        fed.obey(name, _policy(roster_digest=fed.authority.roster.digest.hex()))
    assert fed.round().clients == tuple(fed.names)


# -------------------------------------------------------------------------------------- min-cohort
@pytest.mark.parametrize(("wanted", "takes_part"), [(1, True), (5, True), (6, False), (7, False)])
def test_a_larger_sum_is_wanted_than_the_federation_may_end_with(
    masked_federation, wanted, takes_part
):
    """Of seven clients it goes on with five; what one site wishes binds no other site."""
    fed = masked_federation(sizes=(7, 12, 5, 9, 4, 8, 6))
    fed.obey("client-0", _policy(min_cohort=wanted))
    record = fed.round()
    assert ("client-0" in record.clients) == takes_part
    assert set(fed.names[1:]) <= set(record.clients)
    if not takes_part:
        assert "policy.min-cohort" in record.failed["client-0"]
        assert fed.kept("client-0").stage == "advertised"
        assert (1, "client-0") not in fed.trained


def test_where_all_want_more_there_is_no_round(masked_federation):
    fed = masked_federation(sizes=FOUR, policy=_policy(min_cohort=4))
    with pytest.raises(TooFewClients, match="PolicyRefusal"):
        fed.round()
    assert set(fed.stages().values()) == {"advertised"}
    assert fed.trained == []


@pytest.mark.parametrize("wanted", [1, 3])
def test_a_cohort_that_is_large_enough(masked_federation, wanted):
    fed = masked_federation(sizes=FOUR, policy=_policy(min_cohort=wanted))
    assert fed.round().clients == tuple(fed.names)


# --------------------------------------------------------------------------------- report-failures
@dataclass
class _Failing:
    """A real trainer that fails, or trains to no number, for one client's rows."""

    real: Any
    rows: int
    how: str

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def train(self, adapter: Any, data: Any, plan: Any) -> LocalResult:
        result = self.real.train(adapter, data, plan)
        if len(data) != self.rows:
            return result
        if self.how == "raises":
            raise RuntimeError("a text of a patient")
        if self.how == "negative loss":
            return replace(result, loss=-17.25)
        adapter = result.adapter.copy()
        adapter[2] = np.nan
        return replace(result, adapter=adapter)


def _make_fail(fed: Any, how: str) -> None:
    for machine in fed.machines.values():
        machine._local._trainer = _Failing(machine._local._trainer, FOUR[1], how)


FAILURES = pytest.mark.parametrize("how", ["raises", "negative loss", "not a number"])
HIDING = (MASKED, RECORD, CLIENT, RECORD_UNIT)


@FAILURES
@pytest.mark.parametrize("base", HIDING, ids=["masked", "record", "client", "clear record"])
def test_whether_training_failed_is_nobodys_business(masked_federation, caplog, how, base):
    """A server can make an adapter on which training fails if, and only if, a record is so."""
    told: dict[str, set[str]] = {}
    for fails in (False, True):
        fed = masked_federation(
            base=base, sizes=FOUR, folder=str(fails), policy=_policy(report_failures=False)
        )
        if fails:
            _make_fail(fed, how)
        record = fed.round()
        assert record.clients == tuple(fed.names)
        assert record.failed == {}
        assert fed.charged("client-1") == fed.charged("client-0")
        told[str(fails)] = {len(reply) for (name, _), reply in fed.replies.items()}
    assert told["True"] == told["False"]
    if not (how == "negative loss" and base is not MASKED):  # under privacy no loss is looked at
        assert "client-1: training failed in round 1" in caplog.text
    assert "client-0" not in caplog.text


def test_a_site_whose_training_fails_counts_with_zeros(masked_federation):
    """The adapter is that of a plain sum in which its update is nothing."""
    fed = masked_federation(sizes=FOUR, policy=_policy(report_failures=False))
    _make_fail(fed, "raises")
    before = fed.federation.adapter.copy()
    record = fed.round()
    results = [
        m._local.train(before, fed.run_id, 1) for n, m in fed.machines.items() if n != "client-1"
    ]
    weights = [rows for rows, name in zip(FOUR, fed.names, strict=True) if name != "client-1"]
    clip = fed.config.update.clip
    expected = sum(
        w * r.update * min(1.0, clip / float(np.linalg.norm(r.update)))
        for w, r in zip(weights, results, strict=True)
    ) / sum(FOUR)
    moved = fed.federation.adapter - before
    # Each of three clients is less than one of these steps away; its norm shrinks a little too.
    step = clip / (2**15 - 1) * fed.config.update.example_cap / sum(FOUR)
    assert np.abs(moved - expected).max() < 3.1 * step
    assert np.abs(moved).max() > 30 * step
    assert record.train_loss == pytest.approx(
        sum(w * r.loss for w, r in zip(weights, results, strict=True)) / sum(FOUR), abs=2**-9
    )


@FAILURES
def test_a_site_may_let_the_server_know(masked_federation, how):
    fed = masked_federation(sizes=FOUR, policy=_policy(report_failures=True))
    _make_fail(fed, how)
    record = fed.round() if how != "raises" else None
    if record is None:
        with pytest.raises(RuntimeError, match="of a patient"):
            fed.round()
    else:
        assert record.clients == ("client-0", "client-2", "client-3")
        assert "TrainingError" in record.failed["client-1"]


# ----------------------------------------------------------------------------------- share-metrics
def test_metrics_that_are_never_shared(masked_federation):
    """It counts as one example without a loss, in a sum in which nobody can tell."""
    fed = masked_federation(UNIFORM, sizes=FOUR)
    same = masked_federation(UNIFORM, sizes=FOUR, folder="same")
    fed.obey("client-1", _policy(share_metrics="never"))
    losses = [
        m._local.train(fed.federation.adapter, fed.run_id, 1).loss for m in fed.machines.values()
    ]
    record, other = fed.round(), same.round()
    rest = sum(loss * rows for loss, rows in zip(losses, FOUR, strict=True)) - losses[1] * FOUR[1]
    assert record.train_loss == pytest.approx(rest / (sum(FOUR) - FOUR[1] + 1), abs=2**-9)
    assert record.train_loss != other.train_loss
    assert fed.adapter == same.adapter
    _tells_nothing(fed, "client-1")


def test_metrics_that_are_shared_in_a_sum(masked_federation):
    fed = masked_federation(sizes=FOUR, policy=_policy(share_metrics="sum"))
    same = masked_federation(sizes=FOUR, folder="same")
    assert fed.round().train_loss == same.round().train_loss
    assert fed.adapter == same.adapter
    _tells_nothing(fed, "client-1")


def _tells_nothing(fed: Any, name: str) -> None:
    machine = fed.machines[name]
    hello = codec.decode_hello(machine.hello(codec.encode_hello_request("run")))
    assert (hello.train_examples, hello.test_examples) == (0, 0)
    with pytest.raises(PolicyRefusal, match="share-metrics"):
        machine.evaluate(_evaluation(fed))


def test_metrics_that_each_may_share(masked_federation):
    fed = masked_federation(sizes=FOUR, policy=_policy(share_metrics="each"))
    machine = fed.machines["client-1"]
    hello = codec.decode_hello(machine.hello(codec.encode_hello_request("run")))
    # How many it trains on is in the masked sum, with which policy ever.
    assert (hello.train_examples, hello.test_examples) == (0, 6)
    reply = codec.decode_evaluate_reply(machine.evaluate(_evaluation(fed)))
    assert reply.examples == 6


def test_under_privacy_no_loss_is_told(masked_federation):
    fed = masked_federation(base=CLIENT, sizes=FOUR)
    assert fed.round().train_loss is None
    plain = masked_federation(base=RECORD_UNIT, sizes=FOUR, folder="record")
    opened, exchange = plain.federation.open_round()
    for name, request in exchange.requests.items():
        payload = plain.answer(name, "train", request)
        reply = codec.decode_train_reply(payload, plain.start.nbytes)
        assert (reply.loss, reply.train_seconds) == (0.0, 0.0)
        opened.receive(name, payload)
    assert plain.finish(opened, opened.proceed()).train_loss is None
    masked = masked_federation(base=RECORD, sizes=FOUR, folder="masked")
    assert masked.round().train_loss is None


# ----------------------------------------------------------------------------------------- budgets
def _epsilon(fed: Any, name: str, rounds: int) -> float:
    """What so many rounds of a client cost, by the ledger."""
    release = fed.membership(name).charge(fed.machines[name]._local, "run", 1).release
    return Ledger([release] * rounds).epsilon(fed.config.privacy.delta)


def test_under_privacy_of_a_client_no_score_of_it_is_told(masked_federation):
    """Test rows are data of the client too, and a score has no noise."""
    fed = masked_federation(base=CLIENT, sizes=FOUR, policy=_policy(share_metrics="each"))
    machine = fed.machines["client-1"]
    hello = codec.decode_hello(machine.hello(codec.encode_hello_request("run")))
    assert hello.test_examples == 0
    with pytest.raises(PolicyRefusal):
        machine.evaluate(_evaluation(fed))


@pytest.mark.parametrize("restart", [False, True])
def test_a_site_stops_when_its_own_budget_is_spent(masked_federation, restart):
    fed = masked_federation("rounds.count=5", base=CLIENT)
    two, three = (_epsilon(fed, "client-2", rounds) for rounds in (2, 3))
    assert two < three
    fed.obey("client-2", _policy(max_epsilon=(two + three) / 2))
    for number in (1, 2, 3):
        if restart:
            fed.restart_sites()
        record = fed.round()
        assert ("client-2" in record.failed) == (number == 3)
    assert "budget" in record.failed["client-2"]
    assert fed.charged("client-2") == 2
    assert fed.charged("client-1") == 3
    assert fed.kept("client-2").stage == "shared"
    # The others do not wait for it.
    assert len(record.clients) == 5


@pytest.mark.parametrize("restart", [False, True])
def test_the_federations_budget_is_kept_by_the_server(masked_federation, restart):
    probe = masked_federation(base=CLIENT, sizes=FOUR, folder="probe")
    budget = (_epsilon(probe, "client-0", 2) + _epsilon(probe, "client-0", 3)) / 2
    fed = masked_federation(
        f"privacy.epsilon={budget}", "rounds.count=5", base=CLIENT, sizes=FOUR, folder="fed"
    )
    for _ in range(2):
        fed.round()
    spent = fed.federation.epsilon
    assert spent == pytest.approx(_epsilon(probe, "client-0", 2))
    for _ in range(2):
        if restart:
            fed.restart_sites()
            fed.restart_server()
        trained, stages = len(fed.trained), fed.stages()
        with pytest.raises(BudgetExceeded):
            fed.federation.open_round()
        # Nobody was asked anything.
        assert (len(fed.trained), fed.stages()) == (trained, stages)
        assert fed.federation.epsilon == spent
    assert [record.round for record in fed.journal.records()] == [1, 2]


def test_sites_keep_the_federations_budget_even_if_the_server_does_not(masked_federation):
    """The server forgets its ledger, as one might that is not honest."""
    probe = masked_federation(base=CLIENT, sizes=FOUR, folder="probe")
    budget = (_epsilon(probe, "client-0", 2) + _epsilon(probe, "client-0", 3)) / 2
    fed = masked_federation(
        f"privacy.epsilon={budget}", "rounds.count=5", base=CLIENT, sizes=FOUR, folder="fed"
    )
    for _ in range(2):
        fed.round()
    fed.journal._db.execute("DELETE FROM releases")
    fed.restart_sites()
    with pytest.raises(TooFewClients, match="BudgetExceeded"):
        fed.round()
    assert [fed.charged(name) for name in fed.names] == [2] * 4
    assert set(fed.stages().values()) == {"shared"}


@pytest.mark.parametrize("base", [RECORD_UNIT, RECORD], ids=["clear", "masked"])
def test_examples_have_a_budget_at_each_client(masked_federation, base):
    """The fewer examples, the larger the share of them in a batch, the sooner it is spent."""
    sizes = (12, 12, 12, 12, 12, 5)
    probe = masked_federation(base=base, sizes=sizes, folder="probe")
    few, many = "client-5", "client-0"
    budget = (_epsilon(probe, few, 2) + _epsilon(probe, few, 3)) / 2
    assert budget > _epsilon(probe, many, 4)
    overrides = (f"privacy.epsilon={budget}", "rounds.count=4")
    fed = masked_federation(*overrides, base=base, sizes=sizes, folder="fed")
    for number in range(1, 5):
        fed.restart_sites()
        fed.restart_server()
        record = fed.round()
        assert (few in record.failed) == (number > 2)
    assert [fed.charged(name) for name in (many, few)] == [4, 2]
    delta = fed.config.privacy.delta
    spent = fed.sites.epsilon("run", delta)
    assert spent == pytest.approx(_epsilon(probe, few, 2))
    assert spent <= budget
    # A server's own account is for the unit that it can add up.
    assert fed.federation.epsilon is None


def test_a_request_to_train_is_charged_each_time(masked_federation):
    fed = masked_federation(base=RECORD_UNIT, sizes=FOUR)
    _, exchange = fed.federation.open_round()
    for times in (1, 2, 3):
        fed.answer("client-0", "train", exchange.requests["client-0"])
        assert fed.charged("client-0") == times


@pytest.mark.parametrize("base", [CLIENT, RECORD_UNIT, RECORD], ids=["client", "clear", "masked"])
def test_too_little_noise_is_refused_before_training(masked_federation, base):
    fed = masked_federation(base=base, sizes=FOUR, policy=_policy(min_noise=1.5))
    stage = "train"
    _, exchange = fed.open_until(stage)
    for name, request in exchange.requests.items():
        with pytest.raises(PolicyRefusal, match="min-noise"):
            fed.answer(name, stage, request)
        assert fed.charged(name) == 0
    enough = masked_federation(base=base, sizes=FOUR, policy=_policy(min_noise=1.0), folder="ok")
    assert enough.round().clients == tuple(enough.names)


def test_without_privacy_there_is_no_noise_to_speak_of(masked_federation):
    fed = masked_federation(sizes=FOUR, policy=_policy(min_noise=99.0))
    assert fed.round().clients == tuple(fed.names)
    assert [fed.charged(name) for name in fed.names] == [0] * 4


def test_another_run_needs_another_federation(masked_federation):
    """Here another seed; the site's account is one, that of each run begins anew."""
    fed = masked_federation(base=CLIENT, sizes=FOUR)
    fed.round()
    other = masked_federation("seed=1", base=CLIENT, sizes=FOUR, run_id="other")
    other.round()
    assert [fed.charged(name) for name in fed.names] == [1] * 4
    assert [other.charged(name) for name in other.names] == [1] * 4


def test_a_client_without_a_roster_does_not_converse(masked_federation):
    fed = masked_federation(sizes=FOUR)
    bare = fed.small.machines[0]
    _, exchange = fed.federation.open_round()
    with pytest.raises(ProtocolViolation):
        bare.converse(exchange.requests["client-0"])
