"""A site as a member of a federation: its policy, its memory, its key and the roster."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedtune.config import Policy
from fedtune.errors import BudgetExceeded
from fedtune.privacy.accountant import Release
from fedtune.round.local import LocalWork
from fedtune.round.policy import check_noise, check_policy
from fedtune.round.site import SiteStore
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

    def release(self, local: LocalWork, round_number: int) -> Release | None:
        """What one round of this client releases; raises `PolicyRefusal` for too little noise."""
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

    def check_budget(self, local: LocalWork, run_id: str, release: Release) -> None:
        """Raise `BudgetExceeded` if `release` is above the federation's or the site's budget."""
        privacy = local.config.privacy
        budget = min(privacy.epsilon or float("inf"), self.policy.max_epsilon or float("inf"))
        spent = self.store.ledger(local.name, run_id).epsilon_with(release, privacy.delta)
        if spent > budget:
            raise BudgetExceeded(
                f"round {release.round} would bring epsilon to {spent:.3f} at delta "
                f"{privacy.delta:g}, above the budget of {budget:g}"
            )

    def charge_records(self, local: LocalWork, run_id: str, round_number: int) -> None:
        """In the clear: enter what is released, before it leaves."""
        release = self.release(local, round_number)
        if release is not None:
            self.check_budget(local, run_id, release)
            self.store.release(local.name, run_id, release)
