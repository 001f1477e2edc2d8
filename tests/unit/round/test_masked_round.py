"""A masked round by hand: its result, who may be missing, and how it goes on after a kill."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from unit.round.masked_run import CLIENT_UNIT, MASKED, STAGES, UPDATE, session_of

from fedtune.errors import TooFewClients
from fedtune.round.journal import Journal
from fedtune.update.quantize import shrunk_norm

BOUND = 2**15 - 1
CLIP = 0.6
BEFORE_THE_SUM = STAGES[:3]


def _updates(fed: Any, number: int = 1) -> dict[str, np.ndarray]:
    """What each client's training gives, float64, without any message."""
    found = {}
    for name, machine in fed.machines.items():
        result = machine._local.train(fed.federation.adapter, fed.run_id, number)
        found[name] = result.update.astype(np.float64)
    return found


def _by_hand(fed: Any, names: list[str], number: int = 1) -> np.ndarray:
    """The weighted mean of clipped updates, before rounding, float64."""
    updates, examples = _updates(fed, number), dict(zip(fed.names, fed.small.examples, strict=True))
    clipped = [updates[n] * min(1.0, CLIP / np.linalg.norm(updates[n])) for n in names]
    return np.average(clipped, axis=0, weights=[examples[n] for n in names])


def _unit(fed: Any, weight: float) -> float:
    """One unit of the rounding, as a change of the mean; `weight` is the sum of weights."""
    scale = shrunk_norm(BOUND, fed.start.size) / CLIP
    return 1 / scale / weight


# -------------------------------------------------------------------------------- the result
def test_masks_change_nothing(masked_federation):
    masked = masked_federation(folder="masked")
    plain = masked_federation(base=UPDATE, folder="plain")
    for _ in range(3):
        one, other = masked.round(), plain.round()
        assert masked.adapter == plain.adapter
        assert one.clients == other.clients == tuple(masked.names)
        # Under masks losses are counted in steps of 2⁻¹⁰, each rounded.
        assert one.train_loss == pytest.approx(other.train_loss, abs=2**-10)
        assert one.failed == other.failed == {}
    assert masked.adapter != masked.start.tobytes()
    assert np.abs(masked.federation.adapter - masked.start).max() > 0.05


def test_the_result_is_the_weighted_mean_of_clipped_updates(masked_federation):
    fed = masked_federation()
    norms = [np.linalg.norm(update) for update in _updates(fed).values()]
    assert min(norms) < CLIP < max(norms)  # some are cut and some are not
    expected = _by_hand(fed, fed.names)
    fed.round()
    change = fed.federation.adapter.astype(np.float64) - fed.start
    # Each client's rounding is off by less than one unit; weights are examples / 1000.
    limit = len(fed.names) * _unit(fed, sum(fed.small.examples) / 1000)
    assert limit < 0.1 * np.abs(expected).max()
    assert np.abs(change - expected).max() < limit


def test_uniform_weights_count_clients(masked_federation):
    fed = masked_federation("aggregate.weighting=uniform")
    updates = _updates(fed)
    clipped = [u * min(1.0, CLIP / np.linalg.norm(u)) for u in updates.values()]
    fed.round()
    change = fed.federation.adapter.astype(np.float64) - fed.start
    assert np.abs(change - np.mean(clipped, axis=0)).max() < 1.01 * _unit(fed, 1)


def test_the_loss_is_the_mean_weighted_by_examples(masked_federation):
    fed = masked_federation()
    losses = [
        m._local.train(fed.federation.adapter, fed.run_id, 1).loss for m in fed.machines.values()
    ]
    record = fed.round()
    expected = np.average(losses, weights=fed.small.examples)
    assert record.train_loss == pytest.approx(expected, abs=2**-10)
    assert len(set(losses)) == len(losses)


@pytest.mark.parametrize("stage", STAGES)
def test_who_is_gone_from_a_stage_on(masked_federation, stage):
    masked, plain = masked_federation(folder="masked"), masked_federation(base=UPDATE, folder="p")
    record = masked.round(gone={"client-2": stage})
    counted = [n for n in masked.names if n != "client-2" or stage not in BEFORE_THE_SUM]
    assert record.clients == tuple(counted)
    assert list(record.failed) == ([] if "client-2" in counted else ["client-2"])
    # The same as a round in the clear in which exactly those were counted.
    plain.round(gone={} if "client-2" in counted else {"client-2": "train"})
    assert masked.adapter == plain.adapter
    # And the next round begins with everybody again.
    assert masked.round().clients == tuple(masked.names)
    assert plain.round().clients == tuple(masked.names)
    assert masked.adapter == plain.adapter


def test_one_is_gone_at_each_stage(masked_federation):
    sizes = (7, 12, 5, 9, 4, 8, 6, 11, 10, 3, 7, 9)
    options = {"sizes": sizes}
    masked = masked_federation("secagg.threshold=0.6", "secagg.colluding=0.1", **options)
    gone = {"client-1": "advertise", "client-4": "share", "client-7": "train"}
    gone |= {"client-2": "sign", "client-9": "reveal"}
    record = masked.round(gone=gone)
    assert list(record.failed) == ["client-1", "client-4", "client-7"]
    assert "advertise" in record.failed["client-1"]
    assert "share" in record.failed["client-4"]
    plain = masked_federation(base=UPDATE, folder="plain", **options)
    plain.round(gone=dict.fromkeys(record.failed, "train"))
    assert masked.adapter == plain.adapter
    expected = _by_hand_after(masked, list(record.clients))
    change = masked.federation.adapter.astype(np.float64) - masked.start
    assert np.abs(change - expected).max() < 12 * _unit(masked, 0.06)


def _by_hand_after(fed: Any, names: list[str]) -> np.ndarray:
    fed.federation._state = type(fed.federation._state)(fed.start, {})
    try:
        return _by_hand(fed, names)
    finally:
        fed.federation._state = fed.journal.last_state()[1]


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_of_answers_does_not_matter(masked_federation, order):
    fed = masked_federation(folder=f"order{order}")
    opened, exchange = fed.federation.open_round()
    while exchange is not None:
        answers = {n: fed.answer(n, exchange.stage, r) for n, r in exchange.requests.items()}
        for name in list(answers)[::order]:
            opened.receive(name, answers[name])
        exchange = opened.proceed()
    fed.federation.close_round(opened)
    fed.federation.commit(opened, None, 0, 0.0)
    again = masked_federation(folder="again")
    again.round()
    assert fed.adapter == again.adapter


def test_a_cohort_is_drawn_and_only_it_is_asked(masked_federation):
    few = ("rounds.clients-per-round=4", "secagg.colluding=0.1")
    fed = masked_federation(*few)
    plain = masked_federation(*few, base=UPDATE, folder="plain")
    for _ in range(3):
        record = fed.round()
        assert len(record.clients) == 4
        assert plain.round().clients == record.clients
    assert fed.adapter == plain.adapter
    assert len({name for _, name in fed.trained}) > 4


def test_neighbours_change_nothing(masked_federation):
    options = ("secagg.neighbours=4", "secagg.colluding=0.1")
    fed = masked_federation(*options, sizes=(7, 12, 5, 9, 4, 8, 6, 11, 10))
    full = masked_federation(sizes=(7, 12, 5, 9, 4, 8, 6, 11, 10), folder="full")
    gone = {"client-3": "train"}
    assert fed.round(gone=gone).clients == full.round(gone=gone).clients
    assert fed.adapter == full.adapter


# --------------------------------------------------------------------------------- too few
@pytest.mark.parametrize("stage", STAGES)
def test_too_few_at_a_stage_end_the_round_and_nothing_is_revealed(masked_federation, stage):
    fed = masked_federation()
    # Of six, five must stay; at the first stage the cohort itself becomes smaller.
    lost = fed.names[: 4 if stage == "advertise" else 2]
    with pytest.raises(TooFewClients, match="gone") as told:
        fed.round(gone=dict.fromkeys(lost, stage))
    for name in lost[:2]:  # more of one kind are counted
        assert name in str(told.value)
    reached = fed.stages()
    if stage != "reveal":
        assert "revealed" not in reached.values()
    if stage not in ("sign", "reveal"):
        assert "signed" not in reached.values()
    if stage in ("advertise", "share"):
        assert fed.trained == []
    assert fed.journal.records() == []
    assert fed.adapter == fed.start.tobytes()


@pytest.mark.parametrize("stage", STAGES)
def test_a_round_that_failed_is_held_again_when_clients_are_back(masked_federation, stage):
    fed, whole = masked_federation(folder="failed"), masked_federation(folder="whole")
    whole.round()
    lost = fed.names[: 4 if stage == "advertise" else 2]
    with pytest.raises(TooFewClients):
        fed.round(gone=dict.fromkeys(lost, stage))
    fed.restart_server()
    record = fed.round()
    assert record.clients == tuple(fed.names)
    assert fed.adapter == whole.adapter


def test_the_federations_minimum_is_kept(masked_federation):
    fed = masked_federation("rounds.min-clients=6")
    with pytest.raises(TooFewClients):
        fed.round(gone={"client-0": "train"})
    assert set(fed.stages().values()) == {"masked", "shared"}
    assert fed.round().clients == tuple(fed.names)


@pytest.mark.parametrize("clients", [1, 2])
def test_fewer_than_three_are_never_asked(masked_federation, clients):
    fed = masked_federation(sizes=(7, 12, 5)[:clients])
    with pytest.raises(TooFewClients):
        fed.federation.open_round()
    assert fed.stages() == {}


# ------------------------------------------------------------------------------------ kills
@pytest.mark.parametrize("stage", ["sign", "reveal"])
@pytest.mark.parametrize("after", [False, True])
def test_after_the_seal_it_goes_on_without_a_second_training(masked_federation, stage, after):
    fed, whole = masked_federation(folder="killed"), masked_federation(folder="whole")
    whole.round()
    opened, _ = fed.open_until(stage, after=after)
    trained, attempt = list(fed.trained), fed.kept("client-0").attempt
    first = dict(fed.replies)
    # Nobody says goodbye: a new server from the journal, new clients from their stores.
    fed.restart_sites()
    fed.restart_server()
    again, exchange = fed.federation.open_round()
    assert exchange.stage == "sign"
    record = fed.finish(again, exchange)
    assert fed.trained == trained
    assert fed.kept("client-0").attempt == attempt
    assert fed.adapter == whole.adapter
    assert record.clients == whole.journal.records()[0].clients
    assert record.bytes_up >= opened.bytes_up > 0
    for (name, asked), reply in first.items():
        if asked in ("sign", "reveal"):
            assert fed.replies[name, asked] == reply
    assert [r.round for r in fed.journal.records()] == [1]


def test_killed_after_the_reveals_the_answers_are_the_same_bytes(masked_federation):
    fed = masked_federation(folder="killed")
    opened, exchange = fed.open_until("reveal", after=True)
    assert opened.proceed() is None
    adapter = fed.federation.close_round(opened)  # known, and not yet committed
    reveals = {name: fed.replies[name, "reveal"] for name in exchange.requests}
    for _ in range(2):
        fed.restart_sites()
        fed.restart_server()
        assert fed.federation.round == 0
        opened, sign = fed.federation.open_round()
        fed.hold(opened, sign)
        again = opened.proceed()
        assert again.requests == exchange.requests
        fed.hold(opened, again)
        assert {name: fed.replies[name, "reveal"] for name in again.requests} == reveals
        assert opened.proceed() is None
        assert fed.federation.close_round(opened).tobytes() == adapter.tobytes()
    fed.federation.commit(opened, None, 0, 0.0)
    assert fed.adapter == adapter.tobytes()
    assert fed.round().round == 2


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("stage", BEFORE_THE_SUM)
def test_before_the_seal_it_is_a_new_attempt(masked_federation, stage, after):
    fed, whole = masked_federation(folder="killed"), masked_federation(folder="whole")
    whole.round()
    attempts, sessions = [], []
    for _ in range(3):
        fed.open_until(stage, after=after)
        fed.restart_sites()
        fed.restart_server()
        if kept := fed.kept("client-0"):
            attempts.append(kept.attempt)
            sessions.append(kept.session.session)
    record = fed.round()
    attempts.append(fed.kept("client-0").attempt)
    sessions.append(fed.kept("client-0").session.session)
    assert record.clients == tuple(fed.names)
    assert fed.adapter == whole.adapter
    assert attempts == sorted(set(attempts))
    assert attempts[-1] == 4
    assert len(set(sessions)) == len(sessions)


def test_no_attempt_is_ever_the_same(masked_federation):
    fed = masked_federation()
    seen = []
    for _ in range(4):
        _, exchange = fed.federation.open_round()
        seen.append(session_of(exchange))
        fed.restart_server()
    fed.round()
    _, exchange = fed.federation.open_round()
    seen.append(session_of(exchange))
    assert len({session.digest for session in seen}) == 5
    assert [(s.context.round, s.attempt) for s in seen] == [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1)]


def test_keys_are_fresh_in_every_attempt_and_round(masked_federation):
    fed = masked_federation()
    secrets: list[bytes] = []
    for _ in range(2):
        fed.open_until("share")
        for name in fed.names:
            state = fed.kept(name).session
            secrets += [state.sealing.private_key, state.masking.private_key, state.self_mask]
    fed.open_until("train")
    for name in fed.names:
        state = fed.kept(name).session
        secrets += [state.sealing.private_key, state.masking.private_key, state.self_mask]
    assert len(set(secrets)) == len(secrets) == 3 * 3 * 6


def test_after_the_seal_a_client_may_be_lost_for_good(masked_federation):
    fed, whole = masked_federation(folder="killed"), masked_federation(folder="whole")
    whole.round()
    fed.open_until("sign")
    fed.restart_server(hello=False)
    for name in fed.names[1:]:
        fed.say_hello(name)
    record = fed.round(gone={"client-0": "sign"})
    assert record.clients == tuple(fed.names)
    assert fed.adapter == whole.adapter


def test_a_run_of_rounds_with_a_kill_in_each(masked_federation):
    fed, whole = masked_federation(folder="killed"), masked_federation(folder="whole")
    for stage in ("train", "sign", "reveal"):
        whole.round()
        fed.open_until(stage, after=True)
        fed.restart_sites()
        fed.restart_server()
        fed.round()
        assert fed.adapter == whole.adapter
    assert [record.round for record in fed.journal.records()] == [1, 2, 3]
    assert fed.federation.rounds_left == 0


@pytest.mark.parametrize("stage", STAGES)
def test_the_same_request_gets_the_same_bytes_and_does_nothing(masked_federation, stage):
    """An answer can be lost on its way; training and noise are not repeated for it."""
    fed = masked_federation(base=CLIENT_UNIT)
    opened, exchange = fed.open_until(stage)
    for name, request in exchange.requests.items():
        reply = fed.answer(name, stage, request)
        before, charged = fed.kept(name), fed.charged(name)
        fed.restart_sites()
        assert fed.answer(name, stage, request) == reply
        assert (fed.kept(name), fed.charged(name)) == (before, charged)
        opened.receive(name, reply)
    fed.finish(opened, opened.proceed())
    assert fed.journal.last_state()[0] == 1


def test_a_journal_that_was_sealed_is_charged_once(masked_federation):
    base = (*MASKED, "privacy.unit=client", "aggregate.weighting=uniform")
    fed = masked_federation("privacy.noise-multiplier=1.0", base=base)
    fed.open_until("sign")
    for _ in range(3):
        fed.restart_sites()
        fed.restart_server()
        assert len(fed.journal.ledger().releases) == 1
        assert [fed.charged(name) for name in fed.names] == [1] * 6
        fed.open_until("reveal")
    fed.restart_server()
    fed.round()
    assert len(fed.journal.ledger().releases) == 1
    assert fed.trained == [(1, name) for name in fed.names]


def test_a_round_is_closed_only_when_the_sum_is_open(masked_federation):
    fed = masked_federation()
    opened, exchange = fed.open_until("train")
    with pytest.raises(ValueError, match="pending"):
        opened.proceed()
    with pytest.raises(ValueError, match="open"):
        fed.federation.close_round(opened)
    fed.finish(opened, exchange)
    assert isinstance(fed.journal, Journal)
