"""CUDA graphs of a generation: each scale is captured once and replayed, so that it costs the host one launch.

No GPU has executed a capture so far. The tests put a recorder in its place, which replays the same operators on the
same tensors as a graph would (tests/generation/test_graphs.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..model.config import VARConfig
from .noise import Noise
from .request import Generated, OnScale, Options

T = TypeVar("T")
Capture = Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]
_WARM_UP = 2  # calls before a capture: they compile kernels, and libraries allocate their workspaces


class Engine(Protocol):
    """The parts of a generation that are captured. Each one takes and returns tensors."""

    config: VARConfig
    device: torch.device

    def begin(self, labels: Tensor) -> Tensor:
        """The input of the first scale."""

    def empty_features(self, batch: int) -> Tensor:
        """The features before the first scale."""

    def scale(
        self, k: int, x_BLC: Tensor, f_hat: Tensor, options: Options, *, noise: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """The tokens of scale k, the features with this scale added, and the input of the next scale."""

    def decode(self, features: Tensor) -> Tensor:
        """The images of these features."""


def capture_cuda(function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
    """The result of `function`, and a replay: it reads the same input tensors again and writes to the same results."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return outputs, graph.replay


class CapturedGeneration:
    """The generation of one batch size with fixed options: begin, K scales and the decoder, each captured once.

    Labels, seeds and noise are copied into tensors that this object owns. The options are constants of the graphs.
    """

    def __init__(self, engine: Engine, batch: int, options: Options, seeded: bool, capture: Capture) -> None:
        config, device = engine.config, engine.device
        self._lengths = config.schedule.lengths
        self._labels = torch.zeros(batch * (2 if options.guided else 1), dtype=torch.int64, device=device)
        self._seeds = torch.zeros(batch, dtype=torch.int64, device=device) if seeded else None
        self._noise = None if seeded else [
            torch.ones(batch, length, config.vocab_size, device=device) for length in self._lengths
        ]
        self._engine, self._replays = engine, []

        def captured(function: Callable[[], T]) -> T:
            outputs, replay = capture(function)
            replay()  # capturing does not execute: replay once, so that the next capture indexes valid tokens
            self._replays.append(replay)
            return outputs

        x_BLC = captured(functools.partial(engine.begin, self._labels))
        f_hat, self._tokens, self._features = engine.empty_features(batch), [], []
        for k in range(config.schedule.num_scales):
            draw = {"seeds": self._seeds} if seeded else {"noise": self._noise[k]}
            tokens, f_hat, x_BLC = captured(functools.partial(engine.scale, k, x_BLC, f_hat, options, **draw))
            self._tokens.append(tokens)
            self._features.append(f_hat)
        self._images = captured(functools.partial(engine.decode, f_hat))

    def __call__(
        self, labels: Tensor, noise: Noise | None, seeds: Tensor | None, on_scale: OnScale | None
    ) -> Generated:
        self._labels.copy_(labels)
        if seeds is not None:
            self._seeds.copy_(seeds)
        begin, *scales, decode = self._replays
        begin()
        for k, replay in enumerate(scales):
            if self._noise is not None:
                self._noise[k].copy_(noise.draw(self._lengths[k]))
            replay()
            if on_scale is not None:
                on_scale(k, functools.partial(self._engine.decode, self._features[k]))
        decode()
        return Generated(torch.cat(self._tokens, dim=1), self._images.clone())
