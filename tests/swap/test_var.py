"""Tests swapping VAR's classes: same logits, losses, gradients, tokens and random numbers as before the swap."""

import copy
import pickle

import pytest
import torch

from tests.helpers.caches import assert_going_back_overwrites_nothing
from tests.helpers.foreign_var import make
from tests.helpers.rounding import assert_as_near
from var_kernels import swap

LABELS = torch.tensor([1, 4, 7])


def inputs_of(model, seed=0):
    """Tokens by scale and teacher-forcing inputs of random maps."""
    quantizer = model.vae_quant_proxy[0]
    side = quantizer.v_patch_nums[-1]
    f = torch.randn(3, quantizer.Cvae, side, side, generator=torch.Generator().manual_seed(seed))
    return f, quantizer.f_to_idxBl_or_fhat(f, to_fhat=False)


def step(model, x, autocast=False):
    """Logits and gradients of a training step, with the random numbers of one seed."""
    model.zero_grad()
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(LABELS, x)
    logits.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


def step_in_fp64(model, x):
    """A training step of a copy in float64, with the same random numbers."""
    return step(copy.deepcopy(model).double(), x.double())


OPTIONS = {
    "per-block": {},
    "shared": {"shared_aln": True},
    "no-norm": {"attn_l2_norm": False},
    "xformers": {"using_xform": True},
    "drop-path": {"drop_path": 0.5, "shared_aln": True},
}


@pytest.fixture(params=OPTIONS)
def model(request):
    return make(**OPTIONS[request.param])


def test_everything_is_swapped(model):
    report = swap.apply(model)
    assert not report.skipped
    assert sorted({entry.cls for entry in report.swapped}) == [
        "AdaLNBeforeHead", "AdaLNSelfAttn", "SelfAttention", "VAR", "VectorQuantizer2",
    ]  # fmt: skip


def test_training_step_in_fp32(model):
    _, tokens = inputs_of(model)
    x = model.vae_quant_proxy[0].idxBl_to_var_input(tokens)
    exact, plain = step_in_fp64(model, x), step(model, x)
    with swap.applied(model) as report:
        found = step(model, x)
        assert not report.left_to_the_original
    assert_as_near(found, plain, exact)


def test_training_step_under_autocast_is_as_near_to_fp32_as_before(model):
    _, tokens = inputs_of(model)
    x = model.vae_quant_proxy[0].idxBl_to_var_input(tokens)
    exact, plain = step(model, x), step(model, x, autocast=True)
    with swap.applied(model):
        ours = step(model, x, autocast=True)
    assert_as_near(ours, plain, exact, unit=2.0**-9)


@pytest.mark.parametrize("scale", range(5))
def test_progressive_training(scale):
    model = make()
    quantizer = model.vae_quant_proxy[0]
    model.prog_si = quantizer.prog_si = scale
    f, tokens = inputs_of(model)
    x = quantizer.idxBl_to_var_input(tokens)
    x = x if x is not None else torch.zeros(3, 0, 8)
    exact, plain = step_in_fp64(model, x), step(model, x)
    with swap.applied(model) as report:
        found_tokens = quantizer.f_to_idxBl_or_fhat(f, to_fhat=False)
        found_x = quantizer.idxBl_to_var_input(found_tokens)
        found = step(model, x if found_x is None else found_x)
        assert not report.left_to_the_original
    assert len(found_tokens) == scale + 1 and (found_x is None) == (scale == 0)
    assert_as_near(found, plain, exact)


@pytest.mark.parametrize("patch_nums", [(1, 2, 3, 4, 6), (1, 3, 8), (2, 3, 7)], ids=str)
def test_generation_draws_the_same_tokens(model, patch_nums):
    model = make(patch_nums, shared_aln=model.blocks[0].shared_aln, using_xform=model.blocks[0].attn.using_xform).eval()
    expected_tokens, expected_f = model.sample(LABELS)
    with swap.applied(model) as report:
        tokens, f_hat = model.sample(LABELS)
        assert not report.left_to_the_original
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(f_hat, expected_f, rtol=0, atol=1e-5)


def test_caches_have_the_layout_and_content_of_the_original(model):
    attention = model.blocks[0].attn.eval()
    x = torch.randn(2, 30, 32)
    parts = x.split([1, 4, 9, 16], dim=1)

    def caches(swapped_parts):
        attention.kv_caching(True)
        with torch.no_grad():
            for i, part in enumerate(parts):
                if i in swapped_parts:
                    with swap.applied(model):
                        out = attention(part, None)
                else:
                    out = attention(part, None)
        found = out, attention.cached_k, attention.cached_v
        attention.kv_caching(False)
        return found

    expected = caches(())
    for swapped_parts in ((0, 1, 2, 3), (1, 2), (0, 3)):  # a swap, or its end, in the middle of a sequence
        for found, right in zip(caches(swapped_parts), expected, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("using_xform", [False, True], ids=["heads-first", "tokens-first"])
@pytest.mark.parametrize("attn_l2_norm", [False, True], ids=["plain", "norm"])
def test_a_cache_to_which_somebody_goes_back_is_not_overwritten(using_xform, attn_l2_norm):
    attention = make(using_xform=using_xform, attn_l2_norm=attn_l2_norm).blocks[0].attn.eval()
    with swap.applied(attention), torch.no_grad():
        assert_going_back_overwrites_nothing(attention)


@pytest.mark.parametrize("attn_l2_norm", [False, True], ids=["plain", "norm"])
def test_a_cache_grows_under_another_dtype_and_outside_of_inference_mode(attn_l2_norm):
    attention = make(attn_l2_norm=attn_l2_norm).blocks[0].attn.eval()
    x = torch.randn(2, 4, 32)

    def run():
        attention.kv_caching(True)
        with torch.inference_mode():
            attention(x, None)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return attention(x, None), attention.cached_k, attention.cached_v

    expected = run()
    with swap.applied(attention):
        found = run()
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2.0**-6, atol=2.0**-6)


def test_a_cache_of_another_batch_is_refused_as_by_the_original():
    attention = make().blocks[0].attn.eval()
    with swap.applied(attention), torch.no_grad():
        attention.kv_caching(True)
        attention(torch.randn(2, 4, 32), None)
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            attention(torch.randn(1, 4, 32), None)


def test_drop_path_of_a_condition_that_samples_share_draws_one_number_for_each_sample():
    block = make(drop_path=0.5).blocks[0].train()
    x, condition = torch.randn(8, 5, 32), torch.randn(1, 32)

    def run():
        torch.manual_seed(3)
        return block(x, condition, None)

    expected = run()
    with swap.applied(block):
        torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("using_znorm", [False, True], ids=["l2", "cosine"])
def test_quantizer(using_znorm):
    model = make(using_znorm=using_znorm)
    quantizer = model.vae_quant_proxy[0].requires_grad_(True)
    f, tokens = inputs_of(model)

    def everything():
        quantizer.zero_grad()
        leaf = f.clone().requires_grad_(True)
        f_hat, _, loss = quantizer(leaf)
        (loss + f_hat.square().mean()).backward()
        gradients = [leaf.grad, *(p.grad.clone() for p in quantizer.parameters())]
        with torch.no_grad():
            maps = [
                quantizer.embedding(part).transpose(1, 2).reshape(3, 8, side, side)
                for part, side in zip(tokens, quantizer.v_patch_nums, strict=True)
            ]
            return [
                f_hat.detach(), loss.detach(), *gradients, quantizer.idxBl_to_var_input(tokens),
                *quantizer.f_to_idxBl_or_fhat(f, to_fhat=True), *quantizer.f_to_idxBl_or_fhat(f, to_fhat=False),
                *quantizer.f_to_idxBl_or_fhat(f, False, [(1, 2), (3, 5), (6, 6)]),
                *quantizer.embed_to_fhat(maps), quantizer.embed_to_fhat(maps, last_one=True),
                *quantizer.embed_to_fhat(maps, all_to_max_scale=False),
            ]  # fmt: skip

    expected = everything()
    with swap.applied(model) as report:
        found = everything()
        assert report.left_to_the_original == {
            ("vae_quant_proxy[0]", "f_hat at the size of each scale"): 1,
        }  # fmt: skip
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6)


def test_gradients_that_only_the_original_has_are_its_own():
    model = make()
    quantizer = model.vae_quant_proxy[0].requires_grad_(True)
    f, tokens = inputs_of(model)
    with swap.applied(model) as report:
        assert quantizer.idxBl_to_var_input(tokens).requires_grad
        assert quantizer.f_to_idxBl_or_fhat(f, to_fhat=True)[-1].requires_grad
        assert len(report.left_to_the_original) == 2


def test_no_mask_is_converted_for_each_step(monkeypatch):
    model = make()
    _, tokens = inputs_of(model)
    x = model.vae_quant_proxy[0].idxBl_to_var_input(tokens)
    seen = []
    with swap.applied(model):
        model.blocks[0].attn.register_forward_pre_hook(
            lambda module, args, kw: seen.append(kw["attn_bias"]), with_kwargs=True
        )
        step(model, x, autocast=True)
    assert [type(bias).__name__ for bias in seen] == ["BlockCausalBias"]
    assert isinstance(model.attn_bias_for_masking, torch.Tensor)  # outside of a step it is theirs


def test_dropout_of_attention_is_left_to_the_original():
    model = make(attn_drop=0.3)
    _, tokens = inputs_of(model)
    x = model.vae_quant_proxy[0].idxBl_to_var_input(tokens)
    expected = step(model, x)
    with swap.applied(model) as report:
        found = step(model, x)
        assert report.left_to_the_original == {(f"blocks.{i}.attn", "dropout of attention"): 1 for i in range(2)}
        model.eval()
        step(model, x)
        assert sum(report.left_to_the_original.values()) == 2
        assert "calls by its own code: dropout of attention" in str(report)
    # Only the AdaLN is ours, and the random numbers are the same.
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)


def test_a_mask_that_is_not_block_causal_is_obeyed():
    model = make().eval()
    attention = model.blocks[0].attn
    x = torch.randn(2, 5, 32)
    masks = {
        "a mask that is not block-causal": torch.zeros(1, 1, 5, 5).masked_fill(torch.eye(5).bool(), -torch.inf),
        "a mask with other values than 0 and -inf": torch.full((1, 1, 5, 5), -0.5),
        "differs by sample or head": torch.zeros(2, 1, 5, 5),
    }
    for reason, mask in masks.items():
        expected = attention(x, mask)
        with swap.applied(model) as report:
            assert torch.equal(attention(x, mask), expected)
            assert reason in str(report), reason


def test_a_mask_that_is_written_to_is_read_again():
    model = make().eval()
    attention = model.blocks[0].attn
    x, mask = torch.randn(2, 5, 32), torch.zeros(1, 1, 5, 5)
    with swap.applied(model):
        full = attention(x, mask)
        mask[:, :, :1, 1:] = -torch.inf
        found = attention(x, mask)
    assert not torch.equal(found, full)
    torch.testing.assert_close(found, attention(x, mask), rtol=1e-5, atol=1e-5)


def test_code_that_computes_something_else_is_skipped_by_name():
    class Rotated(type(make().blocks[0].attn)):
        def forward(self, x, attn_bias):
            return super().forward(x.roll(1, dims=1), attn_bias)

    model = make()
    model.blocks[0].attn.__class__ = Rotated
    report = swap.apply(model)
    reasons = {entry.path: entry.reason for entry in report.skipped}
    assert "uses forward, roll, super, which the known one does not" in reasons["blocks.0.attn"]
    assert reasons[""] == "the attention of its blocks is not swapped"


def test_code_that_leaves_a_part_out_is_skipped_by_name():
    class Unscaled(type(make().head_nm)):
        def forward(self, x_BLC, cond_BD):
            scale, shift = self.ada_lin(cond_BD).view(-1, 1, 2, self.C).unbind(2)
            return self.ln_wo_grad(x_BLC).mul(scale).add_(shift)

    model = make()
    model.head_nm.__class__ = Unscaled
    [skipped] = swap.apply(model).skipped
    assert skipped.path == "head_nm" and skipped.reason.startswith("its forward does not use add,")


def test_gates_and_shifts_in_another_order_are_skipped():
    class Other(type(make().blocks[0])):
        def forward(self, x, cond_BD, attn_bias):
            modulation = self.ada_gss + cond_BD if self.shared_aln else self.ada_lin(cond_BD).view(-1, 1, 6, self.C)
            shift1, shift2, gamma1, gamma2, scale1, scale2 = modulation.unbind(2)
            h = self.ln_wo_grad(x).mul(scale1.add(1)).add_(shift1)
            x = x + self.drop_path(self.attn(h, attn_bias=attn_bias).mul_(gamma1))
            h = self.ln_wo_grad(x).mul(scale2.add(1)).add_(shift2)
            return x + self.drop_path(self.ffn(h).mul(gamma2))

    model = make()
    model.blocks[1].__class__ = Other
    [skipped] = swap.apply(model).skipped
    assert skipped.path == "blocks.1" and "in another order" in skipped.reason


@pytest.mark.parametrize("inner", ["ln_wo_grad", "drop_path"])
def test_modules_with_hooks_that_would_not_be_called_keep_them(inner):
    model = make()
    getattr(model.blocks[0], inner).register_forward_hook(lambda *args: None)
    [skipped] = swap.apply(model).skipped
    assert skipped == ("blocks.0", "AdaLNSelfAttn", f"{inner} has hooks, which would not be called")


@pytest.mark.parametrize("path", ["blocks.0.ln_wo_grad", "blocks.0.drop_path", "head_nm.ln_wo_grad"])
def test_hooks_that_come_after_the_swap_fire(path):
    model, fired = make(drop_path=0.5), []
    x = torch.randn(3, 65, 8)
    expected = step(model, x)
    with swap.applied(model) as report:
        model.get_submodule(path).register_forward_hook(lambda *args: fired.append(path))
        found = step(model, x)
        assert fired and [*report.left_to_the_original] == [
            (path.rpartition(".")[0], f"{path.rpartition('.')[2]} has hooks, which would not be called")
        ]
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inner", ["embedding", "quant_resi.qresi_ls.1"])
def test_a_quantizer_of_which_a_module_has_hooks_keeps_its_code(inner):
    model = make()
    model.vae_quant_proxy[0].get_submodule(inner).register_forward_hook(lambda *args: None)
    [skipped] = swap.apply(model).skipped
    assert skipped[1:] == ("VectorQuantizer2", "quant_resi or embedding has hooks, which would not be called")


def test_copies_are_swapped_and_pickles_are_not():
    model = make()
    _, tokens = inputs_of(model)
    x = model.vae_quant_proxy[0].idxBl_to_var_input(tokens)
    before = set(model.state_dict())
    report = swap.apply(model)
    expected = step(model, x)
    twin = copy.deepcopy(model)
    assert twin.blocks[0].attn.forward.__self__ is twin.blocks[0].attn
    assert torch.equal(step(twin, x)[0], expected[0])
    loaded = pickle.loads(pickle.dumps(model))
    assert loaded.blocks[0].attn.forward.__func__ is type(loaded.blocks[0].attn).forward
    assert not swap.apply(loaded).skipped
    assert set(model.state_dict()) == before
    report.revert()
    assert "forward" not in vars(model.blocks[0].attn) and "forward" in vars(twin.blocks[0].attn)


def test_hooks_of_modules_fire():
    model = make().eval()
    fired = []
    for name, module in model.named_modules():
        if not name.endswith(("ln_wo_grad", "drop_path")):
            module.register_forward_hook(lambda *args, name=name: fired.append(name))

    def run():
        fired.clear()
        model(LABELS, torch.zeros(3, 65, 8))
        return list(fired)

    expected = run()
    with swap.applied(model):
        assert run() == expected


def test_twice_is_once():
    model = make()
    _, tokens = inputs_of(model)
    x = model.vae_quant_proxy[0].idxBl_to_var_input(tokens)
    expected = step(model, x)
    first, second = swap.apply(model), swap.apply(model)
    assert first.swapped == second.swapped
    torch.testing.assert_close(step(model, x)[0], expected[0], rtol=1e-4, atol=1e-4)
    second.revert()
    found = step(model, x)
    assert all(torch.equal(found[1][name], grad) for name, grad in expected[1].items())
