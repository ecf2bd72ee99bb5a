"""Trainings on folders of images: replaced and broken files, small sets, the order of classes."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.training import VAR_CONFIG, tokenizer_options, transformer_options, write_image_folder
from var.data import ImageFolder
from var.data.datasets import DataError, batch_indices, split_indices
from var.model.vqvae import VQVAE
from var.training.options import TrainingError, TrainingOptions
from var.training.progress import read_log
from var.training.tokenizer import train_tokenizer
from var.training.trainer import Trainer
from var.training.transformer import cached_tokens, load_tokenizer, train_transformer


def losses(output):
    """The losses of the log by step."""
    return {record["step"]: record["mse"] for record in read_log(output / "log.jsonl") if "mse" in record}


def validations(output):
    """The PSNR of the log by step."""
    return {record["step"]: record["val_psnr"] for record in read_log(output / "log.jsonl") if "val_psnr" in record}


def repaint(folder, seed=1):
    """Replaces the images of a folder, under the same names and in the same sizes."""
    rng = np.random.default_rng(seed)
    for path in sorted(folder.rglob("*.png")):
        with Image.open(path) as image:
            size = image.size
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)


@pytest.fixture(autouse=True)
def one_thread(restore_threads):
    """These models are too small for threads, which cost much on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path):
    write_image_folder(tmp_path / "images", {"a": 6, "b": 6}, size=(40, 48))
    return tmp_path / "images"


# ------------------------------------------------------------------------------------------------------- stale tokens


def test_tokens_of_replaced_images_are_computed_again(tmp_path, folder, tokenizer):
    options, vqvae = transformer_options(tmp_path / "run", folder, tokenizer), load_tokenizer(tokenizer, "reference")
    options.output.mkdir()
    data = ImageFolder(folder, 32)
    before = cached_tokens(vqvae, data, options)
    repaint(folder)
    expected = vqvae.encode(ImageFolder(folder, 32).batch(torch.arange(12))[0]).numpy()
    assert not np.array_equal(before[0], expected)
    for again in (ImageFolder(folder, 32), data):
        assert np.array_equal(cached_tokens(vqvae, again, options)[0], expected)


def test_tokens_of_a_tokenizer_with_equal_weights_but_other_settings_are_computed_again(tmp_path, folder, tokenizer):
    options, vqvae = transformer_options(tmp_path, folder, tokenizer), load_tokenizer(tokenizer, "reference")
    config = dataclasses.replace(vqvae.config, phi_ratio=1.0, using_znorm=True)
    other = VQVAE(config, "reference")
    other.load_state_dict(vqvae.state_dict())
    data = ImageFolder(folder, 32)
    assert not np.array_equal(cached_tokens(vqvae, data, options), cached_tokens(other, data, options))


def test_crops_do_not_depend_on_how_many_images_are_tokenized_at_a_time(tmp_path, folder, tokenizer):
    vqvae, data = load_tokenizer(tokenizer, "reference"), ImageFolder(folder, 32, random_crop=True, flip=True)
    tokens = []
    for encode_batch in (12, 5, 1):
        output = tmp_path / str(encode_batch)
        output.mkdir()
        options = transformer_options(output, folder, tokenizer, random_crop=True, flip=True, views=2,
                                      encode_batch=encode_batch)  # fmt: skip
        tokens.append(cached_tokens(vqvae, data, options))
    # Only ties between nearly equidistant codes may differ, by the rounding of other batch sizes.
    assert all((other == tokens[0]).mean() > 0.98 for other in tokens[1:])


def test_a_resumed_run_says_that_images_were_replaced(tmp_path, folder, tokenizer, capsys):
    model = dataclasses.replace(VAR_CONFIG, num_classes=2)
    runs = (
        (train_tokenizer, tokenizer_options(tmp_path / "t", folder, max_steps=2)),
        (train_transformer, transformer_options(tmp_path / "v", folder, tokenizer, max_steps=2, model=model)),
    )
    for train, options in runs:
        train(options)
        train(dataclasses.replace(options, resume=True))
        assert "not the images of the checkpoint" not in capsys.readouterr().err
    repaint(folder)
    for train, options in runs:
        train(dataclasses.replace(options, resume=True))
        assert "not the images of the checkpoint" in " ".join(capsys.readouterr().err.split())
    assert len(list((tmp_path / "v").glob("tokens-*.npy"))) == 2


def test_a_resumed_run_refuses_classes_in_another_order(tmp_path, folder):
    options = tokenizer_options(tmp_path / "run", folder, max_steps=2)
    train_tokenizer(options)
    (folder / "a").rename(folder / "c")
    with pytest.raises(TrainingError, match="classes differ from .*: class 0 was 'a', now 'b'"):
        train_tokenizer(dataclasses.replace(options, resume=True))


def test_a_checkpoint_of_an_older_version_can_be_resumed(tmp_path, folder):
    options = tokenizer_options(tmp_path / "run", folder, max_steps=2)
    path = train_tokenizer(options).checkpoint
    state = torch.load(path, weights_only=True)
    del state["data"], state["options"]["skip_broken"]
    torch.save(state, path)
    assert train_tokenizer(dataclasses.replace(options, resume=True)).reason == "finished"


# ----------------------------------------------------------------------------------------------------- broken images


def truncate_the_image_of_step(folder, step, count=12, val_images=4, batch_size=2):
    """Truncates the first image of a batch, which no earlier batch has."""
    pool = split_indices(count, val_images)[0]
    batches = [batch_indices(pool, batch_size, 0, earlier) for earlier in range(step + 1)]
    (index, *_) = [i for i in batches[-1].tolist() if i not in torch.cat(batches[:-1]).tolist()]
    path = ImageFolder(folder, 32).paths[index]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


# The codebook begins with the images of the first batch, so that a later one is read only when it is used.
EARLY = {"init_images": 2, "batch_size": 2, "restart_every": 3}


def test_a_truncated_image_in_the_middle_leaves_a_checkpoint(tmp_path, folder):
    path = truncate_the_image_of_step(folder, 3)
    options = tokenizer_options(tmp_path / "run", folder, **EARLY)
    message = "not a readable image: .*; stopped at step 3; checkpoint .*checkpoint.pt: put the file right and resume"
    with pytest.raises(DataError, match=message) as caught:
        train_tokenizer(options)
    assert str(path) in str(caught.value)
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 3
    # Nothing new: the checkpoint stays, and the message is that of the file.
    with pytest.raises(DataError, match="not a readable image") as caught:
        train_tokenizer(dataclasses.replace(options, resume=True))
    assert "stopped at step" not in str(caught.value)


def test_a_broken_image_at_the_start_leaves_no_checkpoint(tmp_path, folder):
    truncate_the_image_of_step(folder, 3)
    with pytest.raises(DataError, match="not a readable image"):
        train_tokenizer(tokenizer_options(tmp_path / "run", folder, **EARLY | {"init_images": 256}))
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_run_resumed_with_skipping_equals_one_that_always_skips(tmp_path, folder, capsys):
    path = truncate_the_image_of_step(folder, 3)
    whole = tokenizer_options(tmp_path / "whole", folder, skip_broken=True, **EARLY)
    train_tokenizer(whole)
    printed = " ".join(capsys.readouterr().err.split())
    assert f"1 broken of 12 images, in whose places the next images of their classes are used: {path}" in printed
    halves = tokenizer_options(tmp_path / "halves", folder, **EARLY)
    with pytest.raises(DataError):
        train_tokenizer(halves)
    capsys.readouterr()
    train_tokenizer(dataclasses.replace(halves, resume=True, skip_broken=True))
    assert "skip_broken True (so far False)" in " ".join(capsys.readouterr().err.split())
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 8


def test_a_truncated_image_among_those_held_out_leaves_a_checkpoint(tmp_path, folder):
    path = ImageFolder(folder, 32).paths[int(split_indices(12, 4)[1][0])]
    path.write_bytes(path.read_bytes()[:-800])
    for val_every, step in ((4, 4), (0, 8)):
        whole = tokenizer_options(tmp_path / f"whole{step}", folder, skip_broken=True, val_every=val_every, **EARLY)
        train_tokenizer(whole)
        options = tokenizer_options(tmp_path / f"halves{step}", folder, val_every=val_every, **EARLY)
        with pytest.raises(DataError, match=f"stopped at step {step}"):
            train_tokenizer(options)
        result = train_tokenizer(dataclasses.replace(options, resume=True, skip_broken=True))
        assert result.reason == "finished" and "val_psnr" in result.validation
        assert losses(options.output) == losses(whole.output)
        # The resumed run makes up for the validation that failed.
        assert validations(options.output) == validations(whole.output) and step in validations(whole.output)


def test_tokens_of_a_folder_with_a_broken_image(tmp_path, folder, tokenizer):
    path = truncate_the_image_of_step(folder, 1)
    options = transformer_options(tmp_path / "run", folder, tokenizer, max_steps=2,
                                  model=dataclasses.replace(VAR_CONFIG, num_classes=2))  # fmt: skip
    with pytest.raises(DataError, match="not a readable image") as caught:
        train_transformer(options)
    assert str(path) in str(caught.value)
    assert train_transformer(dataclasses.replace(options, skip_broken=True)).reason == "finished"


def test_a_checkpoint_that_cannot_be_written_does_not_hide_the_broken_image(tmp_path, folder, monkeypatch):
    path = truncate_the_image_of_step(folder, 3)

    def full(self):
        raise TrainingError("could not write checkpoint.pt: No space left on device")

    monkeypatch.setattr(Trainer, "save", full)
    with pytest.raises(DataError, match="stopped at step 3; could not write checkpoint.pt: No space left") as caught:
        train_tokenizer(tokenizer_options(tmp_path / "run", folder, **EARLY))
    assert str(path) in str(caught.value)


# -------------------------------------------------------------------------------------------------------- small sets


@pytest.mark.parametrize(
    ("images", "given", "expected"),
    [
        (60_000, {}, (2000, 64)), (300, {}, (30, 64)), (20, {}, (2, 18)), (5, {}, (0, 5)), (1, {}, (0, 1)),
        (300, {"val_images": 290}, (290, 10)), (300, {"batch_size": 8}, (30, 8)), (70, {"val_images": 0}, (0, 64)),
    ],
)  # fmt: skip
def test_defaults_fit_the_data(tmp_path, images, given, expected):
    options = TrainingOptions(output=tmp_path, **given).fitted(images)
    assert (options.val_images, options.batch_size) == expected


def test_what_the_data_do_not_allow_is_named_as_it_was_given(tmp_path, folder):
    for changes, message in (
        ({"val_images": 12}, r"val_images: expected 0..11 of 12 images, got 12"),
        ({"val_images": 2, "batch_size": 11}, r"batch_size: expected 1..10 .the number of training images., got 11"),
        ({"val_images": -1}, "val_images: expected zero or more, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            train_tokenizer(tokenizer_options(tmp_path / "run", folder, **changes))


@pytest.mark.parametrize("images", [1, 2, 12])
def test_a_few_images_train_with_default_options(tmp_path, tokenizer, images):
    write_image_folder(tmp_path / "images", {"a": images})
    defaults = {"val_images": None, "batch_size": None, "max_steps": 2}
    result = train_tokenizer(tokenizer_options(tmp_path / "t", tmp_path / "images", **defaults))
    assert result.reason == "finished" and ("val_psnr" in result.validation) == (images >= 10)
    model = dataclasses.replace(VAR_CONFIG, num_classes=1)
    options = transformer_options(tmp_path / "v", tmp_path / "images", tokenizer, model=model, **defaults)
    assert train_transformer(options).reason == "finished"
    assert train_transformer(dataclasses.replace(options, resume=True)).reason == "finished"
