"""Training with PyTorch: one resident base model, adapters swapped in and out."""

from __future__ import annotations

import contextlib
import math
import os
import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedtune.adapter.lora import AttachedAdapter
from fedtune.errors import ConfigError, TrainingError
from fedtune.privacy.randomness import SecureRandom
from fedtune.train.private import RecordPrivacy, private_gradient
from fedtune.train.task import Task
from fedtune.train.torch_private import example_gradient, refuse_batch_statistics
from fedtune.train.trainer import Dataset, Evaluation, LocalPlan, LocalResult
from fedtune.types import Float32Vector, Manifest


@dataclass(frozen=True)
class TorchSettings:
    """What does not change from round to round; `record_privacy` replaces `max_grad_norm`."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    precision: Literal["float32", "bf16"] = "float32"
    record_privacy: RecordPrivacy | None = None

    def __post_init__(self) -> None:
        if self.record_privacy is not None and self.max_grad_norm is not None:
            raise ConfigError(
                "train.max-grad-norm would clip the noise of record-level privacy, which clips "
                "each example already; leave it out"
            )


class TorchTrainer:
    """Trains an attached adapter; the base stays where it is."""

    def __init__(
        self, adapter: AttachedAdapter, task: Task, base_digest: str, settings: TorchSettings
    ) -> None:
        """Raises `ConfigError` when the module cannot be trained with record-level privacy."""
        if settings.record_privacy is not None:
            refuse_batch_statistics(adapter)
        self._adapter = adapter
        self._task = task
        self._base_digest = base_digest
        self._settings = settings

    @property
    def manifest(self) -> Manifest:
        """The adapter's tensors."""
        return self._adapter.manifest

    @property
    def base_digest(self) -> str:
        """SHA-256 of the base model."""
        return self._base_digest

    @property
    def module(self) -> nn.Module:
        """The base model with the adapter attached."""
        return self._adapter.module

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self._adapter.flat.device

    def train(self, adapter: Float32Vector, data: Dataset, plan: LocalPlan) -> LocalResult:
        """Train from `adapter` with a fresh optimizer; raises `TrainingError` if not finite.

        With record-level privacy the plan's batches and seed are not used (see
        `train.private`), and `loss` is None.
        """
        started = time.perf_counter()
        attached, privacy = self._adapter, self._settings.record_privacy
        attached.write(adapter)
        attached.train_mode()
        optimizer = _optimizer(attached.flat, self._settings)
        loss, fisher = None, None
        if privacy is None:
            loss, fisher = self._descend(optimizer, data, plan)
        else:
            self._descend_privately(optimizer, data, plan, privacy)
        trained = attached.read()
        if not (loss is None or math.isfinite(loss)) or not np.isfinite(trained).all():
            advice = " or set train.max-grad-norm" if privacy is None else ""
            raise TrainingError(
                f"the loss or the adapter is no longer finite; lower train.lr{advice}"
            )
        return LocalResult(trained, loss, time.perf_counter() - started, fisher)

    def _descend(
        self, optimizer: torch.optim.Optimizer, data: Dataset, plan: LocalPlan
    ) -> tuple[float, Float32Vector | None]:
        torch.manual_seed(plan.seed)
        losses = []
        squares = torch.zeros_like(self._adapter.gradient()) if plan.fisher else None
        received = self._adapter.flat.detach().clone() if plan.proximal else None
        for rows, lr in zip(plan.batches, plan.learning_rates, strict=True):
            loss = self._loss(data, rows)
            self._adapter.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            if squares is not None:
                gradient = self._adapter.gradient()
                squares.addcmul_(gradient, gradient, value=len(rows))
            if received is not None:
                pull = self._adapter.flat.detach() - received
                self._adapter.gradient().add_(pull, alpha=plan.proximal)
            if self._settings.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(self._adapter.flat, self._settings.max_grad_norm)
            _step(optimizer, lr)
            losses.append(loss.detach())
        fisher = None if squares is None else (squares / len(losses)).cpu().numpy()
        return float(torch.stack(losses).double().mean()), fisher

    def _descend_privately(
        self,
        optimizer: torch.optim.Optimizer,
        data: Dataset,
        plan: LocalPlan,
        privacy: RecordPrivacy,
    ) -> None:
        if plan.fisher:
            raise ValueError("the Fisher information has no noise")
        if plan.proximal:
            raise ValueError("the proximal term is not built for record-level privacy")
        if plan.batch_size is None:
            raise ValueError("record-level privacy needs the batch size of the plan")
        random = SecureRandom()
        gradient = example_gradient(
            self._adapter, lambda row: self._loss(data, np.array([row])), random
        )
        size = self.manifest.size
        for lr in plan.learning_rates:
            self._adapter.write_gradient(
                private_gradient(gradient, size, len(data), plan.batch_size, privacy, random)
            )
            _step(optimizer, lr)

    def _loss(self, data: Dataset, rows: NDArray[np.int64]) -> torch.Tensor:
        batch = self._task.batch(data, rows, self.device)
        with self._autocast():
            return self._task.loss(self._adapter.module, batch)

    def loss(self, adapter: Float32Vector, data: Dataset, rows: NDArray[np.int64]) -> float:
        """The mean loss of these rows at `adapter`, without dropout; no gradient is kept."""
        self._adapter.write(adapter)
        self._adapter.module.eval()
        with torch.inference_mode():
            return float(self._loss(data, rows))

    def evaluate(self, adapter: Float32Vector, data: Dataset) -> Evaluation:
        """Evaluate in batches of similar length; no gradient is kept."""
        self._adapter.write(adapter)
        module = self._adapter.module.eval()
        order = np.argsort(data.lengths, kind="stable")
        size = self._task.evaluated_at_once
        loss_sum = 0.0
        predictions, labels = np.empty(0, np.int64), np.empty(0, np.int64)
        with torch.inference_mode(), self._autocast():
            for start in range(0, len(order), size):
                rows = order[start : start + size]
                found = self._task.outputs(module, self._task.batch(data, rows, self.device))
                loss_sum += float(found.loss_sum)
                if found.predictions is not None and found.labels is not None:
                    predictions = np.concatenate([predictions, found.predictions])
                    labels = np.concatenate([labels, found.labels])
        correct = int((predictions == labels).sum())
        return Evaluation(len(data), loss_sum, correct, predictions, labels)

    def features(self, data: Dataset) -> NDArray[np.float32]:
        """What the untouched base gives the classifier, float32 `[n, hidden]`."""
        captured: list[torch.Tensor] = []
        head = self.module.get_submodule("base_model.model.classifier")
        hook = head.register_forward_pre_hook(lambda _module, args: captured.append(args[0].cpu()))
        order, size = np.argsort(data.lengths, kind="stable"), self._task.evaluated_at_once
        disable: Any = self.module.disable_adapter  # peft's method
        try:
            with torch.inference_mode(), disable():
                self.module.eval()
                for start in range(0, len(order), size):
                    rows = order[start : start + size]
                    batch = self._task.batch(data, rows, self.device)
                    self._task.outputs(self.module, batch)
        finally:
            hook.remove()
        features = torch.cat(captured).float().numpy()
        restored = np.empty_like(features)
        restored[order] = features
        return restored

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._settings.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA, else MPS, else the CPU; a device that is not there is a `ConfigError`."""
    # Counting devices through NVML leaves this process without a CUDA context, which forked
    # workers could not use.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"train.device = {name}: this machine has {torch.cuda.device_count()} CUDA devices; "
            "use train.device=auto or cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("train.device = mps: not available on this machine; use auto or cpu")
    return device


def _optimizer(parameter: nn.Parameter, settings: TorchSettings) -> torch.optim.Optimizer:
    # `_step` sets the learning rate; lr=0 here only fills the argument.
    if settings.optimizer == "sgd":
        return torch.optim.SGD([parameter], lr=0.0, weight_decay=settings.weight_decay)
    return torch.optim.AdamW([parameter], lr=0.0, weight_decay=settings.weight_decay)


def _step(optimizer: torch.optim.Optimizer, lr: float) -> None:
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
