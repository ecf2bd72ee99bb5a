"""`python -m var profile`: its times add up to the time of a generation, and its operations to those of the model."""

import time

import pytest
import torch
from PIL import Image

from tests.helpers.cli import refused, run, save_model
from tests.helpers.models import tiny_var, tiny_vqvae
from var import Generator, Pipeline
from var.cli import profile as profiling
from var.generation.batches import Sampling


@pytest.fixture(scope="module")
def profile():
    return profiling.measure(Pipeline(tiny_vqvae(), tiny_var()), Sampling(1.5, 9, 0.9), 3, "fp32", rounds=2)


def test_rows_are_the_scales_and_the_decoder(profile):
    assert profile.rows == ("1×1", "2×2", "3×3", "decoder")
    for row in profile.rows:
        times = profile.seconds[row]
        assert set(times) == set(profile.stages) and all(seconds >= 0 for seconds in times.values())
    assert profile.seconds["decoder"]["convolutions"] > 0 == profile.seconds["decoder"]["attention"]
    for stage in ("projections", "attention", "AdaLN and gates", "sampling", "next input"):
        assert profile.seconds["3×3"][stage] > 0 == profile.seconds["3×3"]["convolutions"], stage


def test_times_add_up_to_what_a_generation_takes(profile):
    generator = Generator(tiny_var(), tiny_vqvae(), batch_size=3)
    labels, times = torch.arange(3), []
    for _ in range(5):
        started = time.perf_counter()
        generator(labels, seed=0, top_k=9, top_p=0.9)
        times.append(time.perf_counter() - started)
    assert min(times) / 4 < profile.total < 4 * max(times)


def test_operations_are_those_of_the_model(profile):
    config = tiny_var().config
    rows, lengths, width = 6, config.schedule.lengths, config.width
    # Guidance combines the two halves in front of the head.
    linear = 2 * sum(lengths) * (rows * 12 * width**2 * config.depth + rows // 2 * width * config.vocab_size)
    modulation = 2 * rows * (6 * width**2 * config.depth + 2 * width**2)
    embedding = 2 * 3 * sum(lengths[1:]) * config.z_channels * width
    assert profile.operations["projections"] == linear + modulation + embedding
    ends = [sum(lengths[: k + 1]) for k in range(len(lengths))]
    pairs = sum(length * end for length, end in zip(lengths, ends, strict=True))
    assert profile.operations["attention"] == 4 * rows * width * config.depth * pairs


def test_command_writes_a_picture_and_a_table(tmp_path):
    model = save_model(tmp_path / "model") if (tmp_path / "model").mkdir() is None else None
    text = run("profile", "-m", model, "-o", tmp_path / "p.png", "--batch-size", 2)
    assert "projections" in text and "GFLOP/s" in text and "decoder" in text and "s per image" in text
    with Image.open(tmp_path / "p.png") as image:
        assert image.width > 500
    assert "--precision: expected fp32 or bf16" in refused("profile", "-m", model, "--precision", "fp8",
                                                          "-o", tmp_path / "p.png")  # fmt: skip
    assert "--output" in refused("profile", "-m", model, "-o", tmp_path / "p.txt")
