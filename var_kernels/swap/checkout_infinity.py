"""The process of `python -m var_kernels.swap check` for a checkout of Infinity. T5's features are random numbers.

No tokenizer is made: the loop of sampling needs only codes of bits from it.
"""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn

from ..native.build import replace_unprintable
from .checkout import Rows, Step, answer, distance, gradients_of, listed, paired, peak_of
from .flash_attn import provide_flash_attn
from .infinity import MODEL, vectors_of

SIZES = {
    "small": {"depth": 4, "embed_dim": 128, "num_heads": 4, "block_chunks": 2, "text_channels": 256},
    "layer12": {"depth": 12, "embed_dim": 768, "num_heads": 8, "block_chunks": 4, "text_channels": 2048},
}
_BITS = 32  # of a code
_PIXELS = "0.06M"  # the first stage of training, images of 256 x 256


class Bits:
    """In the place of the tokenizer: codes of bits, of which it keeps those that were sampled."""

    def __init__(self) -> None:
        self.embed_dim, self.vocab_size, self.sampled = _BITS, 2**_BITS, []
        lfq = SimpleNamespace(mask=None, indices_to_codes=self._codes)
        self.quantizer = SimpleNamespace(lfq=lfq, z_interplote_up="trilinear")

    def _codes(self, bits: torch.Tensor, label_type: str) -> torch.Tensor:
        self.sampled.append(bits.flatten())
        return (2.0 * bits - 1).permute(0, 4, 1, 2, 3) / _BITS**0.5


class Setup(NamedTuple):
    """What makes models of a checkout: its class, the options of the size, the schedule, and whether flash is ours."""

    network: type[nn.Module]
    options: dict
    schedule: list[tuple[int, int, int]]
    our_flash: bool

    def model(self, **options) -> nn.Module:
        """A model with random weights, the same for the same options."""
        torch.manual_seed(0)
        return self.network(
            vae_local=Bits(), text_maxlen=64, shared_aln=True, cond_drop_rate=0.1, drop_path_rate=0.1, cos_attn=True,
            rope2d_each_sa_layer=1, rope2d_normalized_by_hw=2, pn=_PIXELS, **self.options, **options,
        )  # fmt: skip


def make(path: str, size: str) -> Setup:
    """Imports the checkout, for which our attention stands in if flash-attn is not installed."""
    our_flash = importlib.util.find_spec("flash_attn") is None
    if our_flash:
        provide_flash_attn()
    sys.path.insert(0, path)
    from infinity.models.infinity import Infinity  # the checkout's
    from infinity.utils.dynamic_resolution import dynamic_resolution_h_w

    schedule = [(1, int(h), int(w)) for _, h, w in dynamic_resolution_h_w[1.0][_PIXELS]["scales"]]
    return Setup(Infinity, SIZES[size], schedule, our_flash)


def _text(setup: Setup, batch: int) -> tuple[torch.Tensor, list[int], torch.Tensor, int]:
    """Features of texts of different lengths, as the checkout packs them."""
    lens = [20 + 7 * i % 40 for i in range(batch)]
    ends = torch.tensor([0, *lens]).cumsum(0).int()
    return torch.randn(sum(lens), setup.options["text_channels"]), lens, ends, max(lens)


class Batch(NamedTuple):
    """Inputs and targets of a training step."""

    text: tuple
    inputs: torch.Tensor
    bits: torch.Tensor


def _batch(setup: Setup, size: int) -> Batch:
    torch.manual_seed(1)
    length = sum(t * h * w for t, h, w in setup.schedule)
    shape = (size, length, _BITS)
    return Batch(_text(setup, size), torch.randn(size, length - 1, _BITS), torch.randint(2, shape))


def _training_step(model: nn.Module, schedule: list, batch: Batch, autocast: bool) -> Step:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    random.seed(0)
    features, *rest = batch.text
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        # The checkout writes to the features of texts that it drops.
        logits = model((features.clone(), *rest), batch.inputs, scale_schedule=schedule)
    by_bit = logits.float().unflatten(-1, (_BITS, 2)).permute(0, 3, 1, 2)
    loss = nn.functional.cross_entropy(by_bit, batch.bits)
    loss.backward()
    return Step(logits.detach().float(), loss.detach(), gradients_of(model))


def _sample(model: nn.Module, schedule: list, text: tuple) -> torch.Tensor:
    """The bits of one image by the checkout's own loop of sampling."""
    codes = Bits()
    model.autoregressive_infer_cfg(
        vae=codes, scale_schedule=schedule, label_B_or_BLT=text, B=1, g_seed=0, cfg_list=[4.0] * len(schedule),
        tau_list=[0.5] * len(schedule), top_k=900, top_p=0.97, cfg_insertion_layer=[0], vae_type=1, returns_vemb=1,
        inference_mode=True,
    )  # fmt: skip
    return torch.cat(codes.sampled)


@contextmanager
def _vectors(model: nn.Module, setup: Setup) -> Iterator[None]:
    """The two vectors that Infinity's code takes and never makes, for runs before the swap."""
    if MODEL.is_swapped(model) or not model.customized_flash_attn:
        yield
        return
    names = ("Infinity_visible_kvlen", "Infinity_invisible_qlen")
    lens = tuple(t * h * w for t, h, w in setup.schedule)
    vars(model).update(zip(names, vectors_of(lens, torch.device("cpu")), strict=True))
    try:
        yield
    finally:
        for name in names:
            del vars(model)[name]


def _compare_steps(rows: Rows, setup: Setup, model: nn.Module, batch: Batch, what: str, seconds: float) -> None:
    def step(autocast: bool, inputs: torch.Tensor = batch.inputs) -> Step:
        with _vectors(model, setup):
            return _training_step(model, setup.schedule, batch._replace(inputs=inputs), autocast)

    model.train()
    exact, ours, times = paired(model, lambda: step(False), seconds)
    # The checkout rounds the operands of cross-attention to bf16, also in fp32. So its results are as far apart as
    # those of inputs that differ by a rounding.
    moved = step(False, batch.inputs * (1 + 2.0**-22 * torch.randn_like(batch.inputs)))
    apart, bound = (
        {name: distance(getattr(found, name), getattr(exact, name)) for name in Step._fields}
        for found in (ours, moved)
    )
    difference = f"{listed(apart)} (inputs moved by a rounding: {listed(bound)})"
    right = all(apart[name] < 10 * bound[name] + 1e-6 for name in Step._fields)
    rows.add(f"training step, {what}fp32", difference, right, times)
    theirs, ours, times = paired(model, lambda: step(True), seconds)
    rows.add_autocast(f"training step, {what}bf16 autocast", exact, theirs, ours, times)


def _compare_samples(rows: Rows, setup: Setup, model: nn.Module, what: str, seconds: float) -> None:
    model.eval()
    torch.manual_seed(2)
    text = _text(setup, 1)
    with torch.no_grad():
        before, after, times = paired(model, lambda: _sample(model, setup.schedule, text), seconds)
    same = int((before == after).sum())
    rows.add(f"sampling, {what}fp32, one image, cfg 4", f"{same} of {before.numel()} bits equal",
             same == before.numel(), times)  # fmt: skip


def compare(setup: Setup, batch: int, seconds: float) -> dict:
    """The rows of the table, and the report of the swap."""
    rows, inputs = Rows(), _batch(setup, batch)
    model = setup.model()
    _compare_steps(rows, setup, model, inputs, "", seconds)
    # Only with the fused norm does the checkout hand the scale on to its rotary embedding in sampling.
    _compare_samples(rows, setup, setup.model(fused_norm=True), "", seconds)
    if setup.our_flash:
        what = "customized_flash_attn, "
        _compare_steps(rows, setup, setup.model(customized_flash_attn=True), inputs, what, seconds)
        flash = setup.model(customized_flash_attn=True, fused_norm=True)
        _compare_samples(rows, setup, flash, what, seconds)
    return rows.result(model)


def peak_memory(setup: Setup, batch: int, swapped: bool) -> int:
    """By how many bytes one training step in bf16 autocast raises the memory of this process."""
    model, inputs = setup.model().train(), _batch(setup, batch)
    return peak_of(model, lambda: _training_step(model, setup.schedule, inputs, autocast=True), swapped)


if __name__ == "__main__":
    replace_unprintable()
    answer(make, compare, peak_memory)
