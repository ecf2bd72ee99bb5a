"""Small models of diffusers with random weights, inputs for them, and a check of their results after a swap."""

import copy

import diffusers
import torch

from tests.helpers.rounding import assert_as_near
from var_kernels import swap

TOKENS, TEXT = 16, 5
UNITS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def _randn(*shape):
    return torch.randn(*shape)


def _image():
    return _randn(2, 4, 8, 8)


def _dit(**options):
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10, norm_type="ada_norm_zero", **options,
    )  # fmt: skip
    return model, {
        "hidden_states": _image(), "timestep": torch.tensor([3, 400]), "class_labels": torch.tensor([1, 7]),
    }  # fmt: skip


def _pixart(**options):
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        patch_size=2, cross_attention_dim=24, caption_channels=16, use_additional_conditions=False, **options,
    )  # fmt: skip
    return model, {
        "hidden_states": _image(), "timestep": torch.tensor([3, 400]), "encoder_hidden_states": _randn(2, TEXT, 16),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip


def _sd3(**options):
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=12,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=24, pooled_projection_dim=16,
        pos_embed_max_size=8, **options,
    )  # fmt: skip
    return model, {
        "hidden_states": _image(), "timestep": torch.tensor([3.0, 400.0]), "pooled_projections": _randn(2, 16),
        "encoder_hidden_states": _randn(2, TEXT, 16),
    }  # fmt: skip


def _flux(**options):
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), **options,
    )  # fmt: skip
    return model, {
        "hidden_states": _randn(2, TOKENS, 4), "timestep": torch.tensor([0.1, 0.8]),
        "pooled_projections": _randn(2, 16), "encoder_hidden_states": _randn(2, TEXT, 16),
        "img_ids": torch.arange(TOKENS * 3).reshape(TOKENS, 3) % 4, "txt_ids": torch.zeros(TEXT, 3),
    }  # fmt: skip


def _sana(**options):
    model = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=12,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=16,
        sample_size=8, **options,
    )  # fmt: skip
    return model, {
        "hidden_states": _image(), "timestep": torch.tensor([3, 400]), "encoder_hidden_states": _randn(2, TEXT, 16),
    }  # fmt: skip


MODELS = {
    "dit": _dit,
    "pixart": _pixart,
    "sd3": _sd3,
    "sd3.5": lambda **options: _sd3(dual_attention_layers=(0,), qk_norm="rms_norm", **options),
    "flux": _flux,
    "sana": _sana,
}


def make(name, **options):
    """(model, inputs) of this name, the same for the same arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = MODELS[name](**options)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.3)
    return model.train(), inputs


def _floats(inputs, function):
    """The inputs, after a function of those that are floats."""
    return {
        key: function(value) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }


def converted(inputs, dtype):
    """The inputs, those of floats in another dtype."""
    return _floats(inputs, lambda value: value.to(dtype))


def tensors_in(value):
    """The tensors of a result, which may be a tuple."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in value if part is not None for tensor in tensors_in(part)]


def step(module, inputs, autocast=False):
    """Outputs in one dimension, and gradients of parameters and inputs, with the random numbers of one seed."""
    leaves = _floats(inputs, lambda value: value.detach().clone().requires_grad_(True))
    module.zero_grad()
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = tensors_in(module(**leaves, **({"return_dict": False} if hasattr(module, "config") else {})))
    out = torch.cat([output.flatten() for output in outputs])
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype)  # not a sum, which would hide swapped rows
    (out * weights).sum().backward()
    named = {**dict(module.named_parameters()), **{k: v for k, v in leaves.items() if isinstance(v, torch.Tensor)}}
    return out.detach(), {key: tensor.grad.clone() for key, tensor in named.items() if tensor.grad is not None}


def exact_step(module, inputs):
    return step(copy.deepcopy(module).double(), converted(inputs, torch.float64))


def check(module, inputs, dtype=torch.float32, autocast=False):
    """Swapped results are as near to exact ones as those before the swap, and reverting gives the latter back."""
    module, inputs = copy.deepcopy(module).to(dtype), converted(inputs, dtype)
    exact, plain = exact_step(module, inputs), step(module, inputs, autocast)
    with swap.applied(module) as report:
        found = step(module, inputs, autocast)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            torch.manual_seed(5)
            options = {"return_dict": False} if hasattr(module, "config") else {}
            inferred = torch.cat([tensor.flatten() for tensor in tensors_in(module(**inputs, **options))])
        assert not report.left_to_the_original
    assert found[0].dtype == plain[0].dtype
    unit = UNITS[torch.bfloat16 if autocast else dtype]
    assert_as_near(found, plain, exact, unit)
    assert_as_near((inferred, found[1]), plain, exact, unit)
    again = step(module, inputs, autocast)
    assert torch.equal(again[0], plain[0])
    assert all(torch.equal(again[1][key], grad) for key, grad in plain[1].items())
