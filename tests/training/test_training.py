"""Training loops: learning rate, parameter groups, resuming with equal losses, interruption, failures."""

import math
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import var
from tests.helpers.training import (
    VAR_CONFIG,
    VQVAE_CONFIG,
    tokenizer_options,
    transformer_options,
)
from var.data.datasets import DataError
from var.model import checkpoints
from var.model.config import VQVAEConfig
from var.model.transformer import VAR
from var.model.vqvae import VQVAE
from var.training.progress import JsonLinesLog, TrainingDisplay, format_duration, read_log
from var.training.tokenizer import train_tokenizer
from var.training.trainer import (
    Trainer,
    TrainingError,
    TrainingOptions,
    learning_rate,
    parameter_groups,
    saved_options,
    write_checkpoint,
)
from var.training.transformer import load_tokenizer, train_transformer, weights_hash


def losses(output):
    """The records of the log without the fields that depend on the clock."""
    clock = ("images/s", "tokens/s", "seconds")
    return [{k: v for k, v in record.items() if k not in clock} for record in read_log(output / "log.jsonl")]


def stop_after(monkeypatch, step):
    """Makes the loop believe that a signal arrived during optimizer step number `step`."""
    update = Trainer._update_ema

    def update_then_signal(self):
        update(self)
        if self.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_update_ema", update_then_signal)


# ------------------------------------------------------------------------------------------------- schedule, groups


def test_learning_rate_warms_up_and_decays(tmp_path):
    options = TrainingOptions(output=tmp_path, max_steps=101, warmup_steps=10, lr=1.0, min_lr=0.1)
    assert learning_rate(0, options) == pytest.approx(0.1)
    assert learning_rate(9, options) == pytest.approx(1.0)
    assert learning_rate(10, options) == pytest.approx(1.0)
    assert learning_rate(55, options) == pytest.approx(0.55)  # the middle of the cosine
    assert learning_rate(100, options) == pytest.approx(0.1)
    rates = [learning_rate(step, options) for step in range(10, 101)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("max_steps", [1, 2, 3])
def test_learning_rate_of_runs_shorter_than_the_warm_up(tmp_path, max_steps):
    options = TrainingOptions(output=tmp_path, max_steps=max_steps, warmup_steps=2, lr=1.0, min_lr=0.1)
    assert all(0 < learning_rate(step, options) <= 1 for step in range(max_steps))


def test_only_weights_of_linear_and_convolution_layers_decay():
    expected = {
        VAR(VAR_CONFIG): (
            {"blocks.0.attn.mat_qkv.weight", "blocks.1.ffn.fc1.weight", "head.weight", "word_embed.weight"},
            {"class_emb.weight", "lvl_embed.weight", "pos_1LC", "blocks.0.attn.scale_mul_1H11", "head.bias"},
        ),
        VQVAE(VQVAE_CONFIG): (
            {"encoder.conv_in.weight", "quantize.quant_resi.qresi_ls.0.weight"},
            {"quantize.embedding.weight", "encoder.norm_out.weight", "encoder.conv_in.bias"},
        ),
    }
    for model, (some_decayed, some_kept) in expected.items():
        names = {id(p): name for name, p in model.named_parameters()}
        groups = parameter_groups(model, 0.1)
        decayed, kept = ([names[id(p)] for p in group["params"]] for group in groups)
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
        assert sorted(decayed + kept) == sorted(names.values())
        assert some_decayed <= set(decayed) and some_kept <= set(kept)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 0}, "max_steps: expected a positive"),
        ({"batch_size": -1}, "batch_size: expected a positive"),
        ({"lr": math.nan}, "lr: expected a positive"),
        ({"lr": 1e-3, "min_lr": 1e-2}, r"min_lr: expected 0..lr"),
        ({"warmup_steps": -1}, "warmup_steps: expected zero or more"),
        ({"ema_decay": 1.0}, "ema_decay: expected 0 <= ema_decay < 1"),
        ({"grad_clip": -1.0}, "grad_clip: expected zero or more"),
        ({"precision": "fp8"}, "precision: expected 'fp32' or 'bf16', got 'fp8'"),
        ({"seed": -1}, "seed: expected zero or more"),
        ({"log_every": 0}, "log_every: expected a positive"),
        ({"label_dropout": 1.0}, "label_dropout: expected"),
        ({"views": 0}, "views: expected a positive"),
    ],
)
def test_bad_options_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        transformer_options(tmp_path, tmp_path, tmp_path, **changes)


# ---------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    ("precision", "step", "backend"), [("fp32", 3, "reference"), ("bf16", 4, "reference"), ("fp32", 5, "auto")]
)
def test_resumed_tokenizer_repeats_the_uninterrupted_losses(tmp_path, data, monkeypatch, precision, step, backend):
    # Dead codes are replaced at steps 2 and 4, and validation runs at 4 and 8: before, at and after the interruption.
    options = {"precision": precision, "backend": backend, "log_every": 2}
    train_tokenizer(tokenizer_options(tmp_path / "whole", data, **options))
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        first = train_tokenizer(tokenizer_options(tmp_path / "halves", data, **options))
    assert (first.reason, first.step) == ("interrupted", step)
    second = train_tokenizer(tokenizer_options(tmp_path / "halves", data, resume=True, **options))
    assert (second.reason, second.step) == ("finished", 8)
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    assert weights_hash(checkpoints.load_model(second.weights)) == weights_hash(
        checkpoints.load_model(tmp_path / "whole" / "vqvae.safetensors")
    )


def test_training_neither_uses_nor_changes_the_random_state_of_the_process(tmp_path, data, tokenizer):
    # All its random numbers are functions of the seed and the step, so that a checkpoint needs no random state.
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        train_tokenizer(tokenizer_options(tmp_path / f"tokenizer {seed}", data))
        train_transformer(transformer_options(tmp_path / f"transformer {seed}", data, tokenizer))
        assert torch.equal(torch.get_rng_state(), state)
    for part in ("tokenizer", "transformer"):
        assert losses(tmp_path / f"{part} 1") == losses(tmp_path / f"{part} 2")


@pytest.mark.parametrize("options", [{"precision": "fp32"}, {"precision": "bf16", "backend": "auto"}])
def test_resumed_transformer_repeats_the_uninterrupted_losses(tmp_path, data, tokenizer, monkeypatch, options):
    train_transformer(transformer_options(tmp_path / "whole", data, tokenizer, **options))
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        train_transformer(transformer_options(tmp_path / "halves", data, tokenizer, **options))
    result = train_transformer(transformer_options(tmp_path / "halves", data, tokenizer, resume=True, **options))
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    assert set(result.validation) == {"val_loss", "val_last_scale_accuracy"}
    # Both networks of the model lie in the run directory.
    pipeline = var.load(path=tmp_path / "halves", backend="reference")
    assert pipeline.class_names[0] == "T-shirt/top"
    assert pipeline.var.generate(pipeline.vqvae, torch.tensor([0, 9]), seed=0).images.shape == (2, 3, 32, 32)


def test_records_after_the_checkpoint_are_not_logged_twice(tmp_path):
    log = JsonLinesLog(tmp_path / "log.jsonl")
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 0.5})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # cut short by a crash
    JsonLinesLog(tmp_path / "log.jsonl", keep_until_step=2).write({"step": 3, "loss": 0.25})
    assert read_log(tmp_path / "log.jsonl") == [
        {"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.25},
    ]  # fmt: skip


def test_resume_refuses_another_run(tmp_path, data, tokenizer):
    other_model = VQVAEConfig(**{**VQVAE_CONFIG.to_dict(), "vocab_size": 25})
    for changes, message in (
        ({"model": other_model}, "model differs from .*vocab_size: checkpoint 24, now 25"),
        ({"batch_size": 5}, "option differs from .*batch_size: checkpoint 4, now 5"),
        ({"seed": 3}, "seed: checkpoint 0, now 3"),
    ):
        with pytest.raises(TrainingError, match=message):
            train_tokenizer(tokenizer_options(tokenizer, data, resume=True, **changes))
    with pytest.raises(TrainingError, match="resume: no checkpoint at"):
        train_tokenizer(tokenizer_options(tmp_path / "new", data, resume=True))
    with pytest.raises(TrainingError, match="checkpoint.pt exists: resume it, or choose another directory"):
        train_tokenizer(tokenizer_options(tokenizer, data))
    (tmp_path / "new").mkdir(exist_ok=True)  # which the refused run did not leave behind
    (tmp_path / "new" / "checkpoint.pt").write_bytes(b"junk")
    with pytest.raises(TrainingError, match="is not a readable checkpoint"):
        train_tokenizer(tokenizer_options(tmp_path / "new", data, resume=True))
    torch.save({"format": 1, "title": "transformer"}, tmp_path / "new" / "checkpoint.pt")
    with pytest.raises(TrainingError, match="is not a checkpoint of `tokenizer`"):
        train_tokenizer(tokenizer_options(tmp_path / "new", data, resume=True))


def test_changed_options_of_a_resumed_run_are_pointed_out(tmp_path, data, capsys):
    train_tokenizer(tokenizer_options(tmp_path, data, max_minutes=1e-9))
    saved = saved_options(tmp_path, "tokenizer")
    assert (saved["lr"], saved["vocab_size"], saved["patch_nums"]) == (2e-3, 24, [1, 2, 8])
    capsys.readouterr()
    train_tokenizer(tokenizer_options(tmp_path, data, lr=1e-3, max_steps=2, log_every=2, resume=True))
    printed = " ".join(capsys.readouterr().err.split())
    assert "resumed with other options: max_steps 2 (so far 8), lr 0.001 (so far 0.002)" in printed
    assert "log_every" not in printed


def test_resume_refuses_pickled_code(tmp_path, data):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    (tmp_path / "run").mkdir()
    torch.save(Payload(), tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(TrainingError, match="is not a readable checkpoint"):
        train_tokenizer(tokenizer_options(tmp_path / "run", data, resume=True))
    assert not (tmp_path / "executed").exists()


def test_resuming_a_finished_run_changes_nothing(tmp_path, data, tokenizer):
    before = losses(tokenizer), weights_hash(load_tokenizer(tokenizer, "reference"))
    result = train_tokenizer(tokenizer_options(tokenizer, data, resume=True))
    assert (result.reason, result.step) == ("finished", 8) and "val_psnr" in result.validation
    assert (losses(tokenizer), weights_hash(load_tokenizer(tokenizer, "reference"))) == before


# ------------------------------------------------------------------------------------------ interruption and failure


def test_time_limit_leaves_a_checkpoint(tmp_path, data):
    result = train_tokenizer(tokenizer_options(tmp_path, data, max_minutes=1e-9))
    assert (result.reason, result.step) == ("time limit", 1)
    assert result.checkpoint.exists() and isinstance(checkpoints.load_model(result.weights), VQVAE)


def test_sigint_of_a_process_leaves_a_usable_checkpoint(tmp_path, data):
    script = f"""
        from pathlib import Path
        from tests.helpers.training import tokenizer_options
        from var.training.tokenizer import train_tokenizer
        import torch
        torch.set_num_threads(1)
        options = tokenizer_options(Path({str(tmp_path)!r}), Path({str(data)!r}), max_steps=100_000, val_every=0)
        result = train_tokenizer(options)
        print(result.reason, result.step)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        cwd=Path(var.__file__).parents[1],
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 240
        while not read_log(tmp_path / "log.jsonl"):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        reason, step = process.communicate(timeout=120)[0].split()
    finally:
        process.kill()
    assert process.returncode == 0 and reason == "interrupted" and int(step) >= 1
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == int(step)
    assert isinstance(checkpoints.load_model(tmp_path / "vqvae.safetensors"), VQVAE)


def test_signal_handlers_are_given_back(tmp_path, data):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train_tokenizer(tokenizer_options(tmp_path, data, max_steps=1))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_full_disk_leaves_the_previous_checkpoint_intact(tmp_path, data, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        train_tokenizer(tokenizer_options(tmp_path, data))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    options = tokenizer_options(tmp_path, data, resume=True, val_every=0)
    # A limit of the file size stands for a full disk: writes fail half-way with an OSError of the system.
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(TrainingError, match="could not write .*checkpoint.pt.*the previous checkpoint is intact"):
            train_tokenizer(options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "log.jsonl", "vqvae.safetensors"]
    assert train_tokenizer(options).step == 8


def test_unwritable_log_stops_with_the_last_checkpoint_named(tmp_path, data, monkeypatch):
    def full(self, record):
        raise OSError(28, "No space left on device", str(self.path))

    monkeypatch.setattr(JsonLinesLog, "write", full)
    with pytest.raises(TrainingError, match="stopped at step 1: .*log.jsonl: No space left on device; there is no"):
        train_tokenizer(tokenizer_options(tmp_path, data))


def test_checkpoint_in_a_missing_directory_names_it(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    with pytest.raises(TrainingError, match="there is no earlier checkpoint"):
        write_checkpoint(blocked / "checkpoint.pt", {"step": 1})


def test_unwritable_output_is_refused_before_training(tmp_path, data):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrainingError, match="output: cannot write to"):
        train_tokenizer(tokenizer_options(tmp_path / "file" / "run", data))


def test_divergence_stops_and_keeps_the_last_good_checkpoint(tmp_path, data, monkeypatch):
    forward = VQVAE.forward

    def poisoned(self, images):
        output = forward(self, images)
        poisoned.calls += self.training
        return output._replace(vq_loss=output.vq_loss * math.nan) if poisoned.calls == 6 else output

    poisoned.calls = 0
    monkeypatch.setattr(VQVAE, "forward", poisoned)
    message = "training diverged at step 5: loss is nan, vq is nan.*the last checkpoint is"
    with pytest.raises(TrainingError, match=message):
        train_tokenizer(tokenizer_options(tmp_path, data, checkpoint_minutes=0))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 5
    assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_unusable_data_is_reported(tmp_path, data):
    with pytest.raises(DataError, match="not a directory"):
        train_tokenizer(tokenizer_options(tmp_path / "run", tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"batch_size: expected 1..36"):
        train_tokenizer(tokenizer_options(tmp_path / "run", data, batch_size=37))


def test_signal_during_the_last_step_does_not_undo_the_end(tmp_path, data, monkeypatch):
    stop_after(monkeypatch, 8)
    assert train_tokenizer(tokenizer_options(tmp_path, data)).reason == "finished"


# ------------------------------------------------------------------------------------------------------------- loop


class Scalar(nn.Module):
    """A model of one parameter, with which the result of the loop is known exactly."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(1.0))


def scalar_trainer(tmp_path, **changes):
    options = {"max_steps": 4, "warmup_steps": 0, "weight_decay": 0.0, "batch_size": 2, **changes}
    return Trainer(
        Scalar(), TrainingOptions(output=tmp_path, **options), title="scalar", config={}, tokens_per_image=1
    )


def fit(trainer, **kwargs):
    exported = {}
    result = trainer.fit(
        lambda step: {"loss": trainer.model.value * 1.0}, weights=trainer.options.output / "w",
        export=lambda path: exported.update(value=float(trainer.model.value.detach())), **kwargs,
    )  # fmt: skip
    return result, exported["value"]


def test_first_steps_are_adamw(tmp_path):
    trainer = scalar_trainer(tmp_path, max_steps=1, lr=0.1, ema_decay=0.0)
    assert fit(trainer)[1] == pytest.approx(0.9)  # a constant gradient moves by lr


def test_average_is_exported_and_raw_weights_return(tmp_path):
    trainer = scalar_trainer(tmp_path, lr=0.1, min_lr=0.1, ema_decay=0.5)
    _, exported = fit(trainer)
    average, value = 1.0, 1.0
    for step in range(1, 5):
        value -= 0.1
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * value
    assert exported == pytest.approx(average, rel=1e-5)
    assert float(trainer.model.value.detach()) == pytest.approx(0.6, rel=1e-5)


def test_gradients_are_clipped(tmp_path):
    trainer = scalar_trainer(tmp_path, max_steps=1, grad_clip=0.25, ema_decay=0.0)
    trainer._train_step(lambda step: {"loss": trainer.model.value * 100})
    assert float(trainer.model.value.grad) == pytest.approx(0.25, rel=1e-4)
    assert trainer._window["grad_norm"] == [100.0]  # the logged norm is the one before clipping


def test_validation_sees_averaged_weights_in_evaluation_mode(tmp_path):
    trainer = scalar_trainer(tmp_path, lr=0.1, min_lr=0.1, ema_decay=0.5, val_every=2)
    seen = []

    def validate():
        seen.append((trainer.model.training, float(trainer.model.value.detach())))
        return {"val": 0.0}

    fit(trainer, validate=validate)
    assert [training for training, _ in seen] == [False, False]
    assert all(value > 1 - 0.1 * step for (_, value), step in zip(seen, (2, 4), strict=True))


def test_progress_without_a_terminal_is_plain_lines(capsys):
    with TrainingDisplay("tokenizer", 10) as display:
        display.advance(1)
        display.update(5, {"loss": 0.123456, "tokens/s": 12345.6}, 3661)
    assert capsys.readouterr().err == "tokenizer: step 5/10  loss 0.1235  tokens/s 12,346  1:01:01 left\n"
    assert [format_duration(s) for s in (-1, 0, 59.6, 3600)] == ["0:00", "0:00", "1:00", "1:00:00"]
