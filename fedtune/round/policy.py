"""The site decides: what its policy forbids it does not do, whoever asks."""

from __future__ import annotations

import math

from fedtune.config import Config, Policy
from fedtune.errors import PolicyRefusal
from fedtune.privacy.metric import MetricPrivacy

# Both units hide a record: a client's absence hides all of its records.
_HIDES = {
    "none": {"none", "record", "client"},
    "record": {"record", "client"},
    "client": {"client"},
}


def check_policy(
    policy: Policy, config: Config, base_digest: str, rule: str, roster_digest: bytes | None
) -> None:
    """Raise `PolicyRefusal`, naming the key, if this federation is not one for this site.

    `roster_digest` is None where there is no roster, because nothing is masked.
    """
    for key, wrong, found in (
        ("require-masking", policy.require_masking and not config.secagg.enabled, "no masking"),
        ("min-threshold", _below(config, policy.min_threshold, "threshold"), "a lower threshold"),
        ("min-colluding", _below(config, policy.min_colluding, "colluding"), "fewer colluders"),
        (
            "require-privacy",
            config.privacy.unit not in _HIDES[policy.require_privacy],
            f"privacy.unit = {config.privacy.unit}",
        ),
        (
            "max-epsilon",
            policy.max_epsilon is not None and config.privacy.unit == "none",
            "no differential privacy",
        ),
        (
            "max-delta",
            config.privacy.unit != "none" and config.privacy.delta > policy.max_delta,
            f"privacy.delta = {config.privacy.delta:g}",
        ),
        (
            "max-token-epsilon",
            _token_epsilon(config) > policy.max_token_epsilon,
            _embeddings_in_words(config),
        ),
        (
            "base-digests",
            bool(policy.base_digests) and base_digest not in policy.base_digests,
            f"base model {base_digest[:12]}",
        ),
        ("rules", bool(policy.rules) and rule not in policy.rules, f"the rule {rule}"),
        (
            "max-update-norm",
            policy.max_update_norm is not None
            and (config.update.clip or float("inf")) > policy.max_update_norm,
            f"update.clip = {config.update.clip}",
        ),
        (
            "share-metrics",
            policy.share_metrics == "never" and config.aggregate.weighting == "examples",
            "weighting by examples, which counts them",
        ),
        (
            "share-metrics",
            policy.share_metrics != "each" and not config.secagg.enabled,
            "no masking, so this site's own loss and example count",
        ),
        (
            "roster-digest",
            policy.roster_digest is not None
            and (roster_digest or b"").hex() != policy.roster_digest,
            "another roster",
        ),
    ):
        if wrong:
            raise PolicyRefusal(f"this site's policy.{key} does not allow {found}")


def check_noise(policy: Policy, noise_multiplier: float) -> None:
    """Raise `PolicyRefusal` for less noise than the policy wants."""
    if policy.min_noise is not None and noise_multiplier < policy.min_noise:
        raise PolicyRefusal(
            f"policy.min-noise of this site is {policy.min_noise:g}, "
            f"the federation's noise multiplier {noise_multiplier:g}"
        )


def _token_epsilon(config: Config) -> float:
    """The local epsilon of one token in one sending; 0 where no token is sent."""
    if config.base.placement != "server":
        return 0.0
    clip, eta = config.split.clip, config.split.eta
    return math.inf if clip is None or eta is None else MetricPrivacy(clip, eta).epsilon


def _embeddings_in_words(config: Config) -> str:
    epsilon = _token_epsilon(config)
    if math.isinf(epsilon):
        return "embeddings that go to the server as they are"
    return f"embeddings that go to the server with an epsilon of {epsilon:g} a token"


def _below(config: Config, least: float, name: str) -> bool:
    return config.secagg.enabled and getattr(config.secagg, name) < least - 1e-9
