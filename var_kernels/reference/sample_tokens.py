"""Guided sampling of tokens with top-k and top-p: the specification."""

import torch

_PHILOX_FACTORS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_KEYS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def guide(conditional: torch.Tensor, unconditional: torch.Tensor, guidance: float) -> torch.Tensor:
    """Classifier-free guidance: (1 + guidance)·conditional − guidance·unconditional."""
    return (1 + guidance) * conditional - guidance * unconditional


def restrict(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Sets logits to −inf outside the top_k largest, then outside the smallest set whose probability exceeds top_p.

    0 switches either off. All ties with the k-th largest logit stay. Of tokens with equal logits top-p drops the one
    with the lower index first. The most likely token always stays.
    """
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p > 0:
        ascending, order = logits.sort(dim=-1, descending=False, stable=True)
        unlikely = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        unlikely[..., -1:] = False
        logits = logits.masked_fill(unlikely.scatter(-1, order, unlikely), -torch.inf)
    return logits


def sample_tokens(
    conditional: torch.Tensor, unconditional: torch.Tensor | None, guidance: float, top_k: int, top_p: float,
    noise: torch.Tensor | None, seeds: torch.Tensor | None, offset: int,
) -> torch.Tensor:
    """The token with the largest probability / noise, which is a draw from the distribution if the noise is Exp(1)."""
    wide = torch.promote_types(conditional.dtype, torch.float32)
    logits = conditional.to(wide)
    if unconditional is not None and guidance != 0:
        logits = guide(logits, unconditional.to(wide), guidance)
    logits = logits.masked_fill(logits.isnan(), -torch.inf)
    probabilities = restrict(logits, top_k, top_p).softmax(dim=-1)
    if noise is None:
        noise = exponential(seeds, offset, *logits.shape[1:])
    scores = (probabilities / noise.to(wide)).masked_fill(probabilities == 0, -1)
    return scores.nan_to_num(nan=-1, posinf=torch.inf).argmax(dim=-1)


def exponential(seeds: torch.Tensor, offset: int, length: int, vocab: int) -> torch.Tensor:
    """(B, L, V) variates of Exp(1) in fp32 that depend only on the sample's seed, the position offset + l, and v.

    They come from Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), keyed by the
    seed. The counter (16·(v // 64) + v % 16, position, 0, 0) gives four words, and v takes the word with index
    v // 16 % 4. Sixteen neighbouring v then take the same word of sixteen neighbouring counters.
    """
    v = torch.arange(vocab, device=seeds.device)
    counter = [16 * (v // 64) + v % 16, offset + torch.arange(length, device=seeds.device).unsqueeze(1)]
    words = philox(seeds.view(-1, 1, 1), *counter)
    chosen = words.gather(0, (v // 16 % 4).expand(1, *words.shape[1:])).squeeze(0)
    # −log(1 − u) with u in (0, 1). Near 0, where the winners of the draw are, u is as exact as fp32 allows.
    u = chosen.float() * 2.0**-32 + 2.0**-33
    return -torch.log1p(-u)


def philox(key: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The four 32-bit words (4, …), as int64, of ten rounds with a 64-bit key and the counter (first, second, 0, 0)."""
    first, second, key = torch.broadcast_tensors(first, second, key)
    x = [first & _LOW, second & _LOW, torch.zeros_like(first), torch.zeros_like(first)]
    keys = [key & _LOW, key >> 32 & _LOW]
    for _ in range(10):
        (high0, low0), (high1, low1) = (_multiply(x[2 * i], _PHILOX_FACTORS[i]) for i in range(2))
        x = [high1 ^ x[1] ^ keys[0], low1, high0 ^ x[3] ^ keys[1], low0]
        keys = [keys[i] + _PHILOX_KEYS[i] & _LOW for i in range(2)]
    return torch.stack(x)


def _multiply(x: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The high and the low 32 bits of the product of two 32-bit numbers in int64, without exceeding 2^63."""
    low = x * (factor & 0xFFFF)
    high = x * (factor >> 16) + (low >> 16)
    return high >> 16, (high << 16 | low & 0xFFFF) & _LOW
