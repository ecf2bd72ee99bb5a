"""Nearest codebook entry by squared distance, the step of VQ tokenizers that usually materialises an N×V matrix."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from var_kernels import nearest_code
from var_kernels.testing import assert_accurate, randn, stated_order

from .harness import Call, Case, Judge, compiled, only_on, our_providers
from .table import Work


class Inputs(NamedTuple):
    """z (N, C), codebook (V, C)."""

    z: torch.Tensor
    codebook: torch.Tensor


def make_inputs(rows, codes, channels) -> Inputs:
    return Inputs(randn(rows, channels, seed=0), randn(codes, channels, seed=1))


def ours(inputs: Inputs, backend: str) -> Call:
    return lambda: nearest_code(inputs.z, inputs.codebook, backend=backend)


def by_addmm(z, codebook, half_norms):
    """argmax of z·c - |c|²/2; the norms of the codebook are computed beforehand, as a tokenizer can."""
    return torch.addmm(half_norms, z, codebook.T, beta=-1).argmax(dim=-1)


def _half_norms(codebook: torch.Tensor) -> torch.Tensor:
    return codebook.square().sum(dim=-1) / 2


def eager(inputs: Inputs) -> Call:
    half_norms = _half_norms(inputs.codebook)
    return torch.no_grad()(lambda: by_addmm(*inputs, half_norms))


@compiled
def torch_compile(inputs: Inputs) -> Call:
    half_norms, function = _half_norms(inputs.codebook), torch.compile(by_addmm, dynamic=False)
    return torch.no_grad()(lambda: function(*inputs, half_norms))


def cdist(inputs: Inputs) -> Call:
    return torch.no_grad()(lambda: torch.cdist(*inputs).argmin(dim=-1))


@only_on("cpu")
def faiss_flat(inputs: Inputs) -> Call:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(inputs.codebook.shape[1])
    index.add(inputs.codebook.numpy())
    z = inputs.z.numpy()
    return lambda: torch.from_numpy(index.search(z, 1)[1]).squeeze(1)


def vector_quantize(inputs: Inputs) -> Call:
    """The whole eval forward of its module, which also gathers the codes, because it has no separate search to call."""
    from vector_quantize_pytorch import VectorQuantize

    codes, channels = inputs.codebook.shape
    module = VectorQuantize(dim=channels, codebook_size=codes, commitment_weight=0.0).to(inputs.z.device).eval()
    module.codebook = inputs.codebook
    z = inputs.z[None]
    return torch.no_grad()(lambda: module(z)[1][0])


PROVIDERS = {
    **our_providers(ours, "nearest_code"),
    "eager addmm + argmax": eager,
    "torch.compile of it": torch_compile,
    "torch.cdist + argmin": cdist,
    "faiss-cpu IndexFlatL2": faiss_flat,
    "vector-quantize-pytorch": vector_quantize,
}


def judge(inputs: Inputs) -> Judge:
    """Accepts any code that is as near as eager's up to rounding, because near-ties may be broken in different ways."""
    distances = torch.cdist(inputs.z.double(), inputs.codebook.double()).square()
    nearest = distances.amin(dim=-1)

    def reached(codes: torch.Tensor) -> torch.Tensor:
        return distances.gather(1, codes[:, None]).squeeze(1)

    with stated_order():
        plain = reached(eager(inputs)()).float()

    def judge_codes(codes: torch.Tensor, peer: bool = False) -> float:
        if codes.shape != nearest.shape or codes.dtype != torch.int64:
            got = f"{codes.dtype} of shape {tuple(codes.shape)}"
            raise AssertionError(f"codes: expected int64 of shape {tuple(nearest.shape)}, got {got}")
        if codes.min() < 0 or codes.max() >= len(inputs.codebook):
            raise AssertionError(f"codes: expected 0 to {len(inputs.codebook) - 1}, got {codes.min()} to {codes.max()}")
        assert_accurate(reached(codes).float(), plain, nearest, name="squared distance of the chosen codes")
        return (reached(codes) - nearest).max().item()

    return judge_codes


def case(tier, rows, codes, channels=32, **options) -> Case:
    return Case(
        group="nearest_code",
        name=f"N{rows} V{codes} C{channels} float32",
        tier=tier,
        inputs=functools.partial(make_inputs, rows, codes, channels),
        providers=PROVIDERS,
        baseline="eager addmm + argmax",
        judge=judge,
        work=Work(2 * rows * codes * channels, "FLOP", "fp32"),
        op="nearest_code",
        **options,
    )


CASES = (
    case("smoke", 130, 512, headline=True, devices=("cpu", "cuda")),
    case("quick", 2048, 4096, headline=True),
    case("full", 5440, 4096),
    case("quick", 256, 4096, devices=("cuda",)),
    case("quick", 21760, 4096, devices=("cuda",)),
    case("full", 21760, 16384, devices=("cuda",)),
)


def test_nearest_code(duel):
    duel()
