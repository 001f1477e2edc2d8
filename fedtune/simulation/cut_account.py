"""What the noise on embeddings comes to over a run, by metric differential privacy."""

from __future__ import annotations

from collections.abc import Iterable

from fedtune.config import Config
from fedtune.records import ClientSummary
from fedtune.train.channel import CutTraffic
from fedtune.train.protection import metric_privacy


def account(
    config: Config, traffic: CutTraffic, clients: Iterable[ClientSummary]
) -> dict[str, float]:
    """The fields of `records.Cut` that are about noise; none if there is none.

    Batches go through a client's data in turn, so an example was sent as often as there were passes
    over them, give or take one. It counts where there were most: at the client with the fewest
    examples for its rounds. A round that failed may have sent everything. Evaluations are left out:
    the common test set is the server's own.
    """
    privacy = metric_privacy(config.split)
    if privacy is None:
        return {}
    train = config.train
    passes = max(
        (client.rounds_completed + client.rounds_failed)
        * train.steps
        * min(1.0, train.batch_size / client.examples)
        for client in clients
    )
    tokens = traffic.tokens / max(1, traffic.trained)
    return {
        "clip": privacy.clip,
        "eta": privacy.eta,
        "token_epsilon": privacy.epsilon,
        "passes": passes,
        "example_epsilon": privacy.epsilon * tokens * passes,
    }
