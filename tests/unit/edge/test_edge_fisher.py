"""The Fisher information of a device against that of PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from fedtune.data import TextExamples
from fedtune.edge.devices import Runtime, make_trainer
from fedtune.edge.trainer import EdgeSettings
from fedtune.train.private import RecordPrivacy
from fedtune.train.torch_trainer import TorchSettings, TorchTrainer
from fedtune.train.trainer import LocalPlan, LocalResult

if TYPE_CHECKING:
    from edge_built import Built


def _plan(rows: int, steps: int = 6, fisher: bool = True) -> LocalPlan:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 9, steps)
    batches = (rng.choice(rows, size, replace=False) for size in sizes)
    return LocalPlan(batches, iter([0.05] * steps), 7, 8, fisher)


@pytest.mark.parametrize("runtime", ["ort", "stepgraph"])
def test_it_is_that_of_torch(tiny: Built, texts: list[str], runtime: Runtime) -> None:
    model = tiny.model
    rng = np.random.default_rng(1)
    data = model.prepare(TextExamples(tuple(texts), rng.integers(0, 3, len(texts))))
    before = model.adapter.read()
    start = before + rng.normal(0, 0.05, before.size).astype(np.float32)
    shared: dict[str, Any] = {"optimizer": "sgd", "max_grad_norm": 0.5}
    torch = TorchTrainer(model.adapter, model.task, model.base.digest, TorchSettings(**shared))
    expected = torch.train(start, data, _plan(len(data))).fisher
    assert expected is not None
    assert expected.max() > 1e-3

    def ours(plan: LocalPlan, **settings: Any) -> LocalResult:
        own = EdgeSettings(**shared, **settings)
        return make_trainer(tiny.artifacts, runtime, "float32", 1, own).train(start, data, plan)

    found = ours(_plan(len(data)))
    assert found.fisher is not None
    assert found.fisher.dtype == np.float32
    assert found.fisher == pytest.approx(expected, rel=1e-2, abs=1e-5 * float(expected.max()))
    parts = ours(_plan(len(data)), micro_batch=3).fisher
    assert parts == pytest.approx(found.fisher, rel=1e-3, abs=1e-6 * float(expected.max()))
    unasked = ours(_plan(len(data), fisher=False))
    assert unasked.fisher is None
    assert (unasked.adapter == found.adapter).all()
    own = EdgeSettings(record_privacy=RecordPrivacy(1.0, 1.0))
    trainer = make_trainer(tiny.artifacts, runtime, "float32", 1, own)
    with pytest.raises(ValueError, match="no noise"):
        trainer.train(start, data, _plan(len(data)))
