"""The client's half of a masked round: verify, check, remember, and only then answer."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from hmac import compare_digest

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import ContextMismatch, PolicyRefusal, ProtocolViolation
from fedtune.round.local import LocalUpdate, LocalWork
from fedtune.round.membership import Membership
from fedtune.round.site import Answer, PrivatePart, SavedSession
from fedtune.round.terms import make_quantizer, make_ring, make_terms
from fedtune.secagg.client import ClientSession
from fedtune.secagg.keys import SERVER
from fedtune.types import Float32Vector
from fedtune.update.quantize import Quantizer
from fedtune.wire import aggregation as codec
from fedtune.wire.context import check_context
from fedtune.wire.envelope import Envelope, Kind, read_envelope, seal_envelope


class MaskedClient:
    """One client under secure aggregation; what it must remember is in its site's store."""

    def __init__(self, local: LocalWork, membership: Membership) -> None:
        self._local = local
        self._site = membership
        self._terms = make_terms(local.config, membership.roster.clients)
        self._clients = membership.roster.clients

    def converse(self, payload: bytes) -> bytes:
        """Answer an invitation, a cohort, a survivor set or a request to unmask."""
        return self._once(payload, codec.cohort_limit(self._clients), self._converse)

    def train(self, payload: bytes) -> bytes:
        """Answer a request to train with masked values."""
        limit = self._local.adapter_bytes + codec.list_limit(self._clients)
        return self._once(payload, limit, self._train)

    def _once(self, payload: bytes, limit: int, step: Callable[[Envelope, bytes], bytes]) -> bytes:
        """The same bytes for the same request; a step makes them durable before they are sent."""
        envelope = read_envelope(payload, limit)
        request = sha256(payload).digest()
        given = self._site.store.answered(self._local.name, request)
        return step(envelope, request) if given is None else given

    def _converse(self, envelope: Envelope, request: bytes) -> bytes:
        if envelope.kind is Kind.INVITE:
            return self._advertise(envelope, request)
        steps = {
            Kind.COHORT: self._share,
            Kind.SURVIVORS: self._sign,
            Kind.UNMASKING: self._reveal,
        }
        saved = self._site.store.find(self._local.name, envelope.session)
        body = self._open(envelope, *steps)
        return steps[envelope.kind](saved, body, request)

    def _train(self, envelope: Envelope, request: bytes) -> bytes:
        local, site = self._local, self._site
        saved = site.store.find(local.name, envelope.session)
        body = self._open(envelope, Kind.TRAIN_REQUEST)
        adapter, delivery = codec.decode_train_request(body, local.adapter_bytes, self._clients)
        if not compare_digest(sha256(adapter).hexdigest(), saved.adapter_digest):
            raise ContextMismatch("not the global adapter that all clients were invited to")
        accepted = saved.state.accept(delivery, self._terms)
        charge = site.charge(local, saved.run_id, saved.round)
        cohort = len(accepted.adverts)
        quantizer = make_quantizer(local.config, local.values_sent, cohort, self._terms)
        values, seconds, private = self._work(quantizer, local.read_adapter(adapter), saved)
        ring = make_ring(quantizer, cohort)
        masked, update = accepted.mask(values, ring, site.identity, self._terms)
        answer = self._seal(Kind.UPDATE, masked, codec.encode_update(update, seconds))
        site.store.advance(saved.state, masked, Answer(request, answer), charge, private)
        return answer

    def _work(
        self, quantizer: Quantizer, adapter: Float32Vector, saved: SavedSession
    ) -> tuple[NDArray[np.int64], float, PrivatePart | None]:
        """Train: the integers to mask, for how many seconds, if the site tells, and what stays."""
        local, policy = self._local, self._site.policy

        def encode(result: LocalUpdate) -> tuple[NDArray[np.int64], float, PrivatePart | None]:
            tells = policy.share_metrics != "never"
            values = quantizer.encode(
                result.update,
                max(1, local.train_examples) if tells else 1,
                result.loss if tells else 0.0,
                local.rounding(saved.round),
            )
            return values, result.seconds if tells else 0.0, result.private

        return local.train_and(encode, adapter, saved.run_id, saved.round, policy.report_failures)

    def _advertise(self, envelope: Envelope, request: bytes) -> bytes:
        session = codec.decode_invite(envelope.body)
        context = session.context
        expected = self._local.context(context.run_id, context.round)
        check_context(context, expected)
        self._local.check_round(context.round)
        if session.roster_digest != self._site.roster.digest:
            raise ContextMismatch("the other side has another roster")
        # The body says what the digest over it must be: nothing else was signed.
        envelope.open(self._site.roster, SERVER, session.digest, (Kind.INVITE,))
        state, advert = ClientSession.begin(self._site.identity, session)
        self._site.join(context.run_id, self._local)
        answer = self._seal(Kind.ADVERT, state, codec.encode_advert(advert))
        self._site.store.begin(self._local.name, session, state, Answer(request, answer))
        return answer

    def _share(self, saved: SavedSession, body: bytes, request: bytes) -> bytes:
        adverts = codec.decode_cohort(body, self._clients)
        site, names = self._site, tuple(advert.client for advert in adverts)
        if saved.repeats and names != saved.repeats:
            # Two sums over different cohorts of the very same values would tell them apart.
            raise ProtocolViolation(
                f"{saved.state.name} has sent its values of round {saved.round} to a cohort of "
                f"{len(saved.repeats)} and repeats them to no other"
            )
        # What the federation's terms ask for is all that the other clients will insist on.
        fewest = self._terms.fewest_survivors(len(adverts))
        if fewest < site.policy.min_cohort:
            raise PolicyRefusal(
                f"this site's policy.min-cohort is {site.policy.min_cohort}, and a cohort of "
                f"{len(adverts)} may end in a sum of {fewest}"
            )
        shared, shares = saved.state.share(adverts, site.roster, self._terms)
        answer = self._seal(Kind.SEALED_SHARES, shared, codec.encode_sealed_shares(shares))
        site.store.advance(saved.state, shared, Answer(request, answer))
        return answer

    def _sign(self, saved: SavedSession, body: bytes, request: bytes) -> bytes:
        survivors = codec.decode_survivors(body, self._clients)
        site = self._site
        signed, signature = saved.state.sign(survivors, site.identity, site.roster, self._terms)
        answer = self._seal(Kind.SIGNATURE, signed, codec.encode_signature(signature))
        if signed is not saved.state:
            site.store.advance(saved.state, signed, Answer(request, answer))
        return answer

    def _reveal(self, saved: SavedSession, body: bytes, request: bytes) -> bytes:
        unmasking = codec.decode_unmasking(body, self._clients)
        revealed, reveal = saved.state.reveal(unmasking, self._site.roster, self._terms)
        answer = self._seal(Kind.REVEAL, revealed, codec.encode_reveal(reveal))
        if revealed is not saved.state:
            self._site.store.advance(saved.state, revealed, Answer(request, answer))
        return answer

    def _open(self, envelope: Envelope, *kinds: Kind) -> bytes:
        return envelope.open(self._site.roster, SERVER, envelope.session, kinds)

    def _seal(self, kind: Kind, state: ClientSession, body: bytes) -> bytes:
        return seal_envelope(self._site.identity, kind, state.session, body)
