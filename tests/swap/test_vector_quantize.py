"""Tests swapping VectorQuantize: outputs, losses, gradients, averages and random numbers are those before the swap."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.vector_quantize import (
    CODES,
    DIM,
    SHAPE,
    assert_same,
    assert_trains_alike,
    make,
    swapped_copy,
    train,
)  # fmt: skip
from var_kernels import swap

QUANTIZERS = {
    "plain": {},
    "expiry": {"threshold_ema_dead_code": 2},
    "kmeans": {"kmeans_init": True, "threshold_ema_dead_code": 1},
    "cosine": {"use_cosine_sim": True},
    "cosine, kmeans, expiry": {"use_cosine_sim": True, "kmeans_init": True, "threshold_ema_dead_code": 2},
    "heads": {"heads": 2, "codebook_dim": 4, "threshold_ema_dead_code": 1},
    "heads with projections": {"heads": 3, "codebook_dim": 4},
    "codebooks": {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True, "threshold_ema_dead_code": 1},
    "codebooks, cosine": {"heads": 4, "codebook_dim": 4, "separate_codebook_per_head": True, "use_cosine_sim": True},
    "codebooks, kmeans": {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True, "kmeans_init": True},
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "learnable codebooks": {
        "heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True, "learnable_codebook": True,
        "ema_update": False,
    },
    "learnable, expiry": {"learnable_codebook": True, "ema_update": False, "threshold_ema_dead_code": 1},
    "learnable, synchronous": {"learnable_codebook": True, "ema_update": False, "sync_update_v": 0.2},
    "optimizer in place": {
        "learnable_codebook": True, "ema_update": False, "threshold_ema_dead_code": 1,
        "in_place_codebook_optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    },
    "orthogonal": {"orthogonal_reg_weight": 3.0, "orthogonal_reg_active_codes_only": True},
    "orthogonal, random codes": {"orthogonal_reg_weight": 3.0, "orthogonal_reg_max_codes": 5},
    "orthogonal, cosine": {"orthogonal_reg_weight": 3.0, "use_cosine_sim": True, "ema_update": False},
    "straight through": {"rotation_trick": False},
    "directions": {"directional_reparam": True, "threshold_ema_dead_code": 1},
    "frozen": {"freeze_codebook": True},
    "no averages": {"ema_update": False, "threshold_ema_dead_code": 1},
    "averages by hand": {"manual_ema_update": True, "threshold_ema_dead_code": 1},
    "no commitment": {"commitment_weight": 0.0},
}  # fmt: skip


@pytest.mark.parametrize("options", QUANTIZERS.values(), ids=QUANTIZERS)
def test_training(options):
    assert_trains_alike(make(**options))


@pytest.mark.parametrize("options", QUANTIZERS.values(), ids=QUANTIZERS)
def test_training_with_masks(options):
    """The commitment loss of the original takes no mask beside several heads."""
    if options.get("heads", 1) > 1:
        options = options | {"commitment_weight": 0.0}
    mask = torch.rand(SHAPE[:2], generator=torch.Generator().manual_seed(2)) < 0.7
    mask[:, :5] = torch.tensor([[True], [False]])
    assert_trains_alike(make(**options), mask=mask)
    assert_trains_alike(make(**options), lens=torch.tensor([30, 11]))


@pytest.mark.parametrize("options", QUANTIZERS.values(), ids=QUANTIZERS)
def test_eval(options):
    module = make(**options)
    train(module)  # so that the codes are not those of the start
    assert_trains_alike(module.eval())


SHAPES = {
    "images": ({"accept_image_fmap": True}, (2, DIM, 4, 5)),
    "volumes": ({"accept_3d_fmap": True}, (2, DIM, 2, 3, 4)),
    "channels first": ({"channel_last": False}, (2, DIM, 20)),
    "images, heads": ({"accept_image_fmap": True, "heads": 2, "separate_codebook_per_head": True}, (2, DIM, 4, 5)),
    "one token each": ({}, (7, DIM)),
    "one vector": ({}, (1, 1, DIM)),
    "codes of one channel": ({"dim": 1, "codebook_size": 6}, (3, 10, 1)),
    "one code": ({"codebook_size": 1}, SHAPE),
}


@pytest.mark.parametrize("options, shape", SHAPES.values(), ids=SHAPES)
def test_shapes(options, shape):
    assert_trains_alike(make(**options), shape=shape)


def test_no_vectors():
    assert_trains_alike(make(commitment_weight=0.0), shape=(2, 0, DIM), steps=1)


UPDATES = {
    "weight of each code": {"ema_update_weight": torch.linspace(0, 1, CODES)},
    "weight by a function": {"ema_update_weight": lambda sums, sizes: (sizes + 1).reciprocal()},
    "accumulated": {"accum_ema_update": True},
    "no averages": {"ema_update": False},
    "frozen": {"freeze_codebook": True},
    "breakdown of losses": {"return_loss_breakdown": True},
}


@pytest.mark.parametrize("options", UPDATES.values(), ids=UPDATES)
def test_options_of_a_call(options):
    module = make(threshold_ema_dead_code=1)
    if "return_loss_breakdown" in options:
        ours, _ = swapped_copy(module)
        x = torch.randn(SHAPE)
        assert all(torch.equal(a, b) for a, b in zip(ours(x, **options)[3], module(x, **options)[3], strict=True))
    else:
        assert_trains_alike(module, **options)


def test_accumulated_averages_are_used_by_the_next_update():
    module = make()
    ours, _ = swapped_copy(module)
    for x in torch.randn(4, *SHAPE):
        for model in (ours, module):
            model(x, accum_ema_update=True)
    for model in (ours, module):
        model(x)
    assert_same(ours._codebook.embed, module._codebook.embed, 4 * SHAPE[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("cosine", [False, True], ids=["l2", "cosine"])
def test_dtypes_of_the_module(dtype, cosine):
    module = make(use_cosine_sim=cosine, threshold_ema_dead_code=1).to(dtype)
    assert_trains_alike(module, dtype=dtype, steps=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_of_the_input(dtype):
    assert_trains_alike(make(), dtype=dtype, steps=1)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_autocast_finds_the_nearest_codes(training):
    """The original computes distances, and in training also the codes, in bf16 on a CPU."""
    module = make(codebook_size=256).train(training)
    ours, report = swapped_copy(module)
    x, codes = torch.randn(4, 100, DIM), module._codebook.embed[0].clone()
    with torch.autocast("cpu", torch.bfloat16):
        (found, indices, loss), (expected, other, other_loss) = ours(x), module(x)
    far = (x - codes[indices]).double().norm(dim=-1)
    assert (far <= torch.cdist(x.double(), codes.double()).amin(-1) + 1e-6).all()
    assert (far <= (x - codes[other]).double().norm(dim=-1) + 1e-6).all()
    assert found.dtype == expected.dtype and loss.dtype == other_loss.dtype and torch.equal(found, codes[indices])
    assert not report.left_to_the_original


def test_many_vectors_of_one_code_add_up_without_bias():
    """Silence, for example. In fp32, one after the other, they lost 1e-5 of their sum."""
    x = 0.1 + 1e-3 * torch.rand(1, 100_000, DIM, generator=torch.Generator().manual_seed(0))
    exact = x.double().sum((0, 1))
    for options in ({}, {"learnable_codebook": True, "ema_update": False}):
        ours, _ = swapped_copy(make(codebook_size=2, decay=0.0, **options))
        ours._codebook.embed.data.copy_(torch.tensor([0.0, 9.0])[:, None].expand(1, 2, DIM))
        _, indices, loss = ours(x)
        assert not indices.any()
        if options:
            loss.backward()
            found, expected = ours._codebook.embed.grad[0, 0], -2 * exact / x.numel()
        else:
            found, expected = ours._codebook.embed_avg[0, 0], exact
        assert (found - expected).abs().le(4 * torch.finfo(torch.float32).eps * expected.abs()).all()


# ---- what is left to the original --------------------------------------------------------------------------------


def test_given_indices_need_the_distances():
    module = make()
    ours, report = swapped_copy(module)
    x, indices = torch.randn(SHAPE, requires_grad=True), torch.randint(0, CODES, SHAPE[:2])
    for model in (ours, module):
        _, loss = model(x, indices=indices)
        loss.backward()
    assert list(report.left_to_the_original.values()) == [1]
    assert "cross-entropy of given indices" in str(report)


LEFT = {
    "stochastic": ({"stochastic_sample_codes": True}, {}, "sampling of codes (stochastic)"),
    "straight through": (
        {"straight_through": True, "rotation_trick": False}, {}, "sampling of codes (straight_through)",
    ),
    "several codes": ({}, {"topk": 3}, "topk"),
    "transformed": (
        {}, {"codebook_transform_fn": lambda codes: codes[:, None, None].expand(-1, 2, 30, -1, -1)}, "transform_fn",
    ),
}  # fmt: skip


@pytest.mark.parametrize("options, call, reason", LEFT.values(), ids=LEFT)
def test_calls_left_to_the_original(options, call, reason):
    report = assert_trains_alike(make(**options), served=False, **call)
    assert reason in str(report)


def test_sampling_at_temperature_0_and_in_eval_is_no_sampling():
    module = make(stochastic_sample_codes=True)
    assert_trains_alike(module, sample_codebook_temp=0.0)
    assert_trains_alike(module.eval())


REFUSED = {
    "cross-entropy": ({"commitment_use_cross_entropy_loss": True}, "commitment loss is a cross-entropy"),
    "diversity": ({"codebook_diversity_loss_weight": 0.1}, "diversity loss needs the distances"),
    "affine": ({"affine_param": True}, "affine_param"),
    "bridge": ({"vq_bridge": torch.nn.Linear(DIM, DIM)}, "vq_bridge"),
}


@pytest.mark.parametrize("options, reason", REFUSED.values(), ids=REFUSED)
def test_refused_configurations(options, reason):
    module = make(**options)
    with pytest.warns(UserWarning, match="nothing|left"):
        report = swap.apply(module)
    assert not report.swapped and reason in report.skipped[0].reason
    assert "forward" not in vars(module)


def test_another_codebook_is_named():
    class Averaged(type(make()._codebook)):
        def update_codebook(self, flatten, embed_onehot, *args, **kwargs):
            self.usage = embed_onehot.mean(dim=1)

    for change in ("class", "method", "sampler", "none"):
        module = make()
        if change == "class":
            module._codebook.__class__ = Averaged
        elif change == "method":
            module._codebook.update_codebook = lambda *args, **kwargs: None
        elif change == "none":
            module._codebook = None
        else:
            module._codebook.gumbel_sample = lambda logits, **kwargs: None
        with pytest.warns(UserWarning):
            report = swap.apply(module)
        assert "_codebook: " in report.skipped[0].reason


def test_another_version_is_named():
    class Older(type(make())):
        def forward(self, x, indices=None, mask=None):
            return x

    with pytest.warns(UserWarning):
        report = swap.apply(make(Older))
    assert "its forward takes (x, indices, mask)" in report.skipped[0].reason
    assert "versions 1.27 to 1.32" in report.skipped[0].reason


def test_hooks_of_the_codebook_see_the_distances():
    module = make()
    report = swap.apply(module)
    seen = []
    handle = module._codebook.register_forward_hook(lambda codebook, args, out: seen.append(out[2]))
    module(torch.randn(SHAPE))
    assert seen[0].shape == (1, *SHAPE[:2], CODES) and "_codebook has hooks" in str(report)
    handle.remove()
    module(torch.randn(SHAPE))
    assert len(seen) == 1 and list(report.left_to_the_original.values()) == [1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_vector_that_is_not_finite_reaches_all_codes_as_before(value):
    module = make()
    ours, report = swapped_copy(module)
    x = torch.randn(SHAPE)
    x[0, 3, 2] = value
    for a, b in zip(ours(x)[:2], module(x)[:2], strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(ours.state_dict(), module.state_dict(), rtol=0, atol=0, equal_nan=True)
    assert "not finite" in str(report)


def test_distances_that_the_original_does_not_tell_apart():
    """It chooses the first code that is nearer than 1e-4, not the nearest."""
    module = make()
    module._codebook.embed.mul_(1e-5)
    assert_trains_alike(module, scale=1e-6, steps=1)
    x, codes = torch.randn(2, 40, DIM) * 0.01, module._codebook.embed[0]
    codes.copy_(x[0, :CODES] + 1e-5)
    codes[CODES // 2 :] = codes[: CODES // 2] + 2e-5
    ours, _ = swapped_copy(module.eval())
    assert torch.equal(ours(x)[1], module(x)[1])


@pytest.mark.parametrize("length", [0.01, 1.0, 1e5])
def test_cosine_codes_of_other_lengths(length):
    """A codebook that was set or trained by gradients may have them. The original takes the greatest product."""
    module = make(use_cosine_sim=True, codebook_size=200)
    module.codebook = torch.randn(200, DIM) * length
    assert_trains_alike(module, steps=1)
    assert_trains_alike(module.eval())


# ---- the swap ----------------------------------------------------------------------------------------------------


def test_reductions_over_processes_are_those_of_the_original():
    module = make(heads=2, codebook_dim=4, separate_codebook_per_head=True, commitment_weight=0.0)
    ours, _ = swapped_copy(module)
    mask = torch.arange(SHAPE[1]) < torch.tensor([[30], [12]])
    reduced = {}
    for model in (ours, module):
        reduced[model] = []

        def double(tensor, calls=reduced[model]):
            assert tensor.is_contiguous()
            calls.append(tensor.detach().clone())
            tensor.data.mul_(2)

        model._codebook.all_reduce_fn = double
        torch.manual_seed(0)
        model(torch.randn(SHAPE), mask=mask)
    assert len(reduced[ours]) == len(reduced[module]) == 2
    for a, b in zip(reduced[ours], reduced[module], strict=True):
        assert_same(a, b, SHAPE[1])
    assert_same(ours._codebook.embed, module._codebook.embed, SHAPE[1])


class _Sizes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize(
    "options",
    [{}, {"threshold_ema_dead_code": 2}, {"use_cosine_sim": True}, {"learnable_codebook": True, "ema_update": False}],
    ids=str,
)
def test_no_tensor_of_a_training_step_has_a_distance_for_each_pair(options):
    module = make(codebook_size=256, **options)
    ours, _ = swapped_copy(module)
    largest = []
    for model in (module, ours):
        with _Sizes() as sizes:
            train(model, shape=(1, 512, DIM), steps=2)
        largest.append(sizes.largest)
    assert largest[0] >= 512 * 256 and largest[1] < 512 * 256 / 8


def test_revert_gives_back_the_same_bits():
    module = make(threshold_ema_dead_code=1)
    ours, report = swapped_copy(module)
    assert vars(ours).keys() - vars(module).keys() == {"forward"}
    report.revert()
    assert vars(ours).keys() == vars(module).keys()
    for a, b in zip(train(ours)[0], train(module)[0], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(sum(a, []), sum(b, []), strict=True))


def test_the_call_changes_nothing_of_the_module():
    ours, _ = swapped_copy(make())
    before = dict(vars(ours))
    ours(torch.randn(SHAPE))
    assert vars(ours) == before
