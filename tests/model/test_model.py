"""The networks: configuration, state-dict names of the released files, sampling options and bad input."""

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.models import PATCH_NUMS, tiny_var, tiny_vqvae
from var import PRESETS, VAR, VQVAE, ScaleSchedule, VARConfig, VQVAEConfig, edit, generate
from var.generation.editing import box_mask, kept_masks

SCHEMAS = json.loads((Path(__file__).parents[1] / "data" / "released_checkpoint_schemas.json").read_text())

DERIVED = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV")


def test_schedule():
    schedule = ScaleSchedule((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    assert schedule.length == 680 and schedule.num_scales == 10 and schedule.side == 16
    assert schedule.starts[:4] == (0, 1, 5, 14) and sum(schedule.lengths) == 680


@pytest.mark.parametrize("patch_nums", [(), (1, 0), (-1,)])
def test_schedule_refuses_bad_sides(patch_nums):
    with pytest.raises(ValueError, match="patch_nums"):
        ScaleSchedule(patch_nums)


@pytest.mark.parametrize(
    ("fields", "name"),
    [({"depth": 0}, "depth"), ({"heads": 3, "width": 64}, "heads"), ({"class_names": ("a",)}, "class_names")],
)
def test_var_config_refuses(fields, name):
    with pytest.raises(ValueError, match=name):
        VARConfig(**fields)


@pytest.mark.parametrize(("fields", "name"), [({"ch": 48}, "ch"), ({"vocab_size": 0}, "vocab_size")])
def test_vqvae_config_refuses(fields, name):
    with pytest.raises(ValueError, match=name):
        VQVAEConfig(**fields)


@pytest.mark.parametrize("config", [VARConfig(depth=2, class_names=("a", "b"), num_classes=2), VQVAEConfig()])
def test_config_survives_json(config):
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="nonsense"):
        type(config).from_dict({"nonsense": 1})


@pytest.mark.parametrize("name", SCHEMAS)
def test_state_dict_is_that_of_the_released_file(name):
    """Compares every name, shape and dtype of the released d16 … d36 and their tokenizer, on the meta device."""
    with torch.device("meta"):
        model = VQVAE(VQVAEConfig()) if name.startswith("vae") else VAR(PRESETS[name.removeprefix("var_")][1])
    ours = {key: [list(value.shape), str(value.dtype).removeprefix("torch.")]
            for key, value in model.state_dict().items()}
    released = {key: value for key, value in SCHEMAS[name].items() if not key.endswith(DERIVED)}
    assert ours == released


def test_generate_is_a_function_of_the_seed():
    var, vqvae, labels = tiny_var(), tiny_vqvae(), torch.tensor([0, 4, 2])
    first = generate(var, vqvae, labels, seed=3, top_k=5, top_p=0.9)
    again = var.generate(vqvae, labels, seed=3, top_k=5, top_p=0.9)
    other = generate(var, vqvae, labels, seed=4, top_k=5, top_p=0.9)
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.images, again.images)
    assert not torch.equal(first.tokens, other.tokens)
    assert first.tokens.shape == (3, 14) and first.images.shape == (3, 3, 6, 6)
    assert first.images.abs().max() <= 1
    torch.testing.assert_close(vqvae.decode(first.tokens), first.images, rtol=0, atol=1e-5)


def test_generate_reports_every_scale():
    seen, vqvae = [], tiny_vqvae()
    result = generate(
        tiny_var(), vqvae, torch.tensor([1]), seed=0, on_scale=lambda k, partial: seen.append((k, partial()))
    )
    assert [k for k, _ in seen] == [0, 1, 2]
    for (_, image), expected in zip(seen, vqvae.decode_scales(result.tokens), strict=True):
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)


def test_guidance_uses_the_unconditional_class():
    var, vqvae, labels = tiny_var(), tiny_vqvae(), torch.tensor([1, 2])
    plain = generate(var, vqvae, labels, seed=0, cfg=0.0)
    with torch.no_grad():
        var.class_emb.weight[-1] += 1.0
    assert torch.equal(plain.tokens, generate(var, vqvae, labels, seed=0, cfg=0.0).tokens)
    assert not torch.equal(plain.tokens, generate(var, vqvae, labels, seed=0, cfg=5.0).tokens)


def test_generate_under_bf16_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        result = generate(tiny_var(), tiny_vqvae(), torch.tensor([1, 2]), seed=0)
    assert result.images.isfinite().all() and result.tokens.shape == (2, 14)


@pytest.mark.parametrize("shared_aln", [False, True])
@pytest.mark.parametrize("attn_l2_norm", [False, True])
def test_training_step_reaches_every_parameter(shared_aln, attn_l2_norm):
    var, vqvae = tiny_var(shared_aln=shared_aln, attn_l2_norm=attn_l2_norm), tiny_vqvae()
    tokens = torch.randint(0, 24, (2, 14), generator=torch.Generator().manual_seed(0))
    logits = var(torch.tensor([0, 5]), vqvae.teacher_forcing_input(tokens))
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    for name, parameter in var.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_empty_batch_returns_empty():
    result = generate(tiny_var(), tiny_vqvae(), torch.empty(0, dtype=torch.long), seed=0)
    assert result.tokens.shape == (0, 14) and result.images.shape == (0, 3, 6, 6)


@pytest.mark.parametrize(
    ("options", "name"),
    [({"top_p": 1.5}, "top_p"), ({"top_p": -0.1}, "top_p"), ({"top_p": float("nan")}, "top_p"),
     ({"top_k": -1}, "top_k"), ({"cfg": -1.0}, "cfg"), ({"cfg": float("nan")}, "cfg"), ({"cfg": float("inf")}, "cfg")],
)
def test_generate_refuses_bad_options(options, name):
    with pytest.raises(ValueError, match=name):
        generate(tiny_var(), tiny_vqvae(), torch.tensor([0]), **options)


@pytest.mark.parametrize(
    "labels", [torch.tensor([6]), torch.tensor([-1]), torch.tensor([[0]]), torch.tensor([0.5]), torch.tensor([True])]
)
def test_bad_labels_are_refused(labels):
    transformer = tiny_var()
    with pytest.raises((TypeError, ValueError), match="labels"):
        generate(transformer, tiny_vqvae(), labels, seed=0)
    with pytest.raises(ValueError, match="labels"):
        transformer(labels, torch.zeros(1, 13, 8))


def test_generate_refuses_a_tokenizer_of_another_schedule():
    with pytest.raises(ValueError, match="patch_nums"):
        generate(tiny_var(), tiny_vqvae(patch_nums=(1, 3)), torch.tensor([0]))


def test_vqvae_refuses_wrong_images_and_tokens():
    vqvae = tiny_vqvae()
    with pytest.raises(ValueError, match="images"):
        vqvae.encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="images"):
        vqvae(torch.zeros(3, 6, 6))
    with pytest.raises(ValueError, match="tokens"):
        vqvae.decode(torch.zeros(1, 13, dtype=torch.long))
    with pytest.raises(ValueError, match="tokens"):
        vqvae.decode(torch.full((1, 14), 24))


def test_var_refuses_wrong_teacher_forcing_input():
    with pytest.raises(ValueError, match="teacher_forcing_input"):
        tiny_var()(torch.tensor([0]), torch.zeros(1, 12, 8))


def test_edit_keeps_given_tokens():
    """If all tokens are kept, the edit gives the reconstruction, whatever is sampled."""
    var, vqvae = tiny_var(), tiny_vqvae()
    images = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    result = edit(var, vqvae, images, torch.ones(3, 3), seed=0)
    torch.testing.assert_close(result.images, vqvae.reconstruct(images), rtol=0, atol=1e-5)
    masks = kept_masks(var.config.schedule, torch.zeros(3, 3))
    assert masks[0].all() and not masks[1].any() and not masks[2].any()


def test_edit_refuses_bad_masks():
    schedule = ScaleSchedule(PATCH_NUMS)
    with pytest.raises(ValueError, match="box"):
        box_mask(schedule, (0.5, 0, 0.4, 1), inside=True)
    with pytest.raises(ValueError, match="mask"):
        kept_masks(schedule, torch.zeros(2, 2))
