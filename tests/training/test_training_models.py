"""What only one of the two trainings does: care of the codebook, cached tokens, label dropout, the losses."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import var
from tests.helpers.training import (
    VAR_CONFIG,
    VQVAE_CONFIG,
    tokenizer_options,
    transformer_options,
    write_image_folder,
)
from var.data.datasets import batch_indices, split_indices
from var.model import checkpoints
from var.model.config import VARConfig
from var.model.transformer import VAR
from var.model.vqvae import VQVAE
from var.training.progress import read_log
from var.training.tokenizer import CodebookCare, train_tokenizer
from var.training.trainer import Trainer, TrainingError
from var.training.transformer import cached_tokens, load_tokenizer, train_transformer

# --------------------------------------------------------------------------------------------------------- tokenizer


def test_tokenizer_learns(tmp_path, data):
    train_tokenizer(tokenizer_options(tmp_path, data, max_steps=30))
    curve = [record["mse"] for record in read_log(tmp_path / "log.jsonl") if "mse" in record]
    assert np.mean(curve[-5:]) < 0.5 * np.mean(curve[:3])


def make_care(tmp_path):
    torch.manual_seed(0)
    vqvae = VQVAE(VQVAE_CONFIG, "reference")
    options = tokenizer_options(tmp_path / "care", tmp_path)
    hits = torch.zeros(VQVAE_CONFIG.vocab_size)
    return CodebookCare(vqvae, Trainer(vqvae, options, title="t", config={}, tokens_per_image=69), hits)


def test_queries_are_what_the_quantizer_looks_up(tmp_path):
    care = make_care(tmp_path)
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    care.initialise(images, torch.Generator().manual_seed(0))
    queries, tokens = care._queries(images)
    assert queries.shape == (3 * 69, 8)
    nearest = torch.cdist(queries, care.codebook.detach()).argmin(1)
    # Only ties between two nearly equidistant codes may differ, by rounding of the residual.
    assert (nearest == tokens).float().mean() > 0.98
    assert torch.equal(tokens.view(3, 69), care.vqvae.encode(images))


def test_initialisation_uses_the_whole_codebook(tmp_path):
    care = make_care(tmp_path)
    images = torch.rand(8, 3, 32, 32) * 2 - 1
    before = len(care.vqvae.encode(images).unique())
    care.initialise(images, torch.Generator().manual_seed(0))
    after = len(care.vqvae.encode(images).unique())
    assert after > before and after >= 0.8 * VQVAE_CONFIG.vocab_size
    assert torch.equal(care.averaged_codebook, care.codebook)


def test_dead_codes_move_to_where_the_error_is(tmp_path):
    care = make_care(tmp_path)
    images = torch.rand(8, 3, 32, 32) * 2 - 1
    care.initialise(images, torch.Generator().manual_seed(0))
    with torch.no_grad():
        care.codebook[5:9] = 100.0  # never nearest
    for parameter in care.trainer.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    care.trainer.optimizer.step()
    tokens = care.vqvae.encode(images)
    for _ in range(200):
        care.count(tokens)
    dead = care.hits < care.trainer.options.restart_threshold
    assert dead[5:9].all() and not dead.all()
    untouched = care.codebook.detach()[~dead].clone()
    assert care.revive(images, torch.Generator().manual_seed(1)) == int(dead.sum())
    assert torch.equal(care.codebook[~dead], untouched)
    assert (care.codebook[dead].abs() < 50).all()
    assert (care.hits[dead] == 1).all()
    assert torch.equal(care.averaged_codebook[dead], care.codebook[dead])
    moments = care.trainer.optimizer.state[care.codebook]
    assert (moments["exp_avg"][dead] == 0).all() and (moments["exp_avg"][~dead] != 0).all()
    assert care.revive(images, torch.Generator()) == 0


def test_hits_are_relative_to_the_mean(tmp_path):
    care = make_care(tmp_path)
    tokens = torch.arange(24).repeat(4, 3)
    for _ in range(600):
        care.count(tokens)
    torch.testing.assert_close(care.hits, torch.ones(24), atol=1e-3, rtol=0)


# ------------------------------------------------------------------------------------------------------- transformer


def test_tokens_are_computed_once_and_belong_to_their_tokenizer(tmp_path, data, tokenizer, monkeypatch):
    options = transformer_options(tmp_path, data, tokenizer)
    images = var.data.open_dataset(data)
    vqvae = load_tokenizer(tokenizer, "reference").eval()
    tokens = cached_tokens(vqvae, images, options)
    assert tokens.shape == (1, 40, 69) and tokens.dtype == np.uint16
    expected = vqvae.encode(images.batch(torch.arange(40))[0])
    assert (torch.from_numpy(tokens[0].astype(np.int64)) == expected).float().mean() > 0.99
    (path,) = tmp_path.glob("tokens-*.npy")
    with monkeypatch.context() as patch:
        patch.setattr(VQVAE, "encode", lambda *args: pytest.fail("the images were tokenized again"))
        assert np.array_equal(cached_tokens(vqvae, images, options), tokens)
    path.write_bytes(path.read_bytes()[:200])  # a broken cache is computed again
    assert np.array_equal(cached_tokens(vqvae, images, options), tokens)
    with torch.no_grad():
        vqvae.quantize.embedding.weight.add_(0.01)
    cached_tokens(vqvae, images, options)
    assert len(list(tmp_path.glob("tokens-*.npy"))) == 2


def test_views_of_a_folder_differ_by_augmentation(tmp_path, tokenizer):
    write_image_folder(tmp_path / "images", {"a": 3, "b": 3}, size=(48, 40))
    options = transformer_options(tmp_path, tmp_path / "images", tokenizer, views=2, flip=True, random_crop=True)
    images = var.data.open_dataset(options.data, random_crop=True, flip=True)
    tokens = cached_tokens(load_tokenizer(tokenizer, "reference"), images, options)
    assert tokens.shape == (2, 6, 69) and not np.array_equal(tokens[0], tokens[1])


def test_mismatched_configurations_are_refused(tmp_path, data, tokenizer):
    for changes, message in (
        ({"vocab_size": 25}, r"vocab_size: expected 24 \(the tokenizer's\), got 25"),
        ({"patch_nums": (1, 3, 8)}, r"patch_nums: expected \(1, 2, 8\)"),
        ({"num_classes": 3}, r"num_classes: expected 10 \(the classes of fashion-mnist\), got 3"),
    ):
        model = VARConfig(**{**VAR_CONFIG.to_dict(), **changes})
        with pytest.raises(TrainingError, match=message):
            train_transformer(transformer_options(tmp_path, data, tokenizer, model=model))
    with pytest.raises(FileNotFoundError):
        train_transformer(transformer_options(tmp_path, data, tmp_path / "no-tokenizer"))
    checkpoints.save(tmp_path / "var.safetensors", VAR(VAR_CONFIG, "reference"))
    with pytest.raises(TrainingError, match="expected the weights of a VQVAE"):
        train_transformer(transformer_options(tmp_path, data, tmp_path / "var.safetensors"))


def test_labels_are_dropped_at_the_asked_rate(tmp_path, data, tokenizer, monkeypatch):
    seen = []
    forward = VAR.forward

    def recording(self, labels, features):
        if self.training:
            seen.append(labels.clone())
        return forward(self, labels, features)

    monkeypatch.setattr(VAR, "forward", recording)
    train_transformer(
        transformer_options(tmp_path / "half", data, tokenizer, label_dropout=0.5, max_steps=12, batch_size=32)
    )
    assert 0.4 < float((torch.cat(seen) == 10).float().mean()) < 0.6
    seen.clear()
    train_transformer(transformer_options(tmp_path / "none", data, tokenizer, label_dropout=0.0))
    assert int(torch.cat(seen).max()) < 10


def test_transformer_learns_the_class(tmp_path, data, tokenizer):
    options = transformer_options(tmp_path, data, tokenizer, max_steps=40, batch_size=8, lr=5e-3, label_dropout=0.0)
    train_transformer(options)
    records = [record for record in read_log(tmp_path / "log.jsonl") if "loss" in record]
    assert records[0]["loss"] == pytest.approx(math.log(24), abs=0.1)  # the small head starts at the uniform guess
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    assert set(records[0]) >= {"step", "lr", "grad_norm", "last_scale_accuracy", "images/s", "tokens/s", "seconds"}


def test_logged_loss_is_the_cross_entropy(tmp_path, data, tokenizer):
    options = transformer_options(tmp_path, data, tokenizer, max_steps=1, label_dropout=0.0, ema_decay=0.0, lr=1e-12,
                                  min_lr=0.0, warmup_steps=0)  # fmt: skip
    train_transformer(options)
    pipeline = var.load(path=tmp_path, backend="reference")  # one step at no learning rate: the initial weights
    images = var.data.open_dataset(data)
    indices = batch_indices(split_indices(40, 4)[0], 4, seed=0, step=0)
    pixels, labels = images.batch(indices)
    tokens = pipeline.vqvae.encode(pixels)
    logits = pipeline.var(labels, pipeline.vqvae.teacher_forcing_input(tokens))
    expected = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    assert read_log(tmp_path / "log.jsonl")[0]["loss"] == pytest.approx(float(expected.detach()), rel=1e-4)
