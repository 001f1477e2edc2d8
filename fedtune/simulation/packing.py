"""Evaluations on their way from a worker process."""

from __future__ import annotations

import json

import numpy as np

from fedtune.train.trainer import Evaluation


def pack_evaluation(found: Evaluation) -> bytes:
    """An evaluation on its way from a worker."""
    header = json.dumps([found.examples, found.loss_sum, found.correct])
    return header.encode() + b"\n" + np.stack([found.predictions, found.labels]).tobytes()


def unpack_evaluation(data: bytes) -> Evaluation:
    """What `pack_evaluation` packed."""
    header, _, arrays = data.partition(b"\n")
    examples, loss_sum, correct = json.loads(header)
    predictions, labels = np.frombuffer(arrays, np.int64).reshape(2, -1)
    return Evaluation(examples, loss_sum, correct, predictions, labels)
