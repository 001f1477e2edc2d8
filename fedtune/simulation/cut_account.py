"""What passed the cut beside the least that could, and what the noise on it comes to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fedtune.config import Config
from fedtune.records import ClientSummary
from fedtune.train.activations import encoded_bytes
from fedtune.train.channel import CutTraffic
from fedtune.train.protection import metric_privacy


def least_bytes(config: Config, traffic: CutTraffic, width: int) -> int:
    """The least for so many tokens and states of `width` values, up and down together.

    Embeddings and their gradient, states and theirs; of a ladder there are no gradients.
    """
    rows = traffic.tokens + config.rungs * traffic.trained
    ways = 1 if config.adapter.kind == "ladder" else 2
    return ways * encoded_bytes(rows, width, config.split.activations)


def account(
    config: Config, traffic: CutTraffic, clients: Sequence[ClientSummary]
) -> dict[str, Any]:
    """The fields of `records.Cut` that are about noise; none if there is none.

    Each round's batches go through a client's data in an order of their own, and begin anew when
    all were seen: an example is sent at most as often as passes were begun, in every round. It
    counts where that was most. A round that failed may have sent everything. Evaluations are left
    out: the common test set is the server's own.
    """
    privacy = metric_privacy(config.split)
    if privacy is None:
        return {}
    train = config.train
    rounds = [client.rounds_completed + client.rounds_failed for client in clients]
    passes = [train.steps * min(1.0, train.batch_size / client.examples) for client in clients]
    sendings = max(n * math.ceil(each) for n, each in zip(rounds, passes, strict=True))
    tokens = traffic.tokens / max(1, traffic.trained)
    return {
        "clip": privacy.clip,
        "eta": privacy.eta,
        "token_epsilon": privacy.epsilon,
        "passes": max(n * each for n, each in zip(rounds, passes, strict=True)),
        "sendings": sendings,
        "example_epsilon": privacy.epsilon * tokens * sendings,
    }
