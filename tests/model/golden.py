"""Reference vectors, recorded once from the official model in fp32 on a CPU (tests/data), and checks against them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.helpers.weights_recipe import fill
from var import VAR, VQVAE, VARConfig, VQVAEConfig, generate

DATA = Path(__file__).parents[1] / "data"
IMAGE_ATOL = 2e-4  # images, logits and reconstructions: absolute, in fp32
# more_smooth feeds every scale the softmax of (2 x guided logits + noise) / 0.0135. An error of 1e-5 in a logit, which
# is its rounding in fp32, changes the weights by 1.5e-3 of their size. The recorded image is in fp32 too and 1.6e-4
# away from the same computation in fp64; another order of the same sums (AVX2) was 7e-4 away from it.
SMOOTH_ATOL = IMAGE_ATOL + 2 / 0.0135 * 1e-5


class Golden:
    """One recorded configuration: its arrays, and the two networks with the weights of the recipe."""

    def __init__(self, name: str, backend: str) -> None:
        self.spec = json.loads((DATA / f"{name}.json").read_text())
        self.arrays = np.load(DATA / f"{name}.npz")
        spec = self.spec
        shared = {key: spec[key] for key in ("patch_nums", "vocab_size", "z_channels")}
        shared["patch_nums"] = tuple(shared["patch_nums"])
        self.vqvae = self.filled(VQVAE(VQVAEConfig(ch=spec["ch"], **shared), backend))
        flags = {key: spec[key] for key in ("depth", "num_classes", "shared_aln", "attn_l2_norm")}
        self.var = self.filled(VAR(VARConfig(**flags, **shared), backend))
        self.labels = torch.tensor(spec["labels"])

    def filled(self, model: torch.nn.Module) -> torch.nn.Module:
        seed = self.spec["seed"]
        state = {name: torch.from_numpy(fill(name, tuple(value.shape), seed))
                 for name, value in model.state_dict().items()}
        model.load_state_dict(state)
        return model

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self.arrays[key]))


def assert_near(actual: torch.Tensor, expected: torch.Tensor, atol: float = IMAGE_ATOL) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=atol)


def check_encode_and_reconstruct(golden: Golden) -> None:
    tokens = golden.vqvae.encode(golden["image"])
    assert torch.equal(tokens, golden["tokens"].long())
    assert_near(golden.vqvae.decode(tokens), golden["reconstruction"])
    assert_near(golden.vqvae.reconstruct(golden["image"]), golden["reconstruction"])
    means = torch.stack([image.double().mean() for image in golden.vqvae.decode_scales(tokens)])
    assert_near(means, golden["reconstruction_per_scale_mean"])
    assert_near(golden.vqvae.teacher_forcing_input(tokens), golden["teacher_forcing_input"])


def check_logits_loss_and_gradients(golden: Golden) -> None:
    golden.var.zero_grad()
    tokens = golden["tokens"].long()
    logits = golden.var(golden.labels, golden["teacher_forcing_input"])
    assert_near(logits.detach(), golden["logits"])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    assert abs(loss.item() - float(golden["loss"])) < 1e-5
    loss.backward()
    checked = 0
    for name, parameter in golden.var.named_parameters():
        expected = float(golden[f"gradnorm/{name}"])
        assert parameter.grad.norm().item() == pytest.approx(expected, rel=1e-3), name
        checked += 1
    assert checked == sum(key.startswith("gradnorm/") for key in golden.arrays)
    for name, crop in (("pos_1LC", 16), ("word_embed.weight", 64), ("head.weight", 64)):
        expected = golden[f"grad/{name}"]
        actual = golden.var.get_parameter(name).grad[..., :crop]
        assert_near(actual, expected, atol=1e-3 * expected.abs().max().item())


def check_generate(golden: Golden, mode: str) -> None:
    result = generate(golden.var, golden.vqvae, golden.labels, **golden.spec["generate"][mode])
    assert torch.equal(result.tokens, golden[f"generate/{mode}/tokens"].long())
    atol = SMOOTH_ATOL if mode == "smooth" else IMAGE_ATOL
    assert_near((result.images + 1) / 2, golden[f"generate/{mode}/image"], atol)


def check_tokenizer_training_forward(golden: Golden) -> None:
    golden.vqvae.zero_grad()
    image = golden["image"]
    output = golden.vqvae(image)
    assert torch.equal(output.tokens, golden["tokens"].long())
    assert_near(output.reconstruction.detach(), golden["vae_forward/reconstruction"])
    assert output.vq_loss.item() == pytest.approx(float(golden["vae_forward/vq_loss"]), rel=1e-5)
    loss = F.mse_loss(output.reconstruction, image) + output.vq_loss
    assert loss.item() == pytest.approx(float(golden["vae_forward/loss_mse_plus_vq"]), rel=1e-5)
    loss.backward()
    expected = golden["vae_forward/grad/codebook"]
    assert_near(golden.vqvae.quantize.embedding.weight.grad, expected, atol=1e-3 * expected.abs().max().item())
    norms = [key for key in golden.arrays if key.startswith("vae_forward/gradnorm/")]
    assert norms
    for key in norms:
        gradient = golden.vqvae.get_parameter(key.removeprefix("vae_forward/gradnorm/")).grad
        assert gradient.norm().item() == pytest.approx(float(golden[key]), rel=1e-3), key
