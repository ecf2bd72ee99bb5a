"""VectorQuantize of vector-quantize-pytorch, with the classes that are made of it, such as ResidualVQ.

Its codebook computes the distances (N, V) of all vectors to all codes, and a one-hot matrix of the chosen ones, with
which it gathers the codes and sums the vectors of each code. Here the codes are searched by `nearest_code`, gathered by
index and summed by index. All else stays its own code: losses, the rotation trick, moving averages, k-means, expiry of
dead codes, reductions over processes.

Facts about the foreign classes are read from versions 1.27 to 1.32 of
https://github.com/lucidrains/vector-quantize-pytorch.
"""

from __future__ import annotations

import inspect
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ..nearest_code import nearest_code
from .structure import Method, Target, count_as_left, hooks_of, left_to_the_original

# The original does not tell apart distances below this one, and chooses the first of such codes. Vectors longer than 1
# are not concerned: its squared distances of them round by more than 10 times the square of this one.
_LEAST_DISTANCE = 1e-4
_DISTANCES_AT_ONCE = 1 << 20  # where distances are computed, so that memory does not grow with N·V


def _vector_quantize(self: nn.Module, x: torch.Tensor, indices: torch.Tensor | None = None, *args, **kwargs):
    """`VectorQuantize.forward`: its own code, which finds an object that stands for its codebook."""
    reason = hooks_of(self, "_codebook")
    if indices is not None:
        reason = "the cross-entropy of given indices, which needs the distances"
    if reason:
        return left_to_the_original(self, "forward", reason, x, indices, *args, **kwargs)
    # Another object with the same state, so that calls in other threads don't find the stand-in.
    twin = object.__new__(type(self))
    vars(twin).update(vars(self), _codebook=_Codebook(self))
    return type(self).forward(twin, x, indices, *args, **kwargs)


class _Codebook:
    """Stands for the codebook of a VectorQuantize. It returns None in the place of the distances, which no supported
    configuration reads."""

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner

    def __getattr__(self, name: str):
        return getattr(self.owner._codebook, name)

    def __call__(self, x: torch.Tensor, **options):
        codebook = self.owner._codebook
        with torch.autocast("cuda", enabled=False):  # as in the original
            found = _reason_of_options(codebook, **options) or _look_up(codebook, x, **options)
        if not isinstance(found, str):
            return *found, None
        count_as_left(self.owner, found)
        return codebook(x, **options)


def _reason_of_options(
    codebook: nn.Module, sample_codebook_temp: float | None = None, codebook_transform_fn=None, topk=None, **others
) -> str | None:
    """Why a call with these options is left to the original, None if it is not."""
    if topk is not None:
        return "more than one code for each vector (topk), as in a beam search"
    if codebook_transform_fn is not None:
        return "codes that a function computes for each vector (codebook_transform_fn)"
    temperature = codebook.sample_codebook_temp if sample_codebook_temp is None else sample_codebook_temp
    for option, chosen in codebook.gumbel_sample.keywords.items():
        if chosen and codebook.training and temperature > 0:
            return f"sampling of codes ({option})"
    return None


def _look_up(
    codebook: nn.Module,
    x: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    freeze_codebook: bool = False,
    ema_update: bool | None = None,
    update_usage: bool = True,
    sample_codebook_temp: float | None = None,
    codebook_transform_fn: None = None,
    topk: None = None,
    **update_options,
) -> tuple[torch.Tensor, torch.Tensor] | str:
    """`Codebook.forward` without the distances: the codes (…, C) nearest to x (…, C), and their indices (…).

    Returns a reason instead if the call must be left to the original.
    """
    vectors = x.detach().float()
    if x.ndim < 4:
        vectors = vectors[None]
    shape = vectors.shape
    vectors = vectors.flatten(1, -2)  # (H, N, C)
    heads = vectors.shape[0]
    if mask is not None:  # of (B, L), for N = B times heads times L
        repeats = vectors.shape[1] // max(mask.numel(), 1)
        mask = mask[:, None].expand(-1, repeats, -1).reshape(1, -1).expand(heads, -1)
    codebook.init_embed_(vectors, mask=mask)
    embed = (codebook.embed if codebook.learnable_codebook else codebook.embed.detach()).to(vectors.dtype)
    codes = embed.detach()
    if reason := _unsearchable(vectors, codes):
        return reason
    search = _of_greatest_product if codebook.use_cosine_sim else _nearest
    indices = search(vectors, codes)  # (H, N)
    rows = _rows(indices, codes)
    table = embed.flatten(0, 1)
    if table.requires_grad:
        table = _wide(table)  # for the sums of its gradient
    quantized = F.embedding(rows, table).to(vectors.dtype)
    if codebook.training and update_usage and not freeze_codebook:
        ema_update = codebook.ema_update if ema_update is None else ema_update
        onehot = _OneHot(rows, codes.shape[:2])
        if hasattr(codebook, "update_codebook"):
            codebook.update_codebook(vectors, onehot, mask=mask, ema_update=ema_update, **update_options)
        elif ema_update:  # before version 1.28.3
            codebook.update_ema_part(vectors, onehot, mask=mask, **update_options)
    quantized, indices = quantized.view(shape), indices.view(shape[:-1])
    return (quantized[0], indices[0]) if x.ndim < 4 else (quantized, indices)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in fp64, in which many small floats are added to a large sum. MPS has fp32 only."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def _rows(indices: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Indices (H, N) of codes (H, V, C) as rows of codes.flatten(0, 1)."""
    heads, number = codes.shape[:2]
    if heads == 1:
        return indices
    return indices + torch.arange(heads, device=indices.device)[:, None] * number


def _unsearchable(vectors: torch.Tensor, codes: torch.Tensor) -> str | None:
    """Why the original does something else than to take the nearest codes, None if it does not."""
    if vectors.shape[0] != codes.shape[0]:
        return f"vectors for {vectors.shape[0]} codebooks, of which there are {codes.shape[0]}"
    # In the one-hot matrix of the original, a vector that is not finite reaches all codes.
    if not (torch.linalg.vector_norm(vectors) + torch.linalg.vector_norm(codes)).isfinite():
        return "vectors or codes that are not finite, or too large"
    return None


def _nearest(vectors: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The indices (H, N) of the codes (H, V, C) that are nearest to the vectors (H, N, C)."""
    found = nearest_code(vectors.transpose(0, 1), codes).T.contiguous()
    difference = vectors - F.embedding(_rows(found, codes), codes.flatten(0, 1))
    close = torch.linalg.vector_norm(difference, dim=-1) <= _LEAST_DISTANCE
    close &= torch.linalg.vector_norm(vectors, dim=-1) <= 1
    if close.any():
        for head, of_head in enumerate(close):
            found[head, of_head] = _first_of_the_closest(vectors[head, of_head], codes[head])
    return found


def _of_greatest_product(vectors: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The indices (H, N) of the codes (H, V, C) of the greatest product with the vectors (H, N, C) of length 1."""
    length = torch.linalg.vector_norm(codes, dim=-1)
    rounding = (codes.shape[-1] + 4) * torch.finfo(codes.dtype).eps / 2
    metric = "cosine"
    if not (((length - 1).abs() <= rounding) | (length == 0)).all():
        # In one more dimension all codes are made of one length, so that the greatest product is the least distance.
        # The vectors are made as long as the codes: neither of them then rounds more than the other.
        greatest = length.amax(-1, keepdim=True)
        rest = (greatest.square() - length.square()).clamp(min=0).sqrt()
        codes, metric = torch.cat((codes, rest[..., None]), dim=-1), "l2"
        vectors = F.pad(vectors * greatest[..., None], (0, 1))
    return nearest_code(vectors.transpose(0, 1), codes, metric=metric).T.contiguous()


def _first_of_the_closest(vectors: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """For each vector (N, C), the index of the first code (V, C) within the least distance that the original knows."""
    found = vectors.new_empty(vectors.shape[0], dtype=torch.int64)
    chunk = max(1, _DISTANCES_AT_ONCE // codes.shape[0])
    for part, of_part in zip(vectors.split(chunk), found.split(chunk), strict=True):
        distances = torch.cdist(part, codes, compute_mode="donot_use_mm_for_euclid_dist")
        of_part.copy_(distances.clamp(min=_LEAST_DISTANCE).argmin(-1))
    return found


class _OneHot:
    """Stands for the one-hot matrix (H, N, V) of the chosen codes where the original sums with it.

    The object has the operations that the moving averages of the original use, and no other.
    """

    def __init__(self, rows: torch.Tensor, size: tuple[int, int]) -> None:
        self.rows, self.size = rows, size

    def masked_fill(self, mask: torch.Tensor, value: float) -> _OneHot:
        """The same without the vectors where `mask` (H, N, 1) is true: they count in a row behind the last one."""
        if value != 0:
            raise NotImplementedError(f"value: expected 0, got {value}")
        return _OneHot(self.rows.masked_fill(mask.squeeze(-1), self.size.numel()), self.size)

    def __setitem__(self, mask: torch.Tensor, value: float) -> None:  # before version 1.28.3, mask (H, N)
        self.rows = self.masked_fill(mask[..., None], value).rows

    def sum(self, dim: int) -> torch.Tensor:
        """How many vectors have chosen each code, (H, V)."""
        if dim != 1:
            raise NotImplementedError(f"dim: expected 1, got {dim}")
        rows = self.rows.flatten()
        ones = torch.ones(rows.shape, dtype=torch.float32, device=rows.device)
        return ones.new_zeros(self.size.numel() + 1).scatter_add_(0, rows, ones)[:-1].view(self.size)

    def sum_of(self, vectors: torch.Tensor) -> torch.Tensor:
        """The sum of the vectors (H, N, C) that have chosen each code, (H, V, C).

        It is the gradient of F.embedding, which has the same bits in every run, on GPUs too; index_add_ has not.
        """
        number = self.size.numel() + 1
        sums = torch.ops.aten.embedding_dense_backward(_wide(vectors), self.rows, number, -1, False)
        return sums[:-1].view(*self.size, -1).to(vectors.dtype)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.einsum and args[0] == "h n d, h n c -> h c d" and isinstance(args[2], cls):
            return args[2].sum_of(args[1])
        return NotImplemented


# ---- recognition -------------------------------------------------------------------------------------------------


def _known(parameters: str, names: str) -> Method:
    return Method(tuple(parameters.split()), frozenset(names.split()))


_VERSIONS = "versions 1.27 to 1.32 of vector-quantize-pytorch"
_FORWARD = "x sample_codebook_temp mask freeze_codebook codebook_transform_fn ema_update_weight accum_ema_update "
_FORWARD_NAMES = (
    "F affine_param batch_mean batch_variance cdist clamp codebook_mean codebook_variance default detach dtype einsum "
    "ema_update embed exists float gather gumbel_sample init_embed_ l2norm learnable_codebook map ndim pack_one "
    "pairwise_distance rearrange repeat sample_codebook_temp shape sqrt to training update_affine use_cosine_sim "
    "vq_bridge "
)
_AVERAGES = "flatten embed_onehot mask ema_update_weight accum_ema_update"
_AVERAGES_NAMES = (
    "accum_grad_ affine_param all_reduce_fn batch_mean batch_variance callable clamp cluster_size codebook_mean "
    "codebook_variance contiguous decay einsum ema_inplace embed_avg exists sqrt sum "
)
_UPDATES = "expire_codes_ manual_ema_update update_ema "
# The methods of a codebook: from version 1.28.3 on, and before.
_CODEBOOK = {
    "forward": _known(_FORWARD + "ema_update topk update_usage", _FORWARD_NAMES + "update_codebook"),
    "update_codebook": _known(
        _AVERAGES + " ema_update",
        _UPDATES + "default ema_update has_dead_code_replacement track_cluster_size_and_embed_avg",
    ),
    "track_cluster_size_and_embed_avg": _known(_AVERAGES, _AVERAGES_NAMES + "masked_fill rearrange"),
}
_CODEBOOK_BEFORE = {
    "forward": _known(_FORWARD + "ema_update topk", _FORWARD_NAMES + "update_ema_part"),
    "update_ema_part": _known(_AVERAGES, _AVERAGES_NAMES + _UPDATES),
}
_GUMBEL_SAMPLE = _known(
    "temperature stochastic straight_through dim training topk",
    "F argmax detach dtype exists gumbel_noise indices one_hot shape softmax topk type",
)


def _codebook_refusal(codebook: object) -> str | None:
    if not isinstance(codebook, nn.Module):
        return f"_codebook: expected a module, got {type(codebook).__name__}"
    known = _CODEBOOK if hasattr(codebook, "update_codebook") else _CODEBOOK_BEFORE
    for name, method in known.items():
        function = getattr(type(codebook), name, None)
        if getattr(function, "__name__", None) == "forward":
            function = inspect.unwrap(function)  # its decorator is autocast
        if name in vars(codebook):
            return f"_codebook: its {name} was replaced by other code"
        if difference := method.difference(name, function):
            return f"_codebook: {difference}; known: {_VERSIONS}"
    sample, options = getattr(codebook, "gumbel_sample", None), {"stochastic", "straight_through"}
    if not isinstance(sample, partial) or sample.args or not sample.keywords.keys() <= options:
        return f"_codebook: gumbel_sample: expected that of VectorQuantize, got {sample}"
    if difference := _GUMBEL_SAMPLE.difference("gumbel_sample", sample.func):
        return f"_codebook: {difference}; known: {_VERSIONS}"
    if codebook.affine_param:
        return "affine parameters of the codebook (affine_param)"
    if getattr(codebook, "vq_bridge", None) is not None:
        return "codes that a module computes (vq_bridge)"
    return None


def _refusal(module: nn.Module) -> str | None:
    if module.has_commitment_loss and module.commitment_use_cross_entropy_loss:
        return "its commitment loss is a cross-entropy, which needs the distances"
    if module.has_codebook_diversity_loss:
        return "its codebook diversity loss needs the distances"
    return _codebook_refusal(module._codebook)


QUANTIZER = Target(
    name="quantizer of vector-quantize-pytorch",
    part="quantizer",
    attributes=(
        "_codebook", "project_in", "project_out", "heads", "separate_codebook_per_head", "codebook_size",
        "commitment_weight", "learnable_codebook",
    ),
    methods={
        "forward": _known(
            "x indices mask lens topk sample_codebook_temp freeze_codebook return_loss_breakdown codebook_transform_fn "
            "ema_update_weight accum_ema_update ema_update",
            "F LossBreakdown _codebook accept_3d_fmap accept_image_fmap backward channel_last "
            "codebook_diversity_loss_weight codebook_diversity_temperature codebook_size "
            "commitment_use_cross_entropy_loss commitment_weight cross_entropy default detach device dict "
            "directional_reparam directional_reparam_variance dtype einx embed entropy exists freeze_codebook "
            "has_codebook_diversity_loss has_codebook_orthogonal_loss has_commitment_loss heads identity "
            "in_place_codebook_optimizer int learnable_codebook lens_to_mask manual_in_place_optimizer_update "
            "masked_fill_ maybe_split_heads_from_input mean min mse_loss ndim orthogonal_loss_fn "
            "orthogonal_reg_active_codes_only orthogonal_reg_max_codes orthogonal_reg_weight project_in project_out "
            "randperm rearrange reduce repeat requires_grad requires_grad_ return_zeros_for_masked_padding rotate_to "
            "rotation_trick route_gradients_to_input separate_codebook_per_head shape softmax straight_through "
            "sync_update_v tensor torch training transform_input type unique update update_in_place_optimizer where "
            "zero zeros_like",
        )
    },
    refusal=_refusal,
    versions=_VERSIONS,
    replacements={"forward": _vector_quantize},
)  # fmt: skip

TARGETS = (QUANTIZER,)
