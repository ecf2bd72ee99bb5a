"""What every swapped attention must keep of its caches."""

import torch


def assert_going_back_overwrites_nothing(attention):
    """Somebody keeps the caches of an attention module, goes back to shorter ones, and continues with other tokens."""
    first, second, other = torch.randn(3, 2, 4, 32).unbind(0)
    attention.kv_caching(True)
    attention(first, None)
    short = attention.cached_k, attention.cached_v
    attention(second, None)
    long = attention.cached_k, attention.cached_v
    before = [cache.clone() for cache in long]
    attention.cached_k, attention.cached_v = short
    attention(other, None)
    assert all(torch.equal(cache, kept) for cache, kept in zip(long, before, strict=True))
    assert not torch.equal(attention.cached_k, long[0])
