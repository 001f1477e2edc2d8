"""A site as a member of a federation: its policy, its memory, its key and the roster."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fedtune.config import Policy
from fedtune.privacy.accountant import Release
from fedtune.round.local import LocalWork
from fedtune.round.policy import check_noise, check_policy
from fedtune.round.site import Charge, SiteStore
from fedtune.round.terms import client_release, record_release
from fedtune.secagg.keys import Identity, Roster


@dataclass(frozen=True)
class Membership:
    """What a client needs besides its data. The roster came from outside the federation."""

    policy: Policy
    store: SiteStore = field(repr=False)
    identity: Identity
    roster: Roster

    def check(self, local: LocalWork) -> None:
        """Raise `PolicyRefusal` if the site's policy forbids this federation."""
        config = local.config
        digest = self.roster.digest if config.secagg.enabled else None
        check_policy(self.policy, config, local.base_digest, config.aggregate.rule, digest)

    def join(self, run_id: str, local: LocalWork) -> None:
        """Raise `ProtocolViolation` if the site is in another run of the same federation."""
        agreement = self.roster.digest.hex() + local.config.digest
        self.store.join(local.name, run_id, agreement)

    def charge(self, local: LocalWork, run_id: str, round_number: int) -> Charge | None:
        """What one round of this client releases, and within which budgets.

        Raises `PolicyRefusal` for too little noise, `BudgetExceeded`, and `ProtocolViolation`
        for a second run.
        """
        release = self._release(local, round_number)
        if release is None:
            return None
        self.join(run_id, local)
        privacy = local.config.privacy
        charge = Charge(
            release,
            privacy.delta,
            run_budget=privacy.epsilon or math.inf,
            site_budget=self.policy.max_epsilon or math.inf,
        )
        self.store.check(local.name, run_id, charge)
        return charge

    def _release(self, local: LocalWork, round_number: int) -> Release | None:
        unit = local.config.privacy.unit
        if unit == "none":
            return None
        if unit == "client":
            release = client_release(local.config, local.manifest.size, round_number)
            check_noise(self.policy, release.variance**0.5 / release.l2)
            return release
        record = record_release(local.config, local.train_examples, round_number)
        check_noise(self.policy, record.noise_multiplier)
        return record
