"""The commands for training: their options, a whole small run, bad input, interruption."""

import dataclasses
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import var
from tests.helpers.cli import REFERENCE, invoke, refused, run, save_model
from tests.helpers.training import write_fashion_mnist, write_image_folder
from var.cli import training
from var.model import checkpoints
from var.training.tokenizer import TokenizerTraining
from var.training.transformer import TransformerTraining

ROOT = Path(__file__).parents[2]
TINY_TOKENIZER = (
    "--batch-size", 4, "--val-images", 4, "--warmup-steps", 1, "--init-images", 8, "--log-every", 1,
    "--vocab-size", 16, "--z-channels", 4, "--ch-mult", "1,1", "--patch-nums", "1 2 4",
)  # fmt: skip


@pytest.mark.parametrize(
    ("command", "options", "sizes", "own"),
    [
        (training.train_tokenizer, TokenizerTraining, var.VQVAEConfig, set()),
        # These sizes of the transformer follow from the tokenizer and the data set.
        (training.train, TransformerTraining, var.VARConfig,
         {"patch_nums", "vocab_size", "z_channels", "class_names"}),
    ],
)
def test_trainings_offer_every_option_with_its_default(command, options, sizes, own):
    parameters = inspect.signature(command).parameters
    fields = {field.name: field for field in dataclasses.fields(options) if field.name != "model"}
    assert set(parameters) == set(fields) | {field.name for field in dataclasses.fields(sizes)} - own
    for name, field in fields.items():
        default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
        assert parameters[name].default == default, name


def test_training_evaluation_and_curves(tmp_path):
    data, tokenizer, clothes = tmp_path / "data", tmp_path / "tokenizer", tmp_path / "clothes"
    write_image_folder(data, {"cats": 8, "dogs": 8})
    common = (*REFERENCE, "-d", data, "--max-steps", 3)
    line = run("train-tokenizer", "-o", tokenizer, *common, *TINY_TOKENIZER)
    assert "finished after 3 steps" in line and "val_psnr" in line
    assert "resume it" in refused("train-tokenizer", "-o", tokenizer, *common, *TINY_TOKENIZER)
    assert "differs" in refused("train-tokenizer", "-o", tokenizer, *common, *TINY_TOKENIZER, "--ch", 64, "--resume")

    small = ("--depth", 1, "--width", 32, "--heads", 2, "--batch-size", 4, "--val-images", 4, "--log-every", 1)
    run("train", "-o", clothes, "-t", tokenizer, *common, *small)
    pipeline = var.load(path=clothes)
    assert pipeline.class_names == ("cats", "dogs") and pipeline.var.config.patch_nums == (1, 2, 4)

    figures = tmp_path / "quality.json"
    small = ("-n", 4, "--held-out", 4, "--epochs", 1)
    text = run("evaluate", "-m", clothes, "-d", data, *REFERENCE, *small, "-o", figures)
    quality = json.loads(figures.read_text())
    assert quality["quality"]["generated_images"] == 4 and quality["sampling"]["cfg"] == 1.5
    assert "class agreement: dogs" in text

    pytest.importorskip("matplotlib")
    run("plot", tokenizer, clothes / "log.jsonl", "-o", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > picture.height > 500  # two rows


def test_training_refuses_bad_input_in_one_line(tmp_path):
    model = save_model(tmp_path / "model")
    write_image_folder(tmp_path / "data", {"cats": 8})
    tokenizer = ("train-tokenizer", "-o", tmp_path / "run", "-d", tmp_path / "data", *REFERENCE)
    assert "expected integers such as 1,2,4" in refused(*tokenizer, "--patch-nums", "1,two")
    assert "lr: expected" in refused(*tokenizer, "--lr", -1)
    assert "ch: expected" in refused(*tokenizer, "--ch", 33)
    assert "precision: expected" in refused(*tokenizer, "--precision", "fp8")
    assert "Fashion-MNIST" in refused("train-tokenizer", "-o", tmp_path / "run", "-d", tmp_path / "nothing")
    train = ("train", "-o", tmp_path / "run", "-d", tmp_path / "data", *REFERENCE)
    assert "no such file" in refused(*train, "-t", tmp_path / "nothing")
    assert "--num-classes: expected 1" in refused(*train, "-t", model, "--num-classes", 7)
    assert "--tokenizer" in refused(*train)
    evaluate = ("evaluate", "-m", model, "-d", tmp_path / "data", "-o", tmp_path / "quality.json")
    assert "expected the 10 classes" in refused(*evaluate)
    assert not (tmp_path / "run").exists()


def test_a_small_folder_trains_and_is_measured_with_default_options(tmp_path):
    data, tokenizer, model = tmp_path / "data", tmp_path / "tokenizer", tmp_path / "model"
    write_image_folder(data, {"cats": 15, "dogs": 15})
    sizes = ("--vocab-size", 16, "--z-channels", 4, "--ch-mult", "1,1", "--patch-nums", "1 2 4", "--max-steps", 1)
    assert "val_psnr" in run("train-tokenizer", "-o", tokenizer, "-d", data, *REFERENCE, *sizes)
    sizes = ("--depth", 1, "--width", 32, "--heads", 2, "--max-steps", 1)
    assert "val_loss" in run("train", "-o", model, "-t", tokenizer, "-d", data, *REFERENCE, *sizes)
    run("evaluate", "-m", model, "-d", data, *REFERENCE, "-n", 2, "--epochs", 0.1, "-o", tmp_path / "quality.json")


def test_messages_about_the_size_of_the_data_name_options_that_exist(tmp_path):
    write_image_folder(tmp_path / "data", {"cats": 30})
    model = save_model(tmp_path / "model")
    for command in (("train-tokenizer",), ("train", "-t", model)):
        command = (*command, "-o", tmp_path / "run", "-d", tmp_path / "data", *REFERENCE)
        assert "--val-images: expected 0..29 of 30 images" in refused(*command, "--val-images", 30)
        assert "--batch-size: expected 1..27 (the number" in refused(*command, "--batch-size", 28)
    write_fashion_mnist(tmp_path / "fashion")
    command = ("train-tokenizer", "-o", tmp_path / "run", "-d", tmp_path / "fashion", "--patch-nums", "1 2")
    assert "a model's is its last patch_nums times" in refused(*command)
    assert "--held-out: expected 0..39" in refused(
        "evaluate", "-m", model, "-d", tmp_path / "fashion", "--held-out", 40, "-o", tmp_path / "q.json"
    )


def test_broken_images_are_skipped_and_reported_on_request(tmp_path):
    data, tokenizer, model = tmp_path / "data", tmp_path / "tokenizer", tmp_path / "model"
    write_image_folder(data, {"cats": 8, "dogs": 8})
    for name in ("cats/3.png", "dogs/5.png"):
        (data / name).write_bytes((data / name).read_bytes()[:-300])
    (data / "cats" / "4.png").write_bytes(b"no image")
    (data / "cats" / "notes.txt").write_text("")
    common = (*REFERENCE, "-d", data, "--max-steps", 3)
    assert "not a readable image" in refused("train-tokenizer", "-o", tokenizer, *common, *TINY_TOKENIZER)
    sizes = ("--depth", 1, "--width", 32, "--heads", 2, "--batch-size", 4)
    commands = (("train-tokenizer", "-o", tokenizer, *TINY_TOKENIZER), ("train", "-o", model, "-t", tokenizer, *sizes))
    for command in commands:
        result = invoke(*command, *common, "--skip-broken")
        assert result.exit_code == 0, result.output
        text = " ".join(result.stderr.split())
        assert "3 broken of 16 images" in text and "left out: 1 .txt" in text
    evaluate = ("evaluate", "-m", model, "-d", data, *REFERENCE, "-n", 4, "--epochs", 1, "-o", tmp_path / "q.json")
    assert "not a readable image" in refused(*evaluate)
    result = invoke(*evaluate, "--skip-broken")
    assert result.exit_code == 0 and "3 broken of 16 images" in result.stderr


def test_a_model_is_measured_on_the_classes_of_the_same_names(tmp_path):
    """With the data's classes in another order than the model's, numbers were taken for numbers."""
    model = save_model(tmp_path / "model")  # with the classes of Fashion-MNIST
    names = var.load(path=model).class_names
    evaluate = ("evaluate", "-m", model, *REFERENCE, "-o", tmp_path / "quality.json", "-n", 2, "--epochs", 0.1)
    write_image_folder(tmp_path / "ordered", {name.replace("/", "-"): 3 for name in names})
    # "T-shirt/top" cannot be the name of a folder, so these are other names and in another order.
    result = invoke(*evaluate, "-d", tmp_path / "ordered")
    assert result.exit_code == 0 and "the classes of ordered have other names than those of the model" in result.stderr
    pair = tmp_path / "pair"
    config = dataclasses.replace(var.load(path=model).var.config, num_classes=2, class_names=("10", "2"))
    var.save(pair / "var.safetensors", var.VAR(config))
    var.save(pair / "vqvae.safetensors", var.load(path=model).vqvae)
    write_image_folder(tmp_path / "two", {"2": 3, "10": 3})
    evaluate = ("evaluate", "-m", pair, *evaluate[3:])
    result = invoke(*evaluate, "-d", tmp_path / "two")  # the names are the same, in another order
    assert result.exit_code == 0 and "other names" not in result.stderr
    write_image_folder(tmp_path / "three", {"2": 3, "10": 3, "11": 3})
    assert "--data: expected the 2 classes of" in refused(*evaluate, "-d", tmp_path / "three")


def test_a_model_is_measured_on_two_splits_of_the_same_classes_only(tmp_path):
    for split, classes in (("train", ("10", "2")), ("test", ("2",))):
        write_image_folder(tmp_path / "data" / split, {name: 3 for name in classes})
    pair = tmp_path / "pair"
    pipeline = var.load(path=save_model(tmp_path / "model"))
    config = dataclasses.replace(pipeline.var.config, num_classes=2, class_names=("2", "10"))
    var.save(pair / "var.safetensors", var.VAR(config))
    var.save(pair / "vqvae.safetensors", pipeline.vqvae)
    message = refused("evaluate", "-m", pair, "-d", tmp_path / "data", "-o", tmp_path / "quality.json")
    assert "--data: expected the same classes in both splits" in message


def test_plot_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert 'pip install "var-kernels[plots]"' in refused("plot", tmp_path, "-o", tmp_path / "curves.png")


def test_plot_refuses_what_is_no_log(tmp_path):
    assert "log of a training" in refused("plot", tmp_path, "-o", tmp_path / "curves.png")
    assert "expected a .png file" in refused("plot", tmp_path, "-o", tmp_path / "curves.pdf")


def test_interrupted_training_can_be_resumed(tmp_path):
    write_image_folder(tmp_path / "data", {"cats": 12})
    output = tmp_path / "run"
    arguments = ["train-tokenizer", "-o", output, "-d", tmp_path / "data", *REFERENCE, *TINY_TOKENIZER]
    arguments = [str(argument) for argument in arguments]
    command = [sys.executable, "-m", "var", *arguments, "--max-steps", "1000000"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        deadline = time.monotonic() + 120
        while not (output / "log.jsonl").is_file() or not (output / "log.jsonl").read_text():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert "interrupted after" in stdout and "--resume" in stdout and "Traceback" not in stderr
    assert isinstance(checkpoints.load_model(output / "vqvae.safetensors"), var.VQVAE)
    # With zero minutes, the resumed run takes one step and stops.
    assert "time limit after" in run(*arguments, "--max-steps", 1_000_000, "--resume", "--max-minutes", 0)
