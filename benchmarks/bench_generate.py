"""Whole generations: class labels to images, with classifier-free guidance."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

import var
from var.checkpoints import WEIGHTS

from .harness import Call, Case, Judge, Unavailable, judge_floats, our_providers
from .table import Work

_OPS = ("block_causal_attention", "adaln_layer_norm", "gated_residual_adaln", "multi_scale_quantize")


class Inputs(NamedTuple):
    """The model by name, and the labels."""

    model: str
    labels: torch.Tensor


def make_inputs(model, batch) -> Inputs:
    if model == "embedded" and not (WEIGHTS / "var.safetensors").is_file():
        raise Unavailable(f"there are no weights in {WEIGHTS}")
    return Inputs(model, torch.arange(batch) % 10)


@functools.lru_cache(maxsize=4)  # one model, with each backend
def load(model: str, backend: str, device: torch.device) -> var.Pipeline:
    """The embedded model, or one of a released shape with random weights, the same for every backend."""
    if model == "embedded":
        pipeline = var.load(backend=backend)
        return var.Pipeline(pipeline.vqvae.to(device), pipeline.var.to(device))
    vqvae_config, var_config = var.PRESETS[model]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vqvae, transformer = var.VQVAE(vqvae_config, backend), var.VAR(var_config, backend)
        # Gates and a head of the size that training gives them: with those of the initialisation every block would
        # be the identity, and every token equally likely.
        transformer.init_weights(torch.Generator().manual_seed(0), gamma=1.0, head=1.0)
    return var.Pipeline(vqvae.to(device).eval(), transformer.to(device).eval())


def _generate(inputs: Inputs, backend: str) -> Call:
    pipeline = load(inputs.model, backend, inputs.labels.device)
    # top-k and top-p of the published protocol.
    options = {"cfg": 1.5, "top_k": 900, "top_p": 0.96, "seed": 0}
    return lambda: tuple(var.generate(pipeline.var, pipeline.vqvae, inputs.labels, **options))


def reference(inputs: Inputs) -> Call:
    return _generate(inputs, "reference")


PROVIDERS = {**our_providers(_generate, *_OPS), "plain PyTorch (backend='reference')": reference}


def judge(inputs: Inputs) -> Judge:
    """The same tokens from the same seed; images as near to those of a float64 decoder as plain PyTorch's."""
    tokens, plain = reference(inputs)()
    with torch.inference_mode():
        vqvae = load(inputs.model, "reference", inputs.labels.device).vqvae
        try:
            exact = vqvae.double().decode(tokens)
        finally:
            vqvae.float()
    judge_images = judge_floats({"images": exact}, {"images": plain})

    def judge_both(results, peer: bool = False) -> float:
        found, images = results
        if not torch.equal(found, tokens):
            wrong = int((found != tokens).sum())
            raise AssertionError(f"tokens: {wrong} of {tokens.numel()} differ from the reference's")
        return judge_images(images, peer)

    return judge_both


def case(tier, model, batch, **options) -> Case:
    return Case(
        group="generate",
        name=f"{model} B{batch} cfg 1.5 float32" + ("" if model == "embedded" else ", random weights"),
        tier=tier,
        inputs=functools.partial(make_inputs, model, batch),
        providers=PROVIDERS,
        baseline="plain PyTorch (backend='reference')",
        judge=judge,
        work=Work(batch, "images"),
        **options,
    )


CASES = (
    case("smoke", "embedded", 2, devices=("cpu", "cuda")),
    case("quick", "embedded", 1),
    case("quick", "embedded", 16, headline=True),
    case("full", "embedded", 64),
    case("full", "d16", 1),
    case("quick", "embedded", 128, devices=("cuda",)),
    case("quick", "d16", 8, devices=("cuda",)),
)


def test_generate(duel):
    duel()
