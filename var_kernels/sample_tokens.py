"""From logits to tokens: classifier-free guidance, top-k, top-p and the draw, without sorting the vocabulary."""

import torch

from ._checks import check, check_same, check_tensor
from .backends import resolve
from .native.library import define, raw_ops, register_fake
from .reference import sample_tokens as _reference

# Logits are (B, L, V) with a dense last dimension. Exactly one of noise, (B, L, V) fp32 dense, and seeds, (B,) int64,
# is given.
define(
    "_sample_tokens(Tensor conditional, Tensor? unconditional, float guidance, SymInt top_k, float top_p, "
    "Tensor? noise, Tensor? seeds, SymInt offset) -> Tensor",
    __name__,
)


@register_fake("_sample_tokens")
def _(conditional, unconditional, guidance, top_k, top_p, noise, seeds, offset):
    return conditional.new_empty(conditional.shape[:2], dtype=torch.int64)


def sample_tokens(
    conditional: torch.Tensor,
    unconditional: torch.Tensor | None = None,
    *,
    guidance: float = 0.0,
    top_k: int = 0,
    top_p: float = 0.0,
    noise: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    offset: int = 0,
    backend: str = "auto",
) -> torch.Tensor:
    """Draws one token for every position from guided logits, restricted to likely tokens.

    1. logits = (1 + guidance)·conditional − guidance·unconditional, in fp32 (fp64 for float64).
    2. Top-k keeps the `top_k` largest logits, and all that equal the k-th.
    3. Top-p keeps the smallest set of tokens whose probability exceeds `top_p`: in ascending order it drops tokens
       whose probabilities add up to at most 1 − top_p. Of equally likely tokens it drops the one with the lower index
       first. It never drops the most likely token.
    4. The token is the argmax over v of p[v] / e[v] with e[v] ~ Exp(1), which is a draw from p. (This is an exponential
       race: the Gumbel trick without logarithms.)

    Args:
        conditional: (B, L, V), float32, bfloat16 or float16 (float64 is served by the reference).
        unconditional: the logits of the unconditional class, like `conditional`, or None for no guidance. They are not
            read if guidance is 0.
        guidance: the factor in step 1; 0 gives the conditional distribution.
        top_k: how many tokens stay; 0 keeps all.
        top_p: in [0, 1]; 0 keeps all.
        noise: (B, L, V) fp32, the e of step 4. With `torch.empty(…).exponential_(generator=g)` the token is the one
            that `torch.multinomial` draws with that generator, so that seeded results of other code are reproduced.
            Beside float64 logits it may have any supported dtype.
        seeds: (B,) int64 in place of noise, one for each sample. e then comes from Philox4x32-10 keyed by the seed. It
            depends on the seed, on offset + l and on v only, not on other samples, the number of threads or the
            backend.
        offset: the position of the first token, used with seeds: calls with other positions use other random numbers.
        backend: "auto", or the name of one of `backends.BACKENDS`.

    Returns:
        (B, L) int64. A NaN logit counts as −inf, and a row without any finite logit gives 0. There is no gradient.

    Raises:
        TypeError: for an argument that is not a tensor, or of an unsupported or different dtype.
        ValueError: for a wrong shape, device, option or backend, or for both or neither of noise and seeds.

    Source: VAR's sampling (arXiv 2404.02905); nucleus sampling (arXiv 1904.09751); Philox (Salmon et al., SC 2011).
    """
    check_tensor("conditional", conditional, rank=3)
    batch, length, vocab = shape = tuple(conditional.shape)
    check(vocab > 0, "conditional", "at least one token to choose from", shape)
    if unconditional is not None:
        check_tensor("unconditional", unconditional, rank=3)
        check(tuple(unconditional.shape) == shape, "unconditional", f"shape {shape}", tuple(unconditional.shape))
        check_same("conditional", conditional, unconditional=unconditional)
    check(abs(guidance) < float("inf"), "guidance", "a finite number", guidance)
    check(guidance == 0 or unconditional is not None, "unconditional", "a tensor where guidance is not 0", None)
    check(top_k >= 0, "top_k", "an integer ≥ 0 (0: off)", top_k)
    check(0 <= top_p <= 1, "top_p", "a number in [0, 1] (0: off)", top_p)
    check((noise is None) != (seeds is None), "noise, seeds", "one of them", "both" if seeds is not None else "neither")
    check(0 <= offset <= 0xFFFFFFFF - length, "offset", "a position below 2^32", offset)
    if noise is not None:
        check_tensor("noise", noise, rank=3)
        check(tuple(noise.shape) == shape, "noise", f"shape {shape}", tuple(noise.shape))
        check(noise.device == conditional.device, "noise", f"device {conditional.device}", noise.device)
        if noise.dtype != torch.float32 and conditional.dtype != torch.float64:
            raise TypeError(f"noise: expected torch.float32, got {noise.dtype}")
    else:
        if not isinstance(seeds, torch.Tensor) or seeds.dtype != torch.int64:
            raise TypeError(f"seeds: expected an int64 tensor, got {getattr(seeds, 'dtype', type(seeds).__name__)}")
        check(tuple(seeds.shape) == (batch,), "seeds", f"shape {(batch,)}", tuple(seeds.shape))
        check(seeds.device == conditional.device, "seeds", f"device {conditional.device}", seeds.device)
    conditional = conditional.detach()
    unconditional = None if unconditional is None or guidance == 0 else unconditional.detach()
    backend = resolve("sample_tokens", backend, conditional.device.type, conditional.dtype)
    arguments = (float(guidance), top_k, float(top_p), noise, seeds, offset)
    if batch * length == 0 or backend == "reference":
        return _reference.sample_tokens(conditional, unconditional, *arguments)
    return raw_ops(backend)._sample_tokens(conditional, unconditional, *arguments)
