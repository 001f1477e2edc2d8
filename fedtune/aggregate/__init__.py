"""From the sum of updates to the next global adapter; each rule is an `init` and an `apply`."""

from fedtune.aggregate.fisher import FisherRule
from fedtune.aggregate.rules import AdamRule, MomentumRule, Rule, RuleState
from fedtune.aggregate.sums import OrderedSum

__all__ = ["AdamRule", "FisherRule", "MomentumRule", "OrderedSum", "Rule", "RuleState"]
