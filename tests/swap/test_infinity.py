"""Tests swapping Infinity's classes: same logits, losses, gradients, samples and random numbers as before the swap."""

import copy
import functools
import pickle
import random
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from tests.helpers import foreign_infinity
from tests.helpers.caches import assert_going_back_overwrites_nothing
from tests.helpers.foreign_infinity import make
from tests.helpers.rounding import assert_as_near
from var_kernels import swap
from var_kernels.swap.infinity import vectors_of

SCHEDULES = ([(1, 1, 1), (1, 2, 2), (1, 3, 4), (1, 6, 5)], [(1, 1, 1), (1, 2, 3), (1, 5, 5)], [(1, 2, 2)])
VECTORS = ("Infinity_visible_kvlen", "Infinity_invisible_qlen")


def lens_of(schedule):
    return tuple(t * h * w for t, h, w in schedule)


def text_of(seed=0):
    """Features of two texts, packed, with their lengths and offsets."""
    features = torch.randn(12, 24, generator=torch.Generator().manual_seed(seed))
    return features, [5, 7], torch.tensor([0, 5, 12], dtype=torch.int32), 7


def step(model, schedule=SCHEDULES[0], autocast=False, vectors=False):
    """Logits and gradients of a training step, with the random numbers of one seed.

    `vectors` gives the model the two vectors that its code takes and never makes.
    """
    dtype = model.pos_start.dtype
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, sum(lens_of(schedule)) - 1, model.d_vae, generator=generator).to(dtype)
    features, *rest = text_of()
    model.zero_grad()
    torch.manual_seed(5)
    random.seed(5)
    if vectors:
        vars(model).update(zip(VECTORS, vectors_of(lens_of(schedule), torch.device("cpu")), strict=True))
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model((features.to(dtype), *rest), x, scale_schedule=schedule)
    finally:
        for name in VECTORS if vectors else ():
            del vars(model)[name]
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step_in_fp64(model, schedule=SCHEDULES[0], **options):
    """A training step of a copy in float64, in which `.float()` rounds nothing, with the same random numbers."""
    with mock.patch.object(torch.Tensor, "float", lambda tensor: tensor):
        return step(copy.deepcopy(model).double(), schedule, **options)


class Bits:
    """Codes of bits, of which it keeps those that were sampled."""

    def __init__(self):
        self.sampled = []
        lfq = SimpleNamespace(indices_to_codes=self.codes)
        self.quantizer = SimpleNamespace(lfq=lfq, z_interplote_up="trilinear")

    def codes(self, bits, label_type):
        self.sampled.append(bits.flatten())
        return (2.0 * bits - 1).permute(0, 4, 1, 2, 3)


def sample(model, schedule=SCHEDULES[0]):
    bits = Bits()
    model.eval().autoregressive_infer_cfg(bits, schedule, text_of(), B=2, cfg_list=[3.0] * len(schedule))
    return torch.cat(bits.sampled)


OPTIONS = {
    "per-block": {},
    "shared": {"shared_aln": True, "cross_attn_layer_scale": 0.5},
    "no-norm": {"cos_attn": False, "fused_norm": True},
    "fused": {"fused_norm": True, "shared_aln": True},
    "flash": {"customized_flash_attn": True},
    "padded": {"pad_to_multiplier": 32, "fused_norm": True},
    "chunks": {"block_chunks": 2, "depth": 4, "cross_attn_layer_scale": 0.1},
    "chunks-full-block": {"block_chunks": 2, "checkpointing": "full-block", "drop_path_rate": 0.5},
    "full-block": {"checkpointing": "full-block", "drop_path_rate": 0.5, "drop_rate": 0.2},
    "self-attn": {"checkpointing": "self-attn", "drop_path_rate": 0.5, "pad_to_multiplier": 16},
    "drop-path": {"drop_path_rate": 0.8, "shared_aln": True, "fused_norm": True, "customized_flash_attn": True},
    "dropout": {"drop_rate": 0.3, "pad_to_multiplier": 16, "drop_path_rate": 0.4},
    "flex": {"use_flex_attn": True, "pad_to_multiplier": 32, "fused_norm": True},
}


@pytest.fixture(params=OPTIONS)
def model(request):
    return make(schedules=SCHEDULES, **OPTIONS[request.param])


def test_everything_is_swapped(model):
    report = swap.apply(model)
    assert not report.skipped
    expected = {"AdaLNBeforeHead", "CrossAttnBlock", "Infinity", "SelfAttention"}
    assert {entry.cls for entry in report.swapped} == expected | ({"FlexAttn"} if model.use_flex_attn else set())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_training_step_in_fp32(model, schedule):
    flash = model.customized_flash_attn
    exact, plain = step_in_fp64(model, schedule, vectors=flash), step(model, schedule, vectors=flash)
    with swap.applied(model) as report:
        found = step(model, schedule)
        assert not report.left_to_the_original
    assert_as_near(found, plain, exact)


def test_training_step_under_autocast_is_as_near_to_fp32_as_before(model):
    flash = model.customized_flash_attn
    exact, plain = step(model, vectors=flash), step(model, autocast=True, vectors=flash)
    with swap.applied(model):
        ours = step(model, autocast=True)
    assert_as_near(ours, plain, exact, unit=2.0**-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_sampling_draws_the_same_bits(model, schedule):
    expected = sample(model, schedule)
    with swap.applied(model) as report:
        assert torch.equal(sample(model, schedule), expected)
        assert not report.left_to_the_original


@pytest.mark.parametrize("part", ["attention", "adaln"])
def test_parts_are_swapped_alone(part):
    model = make(schedules=SCHEDULES, shared_aln=True)
    exact, plain = step_in_fp64(model), step(model)
    with swap.applied(model, **{other: other == part for other in ("attention", "adaln", "quantizer")}) as report:
        expected = {"attention": {"SelfAttention", "Infinity"}, "adaln": {"CrossAttnBlock", "AdaLNBeforeHead"}}[part]
        assert {entry.cls for entry in report.swapped} == expected
        assert_as_near(step(model), plain, exact)


@pytest.mark.parametrize("options", [
    {}, {"pad_to_multiplier": 32}, {"customized_flash_attn": True}, {"use_flex_attn": True},
], ids=str)  # fmt: skip
def test_inference_mode(options):
    model = make(schedules=SCHEDULES, **options).eval()
    schedule = SCHEDULES[0]
    if model.customized_flash_attn:
        vars(model).update(zip(VECTORS, vectors_of(lens_of(schedule), torch.device("cpu")), strict=True))
    x = torch.randn(2, sum(lens_of(schedule)) - 1, 8)

    def run():
        random.seed(1)
        with torch.inference_mode():
            return model(text_of(), x, scale_schedule=schedule), sample(model)

    logits, bits = run()
    for name in VECTORS if model.customized_flash_attn else ():
        del vars(model)[name]
    with swap.applied(model) as report:
        found = run()
        assert not report.left_to_the_original
    torch.testing.assert_close(found[0], logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[1], bits)


@pytest.mark.parametrize("flash", [False, True], ids=["mask", "flash"])
def test_schedules_change_from_call_to_call(flash):
    model = make(schedules=SCHEDULES, customized_flash_attn=flash)
    expected = [step(model, schedule, vectors=flash)[0] for schedule in SCHEDULES]
    with swap.applied(model):
        for _ in range(2):
            for schedule, right in zip(SCHEDULES, expected, strict=True):
                torch.testing.assert_close(step(model, schedule)[0], right, rtol=1e-4, atol=1e-4)


def test_without_the_swap_the_two_vectors_are_missing():
    model = make(schedules=SCHEDULES, customized_flash_attn=True)
    with pytest.raises(AttributeError, match="Infinity_visible_kvlen"):
        step(model)
    names = set(model.state_dict()), {name for name, _ in model.named_buffers()}
    with swap.applied(model):
        step(model)
        # They are there during a call only: the trainer of Infinity knows all buffers by name.
        assert not any(hasattr(model, name) for name in VECTORS)
        assert names == (set(model.state_dict()), {name for name, _ in model.named_buffers()})


def test_vectors_that_a_model_makes_itself_are_used():
    model = make(schedules=SCHEDULES, customized_flash_attn=True)
    schedule = SCHEDULES[0]
    other = vectors_of((sum(lens_of(schedule)),), torch.device("cpu"))
    with swap.applied(model):
        ours = step(model)[0]
        vars(model).update(zip(VECTORS, other, strict=True))
        assert not torch.allclose(step(model)[0], ours)
        assert getattr(model, VECTORS[0]) is other[0]


def test_no_mask_is_made():
    model = make(schedules=SCHEDULES)
    with swap.applied(model), mock.patch.object(torch, "where", side_effect=AssertionError("a mask is made")):
        step(model)
    assert not model.customized_flash_attn and not hasattr(model, VECTORS[0])


def test_attention_alone_of_which_one_module_keeps_its_code_gets_the_mask():
    model = make(schedules=SCHEDULES)
    expected = step(model)
    report = swap.apply(model, adaln=False)
    del vars(model.blocks[0].sa)["forward"]
    found = step(model)
    report.revert()
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flash", [False, True], ids=["heads-first", "tokens-first"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_caches_have_the_layout_and_content_of_the_original(flash, autocast):
    model = make(schedules=SCHEDULES, customized_flash_attn=flash)
    attention, schedule = model.blocks[0].sa.eval(), SCHEDULES[0]
    x = torch.randn(2, sum(lens_of(schedule)), 32, generator=torch.Generator().manual_seed(1))

    def caches(swapped_parts):
        attention.kv_caching(True)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for i, part in enumerate(x.split(lens_of(schedule), dim=1)):
                if i in swapped_parts:
                    with swap.applied(model):
                        out = attention(part, None, None, schedule, model.rope2d_freqs_grid, i)
                else:
                    out = attention(part, None, None, schedule, model.rope2d_freqs_grid, i)
        found = out, attention.cached_k, attention.cached_v
        attention.kv_caching(False)
        return found

    expected = caches(())
    for swapped_parts in ((0, 1, 2, 3), (1, 2), (0, 3)):  # a swap, or its end, in the middle of a sequence
        out, *cached = caches(swapped_parts)
        bound = 2.0**-7 if autocast else 1e-5
        torch.testing.assert_close(out, expected[0], rtol=bound, atol=bound)
        for found, right in zip(cached, expected[1:], strict=True):
            torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


def test_a_cache_to_which_somebody_goes_back_is_not_overwritten():
    model = make(schedules=SCHEDULES)
    attention = model.blocks[0].sa.eval()
    with swap.applied(model), torch.no_grad():
        assert_going_back_overwrites_nothing(attention)


def test_a_cache_of_another_batch_is_refused_as_by_the_original():
    model = make(schedules=SCHEDULES)
    attention = model.blocks[0].sa.eval()
    with swap.applied(model), torch.no_grad():
        attention.kv_caching(True)
        attention(torch.randn(2, 4, 32), None)
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            attention(torch.randn(1, 4, 32), None)


def test_a_cache_of_inference_mode_grows_outside_of_it():
    model = make(schedules=SCHEDULES)
    attention = model.blocks[0].sa.eval()
    x = torch.randn(2, 4, 32)
    with swap.applied(model):
        attention.kv_caching(True)
        with torch.inference_mode():
            attention(x, None)
        with torch.no_grad():
            attention(x, None)
    assert attention.cached_k.shape == (2, 2, 8, 16)


def test_a_mask_that_is_not_block_causal_is_obeyed():
    model = make(schedules=SCHEDULES)
    attention = model.blocks[0].sa.eval()
    x = torch.randn(2, 5, 32)
    padded = torch.full((1, 1, 5, 5), -torch.inf)
    padded[..., :3, :3] = 0
    padded[..., 3:, 1] = 0  # padding that sees key 1
    masks = {
        "a mask that is not block-causal": torch.zeros(1, 1, 5, 5).masked_fill(torch.eye(5).bool(), -torch.inf),
        "a mask that is not block-causal ": padded,
        "a mask with other values than 0 and -inf": torch.full((1, 1, 5, 5), -0.5),
        "differs by sample or head": torch.zeros(2, 1, 5, 5),
    }
    for reason, mask in masks.items():
        expected = attention(x, mask)
        with swap.applied(model) as report:
            assert torch.equal(attention(x, mask), expected)
            assert reason.strip() in str(report), reason


@pytest.mark.parametrize("padding", [1, 3])
@pytest.mark.parametrize("cos_attn", [False, True], ids=["plain", "norm"])
def test_rows_of_padding_get_the_value_of_key_0(padding, cos_attn):
    attention = make(schedules=SCHEDULES, cos_attn=cos_attn).blocks[0].sa
    mask = torch.zeros(1, 1, 5, 5)
    mask[..., :1, 1:] = -torch.inf
    mask = torch.nn.functional.pad(mask, (0, padding, 0, padding), value=-torch.inf)
    mask[:, :, 5:, 0] = 0
    x, weights = torch.randn(2, 5 + padding, 32), torch.randn(2, 5 + padding, 32)

    def run():
        leaf = x.clone().requires_grad_(True)
        out = attention(leaf, mask)
        return out, *torch.autograd.grad((out * weights).sum(), (leaf, attention.v_bias, attention.mat_qkv.weight))

    expected = run()
    with swap.applied(attention) as report:
        found = run()
        assert not report.left_to_the_original
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared_aln", [False, True], ids=["per-block", "shared"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_stochastic_depth_draws_as_many_numbers_of_the_same_dtype(shared_aln, autocast):
    model = make(schedules=SCHEDULES, drop_path_rate=0.5, shared_aln=shared_aln)
    drawn = []
    kept = torch.Tensor.bernoulli_

    def draw(tensor, *args, **options):
        drawn.append((tensor.dtype, tensor.shape))
        return kept(tensor, *args, **options)

    with mock.patch.object(torch.Tensor, "bernoulli_", draw):
        step(model, autocast=autocast)
        expected = drawn.copy()
        drawn.clear()
        with swap.applied(model):
            step(model, autocast=autocast)
    assert drawn == expected and len(drawn) == 4


@pytest.mark.parametrize("checkpointing", [None, "self-attn", "full-block"])
def test_what_is_checkpointed_is_computed_twice_as_before(checkpointing):
    model = make(schedules=SCHEDULES, checkpointing=checkpointing, drop_path_rate=0.5)
    called = []
    for name, module in model.blocks.named_modules():
        if name.endswith((".sa", ".ca", ".ffn")):
            module.register_forward_pre_hook(lambda *args, name=name: called.append(name))
    step(model)
    expected = called.copy()
    called.clear()
    with swap.applied(model):
        step(model)
    assert called == expected and len(called) > 6 - (checkpointing is None)


def test_vectors_that_are_no_schedule_are_left_to_the_original():
    model = make(schedules=SCHEDULES, customized_flash_attn=True)
    attention = model.blocks[0].sa.eval()
    x, vectors = torch.randn(2, 5, 32), (torch.tensor([2, 1, 5, 4, 5]), torch.tensor([0, 0, 0, 0, 0]))
    expected = attention(x, vectors)
    with swap.applied(model) as report:
        assert torch.equal(attention(x, vectors), expected)
        assert "calls by its own code: no ends of scales" in str(report)


def test_vectors_beside_a_cache_get_to_code_that_needs_a_mask_as_a_mask():
    model = make(schedules=SCHEDULES).train()
    expected = step(model)[0]
    with swap.applied(model) as report:
        model.blocks[0].sa.kv_caching(True)
        torch.testing.assert_close(step(model)[0], expected, rtol=1e-4, atol=1e-4)
        assert report.left_to_the_original == {("blocks.0.sa", "a mask beside a cache"): 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_ada_layer_norm_returns_fp32(dtype):
    torch.manual_seed(1)
    x, scale, shift = torch.randn(2, 5, 32).to(dtype), torch.randn(2, 1, 32), torch.randn(2, 1, 32)
    found = swap.fused_ada_layer_norm(C=32, eps=1e-6, x=x, scale=scale, shift=shift)
    expected = foreign_infinity.fused_ada_layer_norm(32, 1e-6, x, scale, shift)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="x: expected 31 channels"):
        swap.fused_ada_layer_norm(31, 1e-6, x, scale, shift)


@pytest.mark.parametrize("wrap", [
    lambda function: functools.wraps(function)(lambda *args, **kwargs: function(*args, **kwargs)),  # as torch.compile
    lambda function: swap.fused_ada_layer_norm,
], ids=["compiled", "ours"])  # fmt: skip
def test_the_fused_norm_is_recognised(monkeypatch, wrap):
    function = wrap(foreign_infinity.fused_ada_layer_norm)
    monkeypatch.setattr(foreign_infinity, "fused_ada_layer_norm", function)
    model = make(schedules=SCHEDULES, fused_norm=True)
    expected = step(model)
    with swap.applied(model, strict=True):
        torch.testing.assert_close(step(model)[0], expected[0], rtol=1e-4, atol=1e-4)


def test_rms_norm_is_skipped_by_name():
    report = swap.apply(make(schedules=SCHEDULES, fused_norm=True, rms_norm=True))
    reasons = {entry.path: entry.reason for entry in report.skipped}
    assert set(reasons) == {"blocks.0", "blocks.1", "head_nm"}
    assert all(reason.startswith("its fused_norm_func uses") and "rsqrt" in reason for reason in reasons.values())


def test_code_that_computes_something_else_is_skipped_by_name():
    model = make(schedules=SCHEDULES)

    class Rotated(type(model.blocks[0].sa)):
        def forward(self, x, attn_bias_or_two_vector, attn_fn=None, scale_schedule=None, rope2d_freqs_grid=None,
                    scale_ind=0):  # fmt: skip
            return super().forward(x.roll(1, dims=1), attn_bias_or_two_vector)

    model.blocks[0].sa.__class__ = Rotated
    [skipped] = swap.apply(model).skipped
    assert skipped.path == "blocks.0.sa" and "uses forward, roll, super" in skipped.reason


@pytest.mark.parametrize(("inner", "fused", "skipped"), [
    ("ln_wo_grad", False, True), ("drop_path", False, True), ("ln_wo_grad", True, False), ("ca_norm", False, False),
], ids=str)  # fmt: skip
def test_modules_with_hooks_that_would_not_be_called_keep_them(inner, fused, skipped):
    model = make(schedules=SCHEDULES, fused_norm=fused)
    getattr(model.blocks[0], inner).register_forward_hook(lambda *args: None)
    entries = [("blocks.0", "CrossAttnBlock", f"{inner} has hooks, which would not be called")] if skipped else []
    assert swap.apply(model).skipped == entries


@pytest.mark.parametrize("path", ["blocks.0.ln_wo_grad", "blocks.0.drop_path", "head_nm.ln_wo_grad"])
def test_hooks_that_come_after_the_swap_fire(path):
    model, fired = make(schedules=SCHEDULES, drop_path_rate=0.5), []
    expected = step(model)
    with swap.applied(model) as report:
        model.get_submodule(path).register_forward_hook(lambda *args: fired.append(path))
        found = step(model)
        assert fired and [*report.left_to_the_original] == [
            (path.rpartition(".")[0], f"{path.rpartition('.')[2]} has hooks, which would not be called")
        ]
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)


def test_hooks_of_modules_fire():
    model = make(schedules=SCHEDULES, block_chunks=2).eval()
    fired = []
    for name, module in model.named_modules():
        if not name.endswith(("ln_wo_grad", "drop_path")) and name != "head_nm.ln_wo_grad":
            module.register_forward_hook(lambda *args, name=name: fired.append(name))

    def run():
        fired.clear()
        step(model)
        return list(fired)

    expected = run()
    with swap.applied(model):
        assert run() == expected


def test_copies_are_swapped_and_pickles_are_not():
    model = make(schedules=SCHEDULES)
    before = set(model.state_dict())
    report = swap.apply(model)
    expected = step(model)
    twin = copy.deepcopy(model)
    assert twin.blocks[0].sa.forward.__self__ is twin.blocks[0].sa
    assert twin.unregistered_blocks[0] is twin.blocks[0]
    assert torch.equal(step(twin)[0], expected[0])
    loaded = pickle.loads(pickle.dumps(model))
    assert loaded.blocks[0].sa.forward.__func__ is type(loaded.blocks[0].sa).forward
    assert not swap.apply(loaded).skipped
    assert set(model.state_dict()) == before
    report.revert()
    assert "forward" not in vars(model.blocks[0].sa) and "forward" in vars(twin.blocks[0].sa)


def test_revert_gives_back_the_same_bits():
    model = make(schedules=SCHEDULES, drop_path_rate=0.5)
    expected = step(model)
    first, second = swap.apply(model), swap.apply(model)
    assert first.swapped == second.swapped
    second.revert()
    found = step(model)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][name], grad) for name, grad in expected[1].items())
