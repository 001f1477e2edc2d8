"""Apple's pfl-research: SimulatedBackend and FederatedAveraging, one process of two threads."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn

from peers.job import CORES, Job, Stopwatch
from peers.learning import (
    Batch,
    get_state,
    initial_state,
    load_corpus,
    load_model,
    load_tokenizer,
    set_state,
)


class Module(nn.Module):
    """The classifier with the two methods that pfl asks for."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def loss(self, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of the batch."""
        return nn.functional.cross_entropy(self.net(ids, mask), labels)

    def metrics(self, _ids: Tensor, _mask: Tensor, _labels: Tensor) -> dict[str, Any]:
        """Nothing: pfl evaluates all clients before round 1, which is not part of the job."""
        return {"examples": Weighted(0, 1)}


class Client(Dataset):
    """One client with its batches of this round; its length is its weight."""

    def __init__(self, batches: list[Batch], examples: int, name: str) -> None:
        super().__init__(batches, user_id=name)
        self._examples = examples

    def __len__(self) -> int:
        return self._examples

    def iter(self, _batch_size: int | None) -> Iterator[Batch]:
        """The planned batches, whatever size pfl asks for."""
        return iter(self.raw_data)


class Laps(TrainingProcessCallback):
    """Marks the end of each round."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch

    def after_central_iteration(
        self, aggregate_metrics: Any, model: Any, *, central_iteration: int
    ) -> Any:
        """See pfl."""
        self._stopwatch.lap()
        return super().after_central_iteration(
            aggregate_metrics, model, central_iteration=central_iteration
        )


def run_pfl(job: Job, out: Path) -> None:
    """All rounds."""
    stopwatch = Stopwatch()
    torch.set_num_threads(CORES)
    tokenizer = load_tokenizer(job)
    corpora = {name: load_corpus(job, name, tokenizer) for name in job.client_names()}
    visits: Counter[str] = Counter()

    def client(name: str) -> Client:
        visits[name] += 1  # each client is asked for once a round
        corpus = corpora[name]
        plan = job.batches(visits[name], name, corpus.lengths)
        return Client([corpus.batch(rows) for rows in plan], len(corpus), name)

    module = Module(load_model(job))
    set_state(module.net, initial_state(job))
    parameters = [p for p in module.parameters() if p.requires_grad]
    model = PyTorchModel(
        module,
        functools.partial(torch.optim.AdamW, weight_decay=0.0),
        torch.optim.SGD(parameters, 1.0),
    )
    data = FederatedDataset(client, MinimizeReuseUserSampler(list(corpora)))
    backend = SimulatedBackend(
        training_data=data, val_data=data, postprocessors=[WeightByDatapoints()]
    )
    stopwatch.start()
    FederatedAveraging().run(
        backend=backend,
        model=model,
        callbacks=[Laps(stopwatch)],
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=job.rounds,
            evaluation_frequency=10**9,
            train_cohort_size=job.clients,
            val_cohort_size=0,
        ),
        model_train_params=NNTrainHyperParams(
            local_num_epochs=None,
            local_num_steps=job.steps,
            local_learning_rate=job.lr,
            local_batch_size=job.batch_size,
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=job.batch_size),
    )
    stopwatch.finish(out, get_state(module.net))
