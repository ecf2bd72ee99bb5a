"""Keeps what generation prepares from a model with that model, and notices when the model changes."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..model.modules import is_plain
from ..model.vqvae import VQVAE

T = TypeVar("T")
_ATTRIBUTE = "_prepared_for_generation"
_SAMPLES = 16  # elements of each parameter that are compared


class Prepared:
    """What was prepared from one state of a model.

    It lies in an attribute of the model and dies with it. A copy of the model begins with an empty one.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._state: State | None = None
        self._clear()

    def __deepcopy__(self, memo: dict) -> Prepared:
        return Prepared()

    def __reduce__(self) -> tuple:
        return Prepared, ()

    def _clear(self) -> None:
        self.version = object()  # another one after every change of the model
        self.generators: dict[Hashable, Any] = {}  # kept until the model changes
        self._weights: weakref.WeakValueDictionary[Hashable, Any] = weakref.WeakValueDictionary()

    def update(self, model: nn.Module) -> None:
        """Forget everything if `model` has changed."""
        # Generation does not read the encoder.
        parts = (model.quantize, model.post_quant_conv, model.decoder) if isinstance(model, VQVAE) else (model,)
        state = State(*parts)
        if self._state is None or not self._state.is_same(state):
            self._clear()
            self._state = state

    def weights(self, key: Hashable, make: Callable[[], T]) -> T:
        """The weights for `key`, made if nobody uses such weights already."""
        found = self._weights.get(key)
        if found is None:
            found = self._weights[key] = make()
        return found


def prepared_from(model: nn.Module) -> Prepared:
    """What was prepared from `model` as it is now. The caller holds its lock while it uses it."""
    prepared = model.__dict__.setdefault(_ATTRIBUTE, Prepared())
    with prepared.lock:
        prepared.update(model)
    return prepared


def release(*models: nn.Module) -> None:
    """Free what `generate` and `edit` have prepared from these models. They prepare it again when they need it."""
    for model in models:
        model.__dict__.pop(_ATTRIBUTE, None)


class State:
    """What tells whether a model is still the same: its modules, its parameters and buffers, and their versions.

    PyTorch counts the changes of a tensor in place, but not those through `.data` or by code that restores the counter.
    So a few elements of every tensor on a CPU are compared as well; a change of single other elements by such means is
    not noticed.
    """

    def __init__(self, *parts: nn.Module) -> None:
        self._references: list[weakref.ref] = []
        self._facts: list[tuple] = []
        samples = []
        with torch.no_grad():
            for module in (module for part in parts for module in part.modules()):
                self._add(module, type(module), is_plain(module, type(module)), getattr(module, "config", None))
                for tensor in (*module._parameters.values(), *module._buffers.values()):
                    if tensor is not None:
                        self._add(tensor, *_facts(tensor))
                        if _is_ordinary(tensor) and tensor.device.type == "cpu" and tensor.numel():
                            samples.append(_sample(tensor))
            self._samples = torch.cat(samples) if samples else torch.empty(0)

    def _add(self, thing: nn.Module | Tensor, *facts: object) -> None:
        # An id is used again after its object has died, so `is_same` asks whether it is still alive.
        self._references.append(weakref.ref(thing))
        self._facts.append((id(thing), *facts))

    def is_same(self, other: State) -> bool:
        return (
            self._facts == other._facts
            and all(reference() is not None for reference in self._references)
            and torch.equal(self._samples, other._samples)
        )


def _is_ordinary(tensor: Tensor) -> bool:
    return type(tensor) in (nn.Parameter, Tensor) and tensor.layout == torch.strided and not tensor.is_quantized


def _facts(tensor: Tensor) -> tuple:
    facts = (tensor.dtype, tensor.device, tuple(tensor.shape))
    if not tensor.is_inference():
        facts += (tensor._version,)
    elif _is_ordinary(tensor):  # it has no counter of changes
        facts += (int(tensor.contiguous().view(torch.uint8).sum(dtype=torch.int64)),)
    return (*facts, tensor.data_ptr()) if _is_ordinary(tensor) else facts


def _sample(tensor: Tensor) -> Tensor:
    """Some elements of the tensor, from its first to near its last."""
    count = min(tensor.numel(), _SAMPLES)
    if tensor.is_contiguous():
        return tensor.as_strided((count,), (tensor.numel() // count,))
    return tensor.flatten()[:: tensor.numel() // count][:count]
