"""LoRA (Hu et al. 2022, arXiv 2106.09685), attached by peft, held as one flat vector."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.errors import ConfigError
from fedtune.types import Float32Vector, Manifest


@dataclass(frozen=True)
class LoRA:
    """Settings of a LoRA adapter.

    `targets` are names of linear modules (or their last parts); empty means peft's choice for
    the architecture. `also_train` names modules that are trained whole, such as a new head.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    also_train: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"LoRA rank must be at least 1, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"LoRA dropout must be in [0, 1), got {self.dropout}")


class AttachedAdapter:
    """A frozen module with trainable adapter parameters that are views of one flat tensor.

    `flat` (float32, shape `[manifest.size]`) holds all of them in manifest order, and
    `flat.grad` their gradients, so that reading, writing, clipping and stepping the optimizer
    are single operations however many small matrices there are.
    """

    def __init__(self, module: nn.Module, named: dict[str, nn.Parameter], peft_config: Any) -> None:
        self.module = module
        self.peft_config = peft_config
        self.manifest = Manifest.of((name, tuple(p.shape)) for name, p in named.items())
        self._parameters = list(named.values())
        self.flat = self._flatten()

    def parameter_names(self) -> list[str]:
        """The module's own names of the adapter's parameters, in manifest order."""
        names = {id(p): name for name, p in self.module.named_parameters()}
        return [names[id(p)] for p in self._parameters]

    def to(self, device: torch.device) -> None:
        """Move base and adapter to `device`."""
        self.module.to(device)
        self.flat = self._flatten()

    def _flatten(self) -> nn.Parameter:
        flat = nn.Parameter(
            torch.cat([p.detach().reshape(-1).to(torch.float32) for p in self._parameters])
        )
        flat.grad = torch.zeros_like(flat)
        start = 0
        for parameter in self._parameters:
            stop = start + parameter.numel()
            parameter.data = flat.data[start:stop].view(parameter.shape)
            parameter.grad = flat.grad[start:stop].view(parameter.shape)
            start = stop
        return flat

    def read(self) -> Float32Vector:
        """A copy of the adapter, float32 `[manifest.size]`."""
        return self.flat.detach().cpu().numpy().copy()

    def write(self, vector: Float32Vector) -> None:
        """Set the adapter to `vector`, float32 `[manifest.size]`."""
        if vector.shape != (self.manifest.size,):
            raise ValueError(f"vector of shape {vector.shape}, manifest of {self.manifest.size}")
        with torch.no_grad():
            self.flat.copy_(torch.from_numpy(vector))

    def train_mode(self) -> None:
        """Adapter in training mode, base in evaluation mode.

        The base is frozen: its dropout would only be noise, and its batch statistics are data
        that must not be folded into what nobody uploads.
        """
        self.module.eval()
        for name, child in self.module.named_modules():
            if name.endswith(("lora_dropout", "modules_to_save")):
                child.train()

    def zero_grad(self) -> None:
        """Set the gradient to zero in place: the views must stay views."""
        self.gradient().zero_()

    def read_gradient(self) -> Float32Vector:
        """A copy of the gradient, float32 `[manifest.size]`."""
        return self.gradient().cpu().numpy().copy()

    def write_gradient(self, vector: Float32Vector) -> None:
        """Set the gradient to `vector`, float32 `[manifest.size]`."""
        self.gradient().copy_(torch.from_numpy(vector))

    def gradient(self) -> Tensor:
        """The gradient itself, float32 `[manifest.size]`, where the adapter is."""
        if self.flat.grad is None:
            raise RuntimeError("the flat gradient was detached from the adapter")
        return self.flat.grad


def attach_lora(module: nn.Module, lora: LoRA, seed: int) -> AttachedAdapter:
    """Freeze `module` and attach `lora` with weights drawn from `seed`.

    Raises `ConfigError` when the targets do not fit the module.
    """
    config = _peft_config(lora)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = _wrap(module, lora, config)
    trainable = {id(p): p for p in wrapped.parameters() if p.requires_grad}
    state = _state(wrapped)
    by_address = {p.data_ptr(): p for p in trainable.values()}
    named = {name: by_address[tensor.data_ptr()] for name, tensor in state.items()}
    if len(named) != len(trainable):
        raise ConfigError("the adapter has trainable parameters that peft would not save")
    return AttachedAdapter(wrapped, named, config)


def adapter_manifest(module: nn.Module, lora: LoRA) -> Manifest:
    """The tensors of `lora` on `module`, which may be on the meta device and is changed.

    Raises `ConfigError` when the targets do not fit the module.
    """
    state = _state(_wrap(module, lora, _peft_config(lora)))
    return Manifest.of((name, tuple(tensor.shape)) for name, tensor in state.items())


def target_names(adapter: AttachedAdapter) -> list[str]:
    """Last parts of the names of the modules with LoRA matrices, each once, in order."""
    names = (t.name.split(".lora_")[0] for t in adapter.manifest.tensors if ".lora_" in t.name)
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def linear_names(module: nn.Module) -> list[str]:
    """Last parts of the names of all linear modules, each once, in order."""
    names = (n.rpartition(".")[2] for n, m in module.named_modules() if isinstance(m, nn.Linear))
    return list(dict.fromkeys(names))


def _state(wrapped: Any) -> dict[str, Tensor]:
    """The adapter's tensors by peft's own names, which `PeftModel.from_pretrained` looks for."""
    from peft import get_peft_model_state_dict

    # With embeddings to be found "automatically", it would ask the hub about the base model.
    state: dict[str, Tensor] = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    return state


def _peft_config(lora: LoRA) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets) or None,
        modules_to_save=list(lora.also_train) or None,
    )


def _wrap(module: nn.Module, lora: LoRA, config: Any) -> Any:
    """`module` with LoRA's matrices, drawn from torch's own generator."""
    from peft import get_peft_model

    modules = dict(module.named_modules())
    missing = [name for name in lora.also_train if name not in modules]
    if missing:
        raise ConfigError(f"the model has no module named {', '.join(missing)} to train")
    for name in lora.also_train:
        _reset(modules[name])  # a new head is part of the adapter: the seed decides it too
    try:
        with warnings.catch_warnings():
            # peft asks transformers for something by an old name, which is no news for a user.
            warnings.simplefilter("ignore", FutureWarning)
            return get_peft_model(module, config)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"adapter.targets = {list(lora.targets)} does not fit this model: {reason} "
            f"(linear modules here: {', '.join(linear_names(module))})"
        ) from error


def _reset(module: nn.Module) -> None:
    for child in module.modules():
        reset = getattr(child, "reset_parameters", None)
        if callable(reset):
            reset()
