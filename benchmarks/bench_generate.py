"""Whole generations, from labels to images, with guidance, top-k and top-p: `var.Generator` and `VAR.generate` beside
plain PyTorch."""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch

import var
from var.model.opening import WEIGHTS

from .harness import Call, Case, Judge, Provider, Unavailable, compiled, judge_floats, our_providers
from .plain_var import NearTies, PlainVAR
from .table import Work

_OPS = (
    "block_causal_attention", "adaln_layer_norm", "gated_residual_adaln", "multi_scale_quantize", "qk_norm_cache",
    "sample_tokens",
)  # fmt: skip
_OPTIONS = {"cfg": 1.5, "top_k": 900, "top_p": 0.96}  # the published protocol
_SEED = 0
# Two fp32 computations of one logit differ by less than 1e-5 of it, so if two scores are closer either token may win.
_TIE = 1e-5


class Inputs(NamedTuple):
    """The name of the model, and the labels."""

    model: str
    labels: torch.Tensor


def make_inputs(model, batch) -> Inputs:
    if model == "embedded" and not (WEIGHTS / "var.safetensors").is_file():
        raise Unavailable(f"there are no weights in {WEIGHTS}")
    return Inputs(model, torch.arange(batch) % 10)


@functools.lru_cache(maxsize=2)
def load(model: str, backend: str, device: torch.device) -> var.Pipeline:
    """The embedded model, or one of a released shape with random weights, the same for every backend."""
    if model == "embedded":
        pipeline = var.load(backend=backend)
        return var.Pipeline(pipeline.vqvae.to(device), pipeline.var.to(device))
    vqvae_config, var_config = var.PRESETS[model]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vqvae, transformer = var.VQVAE(vqvae_config, backend), var.VAR(var_config, backend)
        # Gates and head get the size that training gives them. With those of the initialisation every block would be
        # the identity, and every token equally likely.
        transformer.init_weights(torch.Generator().manual_seed(0), gamma=1.0, head=1.0)
    return var.Pipeline(vqvae.to(device).eval(), transformer.to(device).eval())


def _engine(inputs: Inputs, backend: str, precision: str = "fp32") -> Call:
    pipeline = load(inputs.model, backend, inputs.labels.device)
    generator = var.Generator(
        pipeline.var, pipeline.vqvae, batch_size=len(inputs.labels), precision=precision
    )
    seeds = _seeds(inputs, precision)
    return lambda: tuple(generator(inputs.labels, **seeds, **_OPTIONS))


def _seeds(inputs: Inputs, precision: str) -> dict:
    # In fp32 one seed reproduces the tokens of plain PyTorch. In bf16 the tokens need not be the same, so each image
    # has its own seed, as on the command line, and the kernel draws its own numbers.
    return {"seed": _SEED} if precision == "fp32" else {"seeds": range(len(inputs.labels))}


def _generate(inputs: Inputs, precision: str, first: bool) -> Call:
    """`VAR.generate`, the call that people write. With `first`, each call prepares the weights, as on a new model."""
    vqvae, transformer = load(inputs.model, "auto", inputs.labels.device)
    options = {"precision": precision, **_seeds(inputs, precision), **_OPTIONS}

    def call():
        if first:
            var.release(transformer, vqvae)
        return tuple(transformer.generate(vqvae, inputs.labels, **options))

    return call


def _calls(precision: str) -> dict[str, Provider]:
    return {
        "generate(), first call": functools.partial(_generate, precision=precision, first=True),
        "generate(), again": functools.partial(_generate, precision=precision, first=False),
    }


def _plain(inputs: Inputs, autocast: bool = False, compile_it: bool = False) -> Call:
    plain = PlainVAR(load(inputs.model, "auto", inputs.labels.device), compiled=compile_it)
    low = torch.autocast(inputs.labels.device.type, torch.bfloat16) if autocast else contextlib.nullcontext()

    def call():
        with low:
            return plain(inputs.labels, seed=_SEED, **_OPTIONS)

    return call


def plain_fp32(inputs: Inputs) -> Call:
    return _plain(inputs)


def plain_autocast(inputs: Inputs) -> Call:
    return _plain(inputs, autocast=True)


@compiled
def compiled_autocast(inputs: Inputs) -> Call:
    return _plain(inputs, autocast=True, compile_it=True)


_FP32, _BF16 = "plain PyTorch", "plain PyTorch, bf16 autocast"
FP32_PROVIDERS = {**our_providers(_engine, *_OPS), **_calls("fp32"), _FP32: plain_fp32}
BF16_PROVIDERS = {
    **our_providers(functools.partial(_engine, precision="bf16"), *_OPS),
    **_calls("bf16"),
    _BF16: plain_autocast,
    "the same, compiled": compiled_autocast,
    f"{_FP32}, fp32": plain_fp32,
}


def _decoded(inputs: Inputs, tokens: torch.Tensor) -> torch.Tensor:
    """The images of tokens, decoded in float64."""
    with torch.inference_mode():
        vqvae = load(inputs.model, "auto", inputs.labels.device).vqvae
        f_hat = list(vqvae._scales(tokens))[-1][0]
        try:
            return vqvae.double().decode_features(f_hat.double())
        finally:
            vqvae.float()


def _check_shapes(tokens: torch.Tensor, images: torch.Tensor, *expected: torch.Tensor) -> None:
    for name, tensor, other in zip(("tokens", "images"), (tokens, images), expected, strict=True):
        if tensor.shape != other.shape:
            raise AssertionError(f"{name}: expected shape {tuple(other.shape)}, got {tuple(tensor.shape)}")


def _compare_tokens(
    found: torch.Tensor, expected: torch.Tensor, ties: NearTies, starts: tuple[int, ...]
) -> torch.Tensor:
    """Which images have the expected tokens.

    Another image may differ from some scale on if near ties explain all differences in that scale; otherwise this
    raises AssertionError.
    """
    same = (found == expected).all(dim=1)
    for image in (~same).nonzero().flatten().tolist():
        wrong = (found[image] != expected[image]).nonzero().flatten()
        end = next((start for start in starts if start > int(wrong[0])), found.shape[1])
        wrong = wrong[wrong < end]
        explained = (found[image] == ties.runner_up[image]) & (ties.margin[image] < _TIE)
        if not explained[wrong].all():
            raise AssertionError(f"tokens: image {image} differs from plain PyTorch's at {wrong.tolist()}")
    return same


def judge_fp32(inputs: Inputs) -> Judge:
    """Requires the tokens of plain PyTorch from the same seed, except near ties, and images that are as near to those
    of a float64 decoder as plain PyTorch's.
    """
    scales: list[NearTies] = []
    pipeline = load(inputs.model, "auto", inputs.labels.device)
    tokens, plain = PlainVAR(pipeline)(inputs.labels, seed=_SEED, ties=scales, **_OPTIONS)
    ties = NearTies(*(torch.cat(parts, dim=1) for parts in zip(*scales, strict=True)))
    exact = _decoded(inputs, tokens)

    def judge(results, peer: bool = False) -> float:
        found, images = results
        _check_shapes(found, images, tokens, plain)
        same = _compare_tokens(found, tokens, ties, pipeline.var.config.schedule.starts)
        if not same.any():
            raise AssertionError("tokens: no image has the tokens of plain PyTorch")
        # Plain PyTorch sums in the order of the host here: in the stated order the 197 billion products of a d16 image
        # take minutes. The slack is that of peers: oneDNN adds up the products of a channels-last convolution in one
        # chain.
        return judge_floats({"images": exact[same]}, {"images": plain[same]})(images[same], peer=True)

    return judge


def judge_bf16(inputs: Inputs) -> Judge:
    """Requires about as many tokens of fp32 as autocast gives, and images at most twice as far from those of a float64
    decoder as autocast's.

    tests/generation/test_generator.py tests how bf16 changes the logits. Here every token that differs changes all
    later ones.
    """
    pipeline = load(inputs.model, "auto", inputs.labels.device)
    generator = var.Generator(pipeline.var, pipeline.vqvae, batch_size=len(inputs.labels))
    fp32, _ = _plain(inputs)()
    ours_fp32, _ = generator(inputs.labels, seeds=range(len(inputs.labels)), **_OPTIONS)
    tokens, plain = plain_autocast(inputs)()
    exact = _decoded(inputs, tokens)
    error = float((plain - exact).abs().max())
    agreement = (tokens == fp32).double().mean()

    def judge(results, peer: bool = False) -> float:
        found, images = results
        _check_shapes(found, images, tokens, plain)
        # The provider was run with one seed (the first) or with a seed for each image (the second).
        wrong = min(int((found != expected).sum()) for expected in (fp32, ours_fp32))
        if 1 - wrong / found.numel() < 0.8 * agreement:
            raise AssertionError(f"tokens: {wrong} of {found.numel()} differ from those of fp32")
        if not images.isfinite().all():
            raise AssertionError("images: not finite")
        wrong = float((images - _decoded(inputs, found)).abs().max())
        if wrong > 2 * error:
            raise AssertionError(
                f"images: expected an error of at most {2 * error:.1e} against a float64 decoder, twice that of "
                f"autocast, got {wrong:.1e}"
            )
        return wrong

    return judge


def case(tier, model, batch, precision="fp32", **options) -> Case:
    fp32 = precision == "fp32"
    return Case(
        group="generate",
        name=f"{model} B{batch} cfg 1.5 {precision}" + ("" if model == "embedded" else ", random weights"),
        tier=tier,
        inputs=functools.partial(make_inputs, model, batch),
        providers=FP32_PROVIDERS if fp32 else BF16_PROVIDERS,
        baseline=_FP32 if fp32 else _BF16,
        judge=judge_fp32 if fp32 else judge_bf16,
        work=Work(batch, "images"),
        **options,
    )


CASES = (
    case("smoke", "embedded", 2, devices=("cpu", "cuda")),
    case("smoke", "embedded", 2, "bf16", devices=("cpu", "cuda")),
    case("quick", "embedded", 1),
    case("quick", "embedded", 64, headline=True),
    case("quick", "embedded", 64, "bf16"),
    case("full", "d16", 1),
    case("full", "d16", 1, "bf16"),
    case("full", "d16", 4),
    case("full", "d16", 4, "bf16"),
    case("quick", "embedded", 128, devices=("cuda",)),
    case("quick", "d16", 8, devices=("cuda",)),
    case("quick", "d16", 8, "bf16", devices=("cuda",)),
)


def test_generate(duel):
    duel()
