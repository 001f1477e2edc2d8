"""What a site writes into its audit log: what it was asked, and whether it did it."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256

from fedtune.audit.entry import Event, Value
from fedtune.audit.log import AuditLog
from fedtune.config import Policy
from fedtune.deploy.audit_details import agreement, reason_of
from fedtune.errors import BudgetExceeded, PolicyRefusal, WireError
from fedtune.round.client import ClientMachine
from fedtune.round.membership import Membership
from fedtune.wire import codec
from fedtune.wire.aggregation import decode_invite
from fedtune.wire.envelope import Kind, read_envelope

_NAMES = {kind: kind.name.lower() for kind in Kind} | {Kind.TRAIN_REQUEST: "train"}


class AuditedMachine:
    """A site's `ClientMachine` whose answers are in the audit log before they leave.

    Nothing of the site's data, or of what was learned from it, gets into the log. Of an error
    that is not about a message, the policy or the budget only its kind does: a text could quote
    data.
    """

    def __init__(self, machine: ClientMachine, membership: Membership, log: AuditLog) -> None:
        """Say that the site has started, and on which terms."""
        self._machine, self._log = machine, log
        local = machine.local
        self._config, self._site = local.config, membership
        self._adapter_bytes = local.adapter_bytes
        self._written = b""  # SHA-256 of the request that the last entry is about
        self._joined = set(membership.store.runs(machine.name))
        log.append(
            Event.SITE_STARTED,
            {
                **agreement(local.config, local.base_digest, local.manifest, membership.roster),
                "policy": _lines(membership.policy),
                "rows": local.train_examples,
                "runs": tuple(sorted(self._joined)),
            },
        )

    @property
    def largest_request(self) -> int:
        """See `ClientMachine.largest_request`."""
        return self._machine.largest_request

    def hello(self, payload: bytes) -> bytes:
        """See `ClientMachine.hello`."""
        return self._ask("hello", self._machine.hello, payload)

    def converse(self, payload: bytes) -> bytes:
        """See `ClientMachine.converse`."""
        return self._ask("converse", self._machine.converse, payload)

    def train(self, payload: bytes) -> bytes:
        """See `ClientMachine.train`."""
        return self._ask("train", self._machine.train, payload)

    def evaluate(self, payload: bytes) -> bytes:
        """See `ClientMachine.evaluate`."""
        return self._ask("evaluate", self._machine.evaluate, payload)

    def _ask(self, question: str, step: Callable[[bytes], bytes], payload: bytes) -> bytes:
        try:
            answer = step(payload)
        except (WireError, PolicyRefusal, BudgetExceeded) as error:
            self._write(Event.REQUEST_REFUSED, question, payload, {"reason": reason_of(error)})
            raise
        except Exception as error:
            self._write(Event.REQUEST_FAILED, question, payload, {"reason": type(error).__name__})
            raise
        self._write(Event.REQUEST_ANSWERED, question, payload, {})
        return answer

    def _write(self, event: Event, question: str, payload: bytes, more: dict[str, Value]) -> None:
        for run_id in sorted(set(self._site.store.runs(self._machine.name)) - self._joined):
            self._log.append(Event.RUN_JOINED, {"run": run_id})
            self._joined.add(run_id)
        # A request that is repeated, as after a lost connection, gets the same answer from the
        # site's memory: one entry says all.
        about = sha256(f"{event} {question} ".encode())
        about.update(payload)
        request = about.digest()
        if request == self._written:
            return
        details = self._about(question, payload) | more
        if event is Event.REQUEST_ANSWERED and details["request"] == "train":
            details |= self._spent(str(details["run"]))
        self._log.append(event, details)
        self._written = request

    def _about(self, question: str, payload: bytes) -> dict[str, Value]:
        """What a request says that it is about; if it was refused, this need not be true."""
        try:
            if question == "hello":
                return {"request": question, "run": codec.decode_hello_request(payload)}
            if question == "converse" or (question == "train" and self._config.secagg.enabled):
                return self._about_envelope(payload)
            decode = {
                "train": codec.decode_train_request,
                "evaluate": codec.decode_evaluate_request,
            }[question]
            context = decode(payload, self._adapter_bytes).context
            return {"request": question, "run": context.run_id, "round": context.round}
        except WireError:
            return {"request": question}

    def _about_envelope(self, payload: bytes) -> dict[str, Value]:
        envelope = read_envelope(payload, self._machine.largest_request)
        name = _NAMES[envelope.kind]
        if envelope.kind is Kind.INVITE:
            session = decode_invite(envelope.body)
            run_id, number = session.context.run_id, session.context.round
            attempt = session.attempt
        else:
            found = self._site.store.place_of(self._machine.name, envelope.session)
            if found is None:
                return {"request": name}
            run_id, number, attempt = found
        return {"request": name, "run": run_id, "round": number, "attempt": attempt}

    def _spent(self, run_id: str) -> dict[str, Value]:
        privacy = self._config.privacy
        if privacy.unit == "none":
            return {}
        ledger = self._site.store.ledger(self._machine.name, run_id)
        return {"epsilon": ledger.epsilon(privacy.delta), "delta": privacy.delta}


def _lines(policy: Policy) -> tuple[str, ...]:
    """A policy in full, as in a client.toml."""
    found = policy.model_dump(mode="json", by_alias=True, exclude_none=True)
    return tuple(f"{key} = {json.dumps(value)}" for key, value in found.items())
