"""The process of `python -m var_kernels.swap check`: a model of VAR's checkout, run before and after the swap.

The last line that it prints is its result, as JSON. What the checkout prints goes to stderr. `checkout_infinity` does
the same with a checkout of Infinity.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from ..native.build import replace_unprintable
from . import handle

SIZES = {"small": {"depth": 2, "ch": 32}, "d16": {"depth": 16, "ch": 160}}


class Models(NamedTuple):
    """The two networks of VAR."""

    vae: nn.Module
    var: nn.Module


def make(path: str, size: str) -> Models:
    """The networks of the checkout with random weights, the same for the same arguments."""
    sys.path.insert(0, path)
    from models import build_vae_var  # the checkout's

    torch.manual_seed(0)
    vae, var = build_vae_var(
        V=4096, Cvae=32, share_quant_resi=4, device="cpu", patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        num_classes=1000, shared_aln=False, attn_l2_norm=True, init_adaln_gamma=1.0, init_head=1.0, **SIZES[size],
    )  # fmt: skip
    for name, parameter in vae.named_parameters():  # the checkout leaves them to a checkpoint
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=1.0 if name.endswith("embedding.weight") else 0.02)
        else:
            nn.init.constant_(parameter, float("norm" in name and name.endswith("weight")))
    return Models(vae.eval().requires_grad_(False), var.eval())


class Step(NamedTuple):
    """The results of a training step."""

    logits: torch.Tensor
    loss: torch.Tensor
    gradients: torch.Tensor  # all of them, in one dimension


def _training_step(models: Models, inputs: torch.Tensor, tokens: torch.Tensor, autocast: bool) -> Step:
    models.var.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = models.var(torch.arange(len(tokens)), inputs)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    loss.backward()
    return Step(logits.detach(), loss.detach(), gradients_of(models.var))


def _images(models: Models) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and an image of the checkout's own loop of generation."""
    found = []
    hook = models.vae.quantize.embedding.register_forward_hook(lambda module, args, out: found.append(args[0]))
    try:
        image = models.var.autoregressive_infer_cfg(1, 7, g_seed=0, cfg=4.0, top_k=900, top_p=0.96)
    finally:
        hook.remove()
    return torch.cat(found, dim=1), image


def paired(model: nn.Module, call: Callable[[], object], seconds: float) -> tuple[object, object, list[float]]:
    """The results of `call` before and after the swap, and [median before, median after, median ratio] of its times.

    Calls alternate, for `seconds` or at least three times; the first pair only warms up.
    """
    results, times = [None, None], ([], [])
    end = None
    while end is None or time.monotonic() < end or len(times[0]) < 3:
        for swapped in (0, 1):
            with handle.applied(model) if swapped else contextlib.nullcontext():
                start = time.perf_counter()
                results[swapped] = call()
                if end is not None:
                    times[swapped].append(time.perf_counter() - start)
        end = end or time.monotonic() + seconds
    ratios = [before / after for before, after in zip(*times, strict=True)]
    return *results, [statistics.median(values) for values in (*times, ratios)]


class Rows:
    """The rows of the table."""

    def __init__(self) -> None:
        self.rows: list[dict] = []

    def add(self, name: str, difference: str, right: bool, times: list[float]) -> None:
        """A piece of work: what it is, how far the results are apart, whether that is rounding, the times."""
        print(f"{name}: {difference} {times}", file=sys.stderr)
        self.rows.append({"name": name, "difference": difference, "right": right, "times": times})

    def add_autocast(self, name: str, exact: Step, before: Step, after: Step, times: list[float]) -> None:
        """A training step in bf16, whose results before and after are compared with those in fp32."""
        pairs = {
            part: tuple(distance(getattr(found, part), getattr(exact, part)) for found in (before, after))
            for part in Step._fields
        }
        difference = ", ".join(f"{part} {b:.1e} (before {a:.1e})" for part, (a, b) in pairs.items())
        # The loss is one number, which may be right by chance; logits and gradients are vectors.
        right = all(b < 1.5 * a for part, (a, b) in pairs.items() if part != "loss")
        self.add(name, f"to fp32: {difference}", right, times)

    def result(self, model: nn.Module) -> dict:
        with handle.applied(model) as report:
            return {"rows": self.rows, "report": str(report), "threads": torch.get_num_threads()}


def compare(models: Models, batch: int, seconds: float) -> dict:
    """The rows of the table, and the report of the swap."""
    rows = Rows()
    quantizer, var = models.vae.quantize, models.var
    f = torch.randn(batch, quantizer.Cvae, 16, 16)
    encode = paired(var, lambda: torch.cat(quantizer.f_to_idxBl_or_fhat(f, to_fhat=False), dim=1), seconds / 4)
    same = int((encode[0] == encode[1]).sum())
    rows.add("tokens of images", f"{same} of {encode[0].numel()} equal", same == encode[0].numel(), encode[2])
    tokens = encode[0]
    by_scale = list(tokens.split([n * n for n in quantizer.v_patch_nums], dim=1))
    before, after, times = paired(var, lambda: quantizer.idxBl_to_var_input(by_scale), seconds / 4)
    rows.add("inputs of training", f"{distance(after, before):.1e}", distance(after, before) < 1e-5, times)
    inputs = before

    var.train()
    # Stochastic depth and dropped labels draw the same numbers before and after.
    exact, ours, times = paired(var, lambda: _training_step(models, inputs, tokens, False), seconds)
    apart = {name: distance(getattr(ours, name), getattr(exact, name)) for name in Step._fields}
    rows.add("training step, fp32", listed(apart), all(value < 1e-4 for value in apart.values()), times)
    theirs, ours, times = paired(var, lambda: _training_step(models, inputs, tokens, True), seconds)
    rows.add_autocast("training step, bf16 autocast", exact, theirs, ours, times)

    var.eval()
    before, after, times = paired(var, lambda: _images(models), seconds)
    same = int((before[0] == after[0]).sum())
    image = distance(after[1], before[1])
    difference = f"{same} of {before[0].numel()} tokens equal, image {image:.1e}"
    rows.add("generation, fp32, one image, cfg 4", difference, same == before[0].numel() and image < 1e-4, times)
    return rows.result(var)


def peak_memory(models: Models, batch: int, swapped: bool) -> int:
    """By how many bytes one training step in bf16 autocast raises the memory of this process."""
    quantizer = models.vae.quantize
    models.var.train()
    tokens = torch.zeros(batch, sum(n * n for n in quantizer.v_patch_nums), dtype=torch.long)
    inputs = torch.randn(batch, tokens.shape[1] - 1, quantizer.Cvae)
    return peak_of(models.var, lambda: _training_step(models, inputs, tokens, autocast=True), swapped)


def distance(found: torch.Tensor, right: torch.Tensor) -> float:
    """The norm of the difference, relative to that of `right`."""
    return float((found - right).norm() / right.norm())


def listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1e}" for name, value in values.items())


def gradients_of(model: nn.Module) -> torch.Tensor:
    """All gradients in one dimension."""
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def peak_of(model: nn.Module, call: Callable[[], object], swapped: bool) -> int:
    """By how many bytes `call` raises the memory of this process, before or after the swap."""
    with handle.applied(model) if swapped else contextlib.nullcontext():
        before = _status("VmRSS")
        call()
        return max(_status("VmHWM") - before, 1)


def _status(field: str) -> int:
    """A number of bytes in Linux's status of this process, 0 elsewhere."""
    try:
        with open("/proc/self/status", encoding="ascii") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))
    except OSError:
        return 0


def answer(make: Callable, compare: Callable, peak_memory: Callable) -> None:
    """Prints what the arguments of this process ask for."""
    path, size, batch, task, option = sys.argv[1:]
    with contextlib.redirect_stdout(sys.stderr):
        models = make(path, size)
        if task == "compare":
            result = compare(models, int(batch), float(option))
        else:
            result = peak_memory(models, int(batch), option == "after")
    print(json.dumps(result))


if __name__ == "__main__":
    replace_unprintable()
    answer(make, compare, peak_memory)
