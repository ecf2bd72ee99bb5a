"""Tests `swap.apply` itself: options, reports, strictness, and models with nothing to swap."""

import pytest
import torch
from torch import nn

from tests.helpers.foreign_infinity import make as make_infinity
from tests.helpers.foreign_var import make
from var_kernels import swap
from var_kernels.swap.block_causal import BlockCausalBias, padded_schedule_of, schedule_of


def test_nothing_to_swap_is_a_word_and_not_an_error():
    with pytest.warns(UserWarning, match="nothing to swap"):
        report = swap.apply(nn.Linear(2, 2))
    assert "nothing to swap" in str(report)
    with pytest.raises(ValueError, match="(?s)module: expected .*nothing to swap"):
        swap.apply(nn.Linear(2, 2), strict=True)


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match="module: expected a torch.nn.Module, got dict"):
        swap.apply({})


@pytest.mark.parametrize("part", ["attention", "adaln", "quantizer"])
def test_parts_are_chosen(part):
    model = make()
    classes = {
        "attention": {"SelfAttention", "VAR"}, "adaln": {"AdaLNSelfAttn", "AdaLNBeforeHead"},
        "quantizer": {"VectorQuantizer2"},
    }  # fmt: skip
    report = swap.apply(model, **{other: other == part for other in classes})
    assert {entry.cls for entry in report.swapped} == classes[part]


def test_strict_changes_nothing_if_it_raises():
    model = make()
    first = swap.apply(model.blocks[0].ffn and model.blocks[1])
    model.blocks[0].ln_wo_grad.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="ln_wo_grad has hooks"):
        swap.apply(model, strict=True)
    assert "forward" not in vars(model) and "forward" not in vars(model.blocks[0].attn)
    assert all("forward" in vars(module) for _, module, _ in first._places)  # from before


def test_a_wrapper_that_answers_for_its_module_is_not_reported():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

        def forward(self, *args):
            return self.inner(*args)

    for make_one in (make, lambda: make_infinity(schedules=[[(1, 2, 2)]])):
        for wrapper in (Wrapper(make_one()), torch.compile(make_one())):
            report = swap.apply(wrapper, strict=True)
            assert all(entry.cls not in ("Wrapper", "OptimizedModule") for entry in report.swapped)


def test_report_groups_blocks():
    text = str(swap.apply(make(depth=12)))
    assert len(text.splitlines()) == 5
    assert "blocks.*.attn (12)" in text and "vae_quant_proxy[0]" in text


@pytest.mark.parametrize("lens", [[1], [3], [1, 4, 9], [2, 2, 2], [1, 1, 1, 1]], ids=str)
def test_schedule_of_a_mask(lens):
    level = torch.repeat_interleave(torch.arange(len(lens)), torch.tensor(lens))
    visible = level[:, None] >= level
    for mask in (visible, torch.where(visible, 0.0, -torch.inf), torch.where(visible, 0.0, torch.finfo().min)):
        assert schedule_of(mask, len(level)) == lens
        assert schedule_of(mask[None, None].expand(2, 3, -1, -1), len(level)) == lens
    if len(lens) > 1:  # the last scale is padding
        assert schedule_of(visible, len(level) - lens[-1]) == lens[:-1]


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("lens", [[1], [3], [1, 1], [1, 4, 9]], ids=str)
def test_schedule_of_a_mask_with_rows_that_see_only_key_0(lens, padding):
    length = sum(lens)
    level = torch.repeat_interleave(torch.arange(len(lens)), torch.tensor(lens))
    visible = nn.functional.pad(level[:, None] >= level, (0, padding, 0, padding))
    visible[length:, 0] = True
    mask = torch.where(visible, 0.0, -torch.inf)[None, None]
    assert padded_schedule_of(mask, length + padding) == (lens, padding)
    assert schedule_of(mask, length + padding) == ("a mask that is not block-causal" if padding else lens)


def test_a_mask_of_inference_mode_is_read():
    with torch.inference_mode():
        mask = torch.zeros(3, 3)
        assert schedule_of(mask, 3) == [3]
        mask[0, 1:] = -torch.inf  # it has no version that would tell
        assert schedule_of(mask, 3) == [1, 2]


def test_padding_that_earlier_tokens_see_is_no_padding():
    assert schedule_of(torch.ones(6, 6, dtype=torch.bool), 4) == "a mask that is not block-causal"


def test_the_stand_in_of_a_mask_is_cut_and_converted_like_it():
    mask = torch.zeros(1, 1, 5, 5)
    bias = BlockCausalBias([1, 4], mask)
    cut = bias[:, :, :1, :1].to(dtype=torch.bfloat16)
    assert isinstance(cut, BlockCausalBias) and cut.lens == [1]
    assert cut.tensor().dtype == torch.bfloat16 and cut.shape == (1, 1, 1, 1)
    assert bias[:, :, :3, :3].shape == (1, 1, 3, 3)  # not the end of a scale: the mask itself
    assert bias.shape == mask.shape


def test_a_method_that_was_wrapped_since_the_swap_keeps_its_wrapper():
    model = make()
    block = model.blocks[0]
    report = swap.apply(model)
    ours, calls = block.forward, []
    block.forward = lambda *args, **kwargs: calls.append(1) or ours(*args, **kwargs)  # as accelerate's hooks do
    with pytest.warns(UserWarning, match="wrapped since the swap, in blocks.0$"):
        report.revert()
    block(torch.zeros(1, 2, 32), torch.zeros(1, 32), None)
    assert calls and "forward" not in vars(model.blocks[1])
    block.forward = ours  # as accelerate removes them
    report.revert()
    assert "forward" not in vars(block)


def test_a_method_that_is_again_that_of_the_class_is_no_hook():
    model = make()
    norm = model.blocks[0].ln_wo_grad
    norm.forward = norm.forward
    assert not swap.apply(model).skipped
