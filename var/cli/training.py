"""The commands about training: train-tokenizer, train, evaluate, plot.

This module declares the commands and their options. A command imports its work, and with it torch, when it runs. The
options of the two trainings have the names of the fields of `TokenizerTraining`, `TransformerTraining` and the model's
configuration; a test compares the two lists.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import (
    INTERRUPTED,
    Command,
    check_backend,
    check_device,
    check_precision,
    help_text,
    integers,
    prepare_output,
    say,
)
from .images import Backend, BatchSize, Cfg, Data, Device, Model, ModelPath, Precision, Seed, TopK, TopP

_RUN, _OPTIMIZER, _MODEL, _DATA = "Run", "Optimization", "Model", "Data"


def _option(help_text: str, panel: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=panel, **settings)


def _integers(help_text: str, panel: str) -> Any:
    return _option(help_text, panel, parser=integers, metavar="N,N,…")


# Options of both trainings.
RunFolder = Annotated[Path, _option(
    "Folder of the run: checkpoint.pt, log.jsonl (curves) and the weights as .safetensors.", _RUN, "--output", "-o",
    metavar="FOLDER")]
Resume = Annotated[bool, _option(
    "Continue from the checkpoint in --output. The result is that of an uninterrupted run.", _RUN, "--resume")]
MaxSteps = Annotated[int, _option("Optimizer steps. The learning rate falls to its minimum at the last one.", _RUN)]
MaxMinutes = Annotated[float | None, _option(
    "Stop after this time, with a checkpoint.", _RUN, min=0.0, show_default="no limit")]
CheckpointMinutes = Annotated[float, _option("Minutes between checkpoints.", _RUN, min=0.0)]
LogEvery = Annotated[int, _option("Steps between lines of log.jsonl.", _RUN)]
ValEvery = Annotated[int, _option("Steps between validations; 0: at the end only.", _RUN, min=0)]
TrainPrecision = Annotated[str, _option("fp32, or bf16 by autocast.", _RUN)]
TrainSeed = Annotated[int, _option("Seed of initialisation, data order and dropout.", _RUN, min=0, max=2**32 - 1)]
Images = Annotated[int | None, _option("Images per step.", _OPTIMIZER, "--batch-size",
                                       show_default="64, or all if there are fewer")]
Lr = Annotated[float, _option("Peak learning rate of AdamW.", _OPTIMIZER)]
MinLr = Annotated[float, _option("Learning rate at the last step, reached along half a cosine.", _OPTIMIZER)]
Warmup = Annotated[int, _option("Steps of linear warm-up.", _OPTIMIZER)]
Decay = Annotated[float, _option("Weight decay of the weights of linear and convolution layers.", _OPTIMIZER, min=0.0)]
Beta1 = Annotated[float, _option("Decay of AdamW's first moment.", _OPTIMIZER, min=0.0, max=1.0)]
Beta2 = Annotated[float, _option("Decay of AdamW's second moment.", _OPTIMIZER, min=0.0, max=1.0)]
GradClip = Annotated[float, _option("Largest global norm of the gradient; 0: no clipping.", _OPTIMIZER)]
Ema = Annotated[float, _option("Decay of the average of the weights that is exported; 0: no average.", _OPTIMIZER)]
ValImages = Annotated[int | None, _option("Training images that are held out for validation.", _DATA,
                                          show_default="a tenth, at most 2000")]
RandomCrop = Annotated[bool, _option(
    "Cut a random square, not the centre (image folders only).", _DATA, "--random-crop")]
Flip = Annotated[bool, _option("Mirror half of the images (image folders only).", _DATA, "--flip")]
SkipBroken = Annotated[bool, _option(
    "Go on if an image cannot be read: the next readable image of its class takes its place, in this run and in a "
    "resumed one. A line says which images these are (image folders only).", _DATA, "--skip-broken")]

# Sizes of the tokenizer.
VocabSize = Annotated[int, _option("Codes in the codebook.", _MODEL)]
ZChannels = Annotated[int, _option("Channels of a code.", _MODEL)]
Ch = Annotated[int, _option("Channels of the convolutions at full resolution, a multiple of 32.", _MODEL)]
ChMult = Annotated[Any, _integers("Factor of --ch for each resolution; each after the first halves the side.", _MODEL)]
PatchNums = Annotated[Any, _integers("Sides of the token maps. The side of an image is the last one times "
                                     "2^(number of --ch-mult - 1).", _MODEL)]
ResBlocks = Annotated[int, _option("Residual blocks per resolution.", _MODEL)]
NumPhi = Annotated[int, _option("Number of convolutions φ, which the scales share.", _MODEL)]
PhiRatio = Annotated[float, _option(
    "Share of the convolution in φ; the rest is the identity.", _MODEL, min=0.0, max=1.0)]
Beta = Annotated[float, _option("Weight of the commitment loss within the quantizer's loss.", _MODEL, min=0.0)]
Znorm = Annotated[bool, _option("Find the nearest code by cosine instead of distance.", _MODEL, "--using-znorm")]
L1 = Annotated[float, _option("Weight of the absolute error; the squared error has 1.", _OPTIMIZER, min=0.0)]
Vq = Annotated[float, _option("Weight of the quantizer's loss.", _OPTIMIZER, min=0.0)]
InitImages = Annotated[int, _option("Images whose features are clustered into the first codebook.", _OPTIMIZER, min=1)]
RestartEvery = Annotated[int, _option("Steps between revivals of unused codes.", _OPTIMIZER, min=1)]
RestartUntil = Annotated[float, _option(
    "Share of the steps after which no code is revived.", _OPTIMIZER, min=0.0, max=1.0)]
RestartBelow = Annotated[float, _option(
    "A code counts as unused below this share of the average use.", _OPTIMIZER, min=0.0)]

# Sizes of the transformer.
Tokenizer = Annotated[Path, _option("The tokenizer: a folder of train-tokenizer, or its vqvae.safetensors.", _DATA,
                                    "--tokenizer", "-t", metavar="FOLDER|FILE")]
Depth = Annotated[int, _option("Number of blocks.", _MODEL)]
Width = Annotated[int | None, _option("Channels.", _MODEL, show_default="64 times the depth")]
Heads = Annotated[int | None, _option("Attention heads.", _MODEL, show_default="one per 64 channels")]
MlpRatio = Annotated[float, _option(
    "Hidden channels of the feed-forward layers, divided by the channels.", _MODEL, min=0.0, max=1000.0)]
SharedAln = Annotated[bool, _option("One AdaLN projection for all blocks, as in d36.", _MODEL, "--shared-aln")]
L2Norm = Annotated[bool, _option("Normalise queries and keys, as in all released models.", _MODEL)]
NumClasses = Annotated[int | None, _option("Classes.", _MODEL, show_default="counted in the data set")]
LabelDropout = Annotated[float, _option("Share of labels that 'no class' replaces, for guidance (--cfg).", _OPTIMIZER)]
Views = Annotated[int, _option("Tokenized copies of the training set, each with other crops and flips.", _DATA)]
EncodeBatch = Annotated[int, _option("Images tokenized at a time.", _DATA, min=1)]


def train_tokenizer(
    output: RunFolder, data: Data = None, resume: Resume = False, max_steps: MaxSteps = 10_000,
    batch_size: Images = None, lr: Lr = 1e-3, min_lr: MinLr = 1e-5, warmup_steps: Warmup = 200,
    weight_decay: Decay = 0.05, beta1: Beta1 = 0.9, beta2: Beta2 = 0.95, grad_clip: GradClip = 1.0,
    ema_decay: Ema = 0.999, precision: TrainPrecision = "fp32", device: Device = "cpu", seed: TrainSeed = 0,
    val_images: ValImages = None, val_every: ValEvery = 1000, log_every: LogEvery = 50,
    checkpoint_minutes: CheckpointMinutes = 5.0, max_minutes: MaxMinutes = None, backend: Backend = "auto",
    l1_weight: L1 = 0.2, vq_weight: Vq = 1.0, random_crop: RandomCrop = False, flip: Flip = False,
    skip_broken: SkipBroken = False, init_images: InitImages = 256, restart_every: RestartEvery = 50,
    restart_until: RestartUntil = 0.7, restart_threshold: RestartBelow = 0.1, vocab_size: VocabSize = 512,
    z_channels: ZChannels = 16, ch: Ch = 32, ch_mult: ChMult = "1,2,2", patch_nums: PatchNums = "1,2,3,4,6,8",
    num_res_blocks: ResBlocks = 1, num_phi: NumPhi = 4, phi_ratio: PhiRatio = 0.5, beta: Beta = 0.25,
    using_znorm: Znorm = False,
) -> None:
    """Train the tokenizer, a multi-scale VQ-VAE, which turns images into token maps and back.

    The default sizes are those of the embedded model (32×32 pixels, 130 tokens). The sizes of the released tokenizer
    are --vocab-size 4096 --z-channels 32 --ch 160 --ch-mult 1,1,2,2,4 --num-res-blocks 2 --patch-nums
    1,2,3,4,5,6,8,10,13,16. Ctrl-C ends the run with a checkpoint and usable weights, and --resume continues it.

    Examples:

    $ python -m var train-tokenizer -o runs/tokenizer --precision bf16

    $ python -m var train-tokenizer -o runs/tokenizer --resume

    $ python -m var train-tokenizer -o runs/flowers -d ~/flowers --flip --patch-nums 1,2,3,4,6,8,12,16 --max-minutes 60
    """
    values = dict(locals())
    check_backend(backend)
    check_device(device)
    from ..model.config import VQVAEConfig
    from ..training import tokenizer as work

    _finish(work.train_tokenizer(_build(work.TokenizerTraining, VQVAEConfig, values)), "train-tokenizer")


def train(
    output: RunFolder, tokenizer: Tokenizer, data: Data = None, resume: Resume = False, max_steps: MaxSteps = 10_000,
    batch_size: Images = None, lr: Lr = 1e-3, min_lr: MinLr = 1e-5, warmup_steps: Warmup = 200,
    weight_decay: Decay = 0.05, beta1: Beta1 = 0.9, beta2: Beta2 = 0.95, grad_clip: GradClip = 1.0,
    ema_decay: Ema = 0.999, precision: TrainPrecision = "fp32", device: Device = "cpu", seed: TrainSeed = 0,
    val_images: ValImages = None, val_every: ValEvery = 1000, log_every: LogEvery = 50,
    checkpoint_minutes: CheckpointMinutes = 5.0, max_minutes: MaxMinutes = None, backend: Backend = "auto",
    label_dropout: LabelDropout = 0.1, random_crop: RandomCrop = False, flip: Flip = False,
    skip_broken: SkipBroken = False, views: Views = 1, encode_batch: EncodeBatch = 128, depth: Depth = 6,
    width: Width = None, heads: Heads = None, mlp_ratio: MlpRatio = 4.0, shared_aln: SharedAln = False,
    attn_l2_norm: L2Norm = True, num_classes: NumClasses = None,
) -> None:
    """Train the transformer on the tokens of a trained tokenizer, for next-scale prediction.

    The tokenizer determines scales and codebook, the data set determines the classes. At the end the folder of the run
    holds both networks, so it can be the --model of the other commands. Ctrl-C ends the run with a checkpoint and
    usable weights, and --resume continues it.

    Examples (the first one has the sizes of the embedded model):

    $ python -m var train -o runs/clothes -t runs/tokenizer --width 192 --shared-aln --precision bf16

    $ python -m var generate -m runs/clothes -o clothes.png
    """
    values = dict(locals())
    check_backend(backend)
    check_device(device)
    from ..data.datasets import open_dataset
    from ..model.config import VARConfig
    from ..training import transformer as work

    config = work.load_tokenizer(Path(os.path.expanduser(tokenizer)), backend).config
    if num_classes is None:
        num_classes = len(open_dataset(data, "train", config.image_size, skip_broken=skip_broken).class_names)
    values |= {"num_classes": num_classes, "patch_nums": config.patch_nums}
    values |= {"vocab_size": config.vocab_size, "z_channels": config.z_channels}
    _finish(work.train_transformer(_build(work.TransformerTraining, VARConfig, values)), "train")


def _build(options: Any, model: Any, values: dict[str, Any]) -> Any:
    """The dataclass `options` with its configuration `model`. Both take the values of the command line by name."""
    import dataclasses

    sizes = {field.name: values[field.name] for field in dataclasses.fields(model) if field.name in values}
    rest = {field.name: values[field.name] for field in dataclasses.fields(options) if field.name in values}
    return options(model=model(**sizes), **rest)


def _finish(result: Any, command: str) -> None:
    figures = "".join(f", {name} {value:.4g}" for name, value in result.validation.items())
    say(f"{result.weights}: {result.reason} after {result.step} steps, {result.seconds / 60:.1f} min{figures}")
    if result.reason == "interrupted":
        say(f"continue with: python -m var {command} … --resume")
        raise typer.Exit(INTERRUPTED)


def evaluate(
    output: Annotated[Path, typer.Option(
        "--output", "-o", metavar="FILE.json", help="The file for the results.")] = Path("quality.json"),
    model: Model = "fashion", path: ModelPath = None, data: Data = None, backend: Backend = "auto",
    images: Annotated[int, typer.Option("--images", "-n", min=2, max=10_000_000,
                                        help="Number of images to generate.")] = 2000,
    held_out: Annotated[int | None, typer.Option(
        "--held-out", min=2, show_default="a tenth, at most 2000",
        help="Training images that the classifier does not see, for the floor of the distance.")] = None,
    epochs: Annotated[float, typer.Option("--epochs", min=0.0, help="Epochs of the classifier's training.")] = 4.0,
    cfg: Cfg = None, top_k: TopK = None, top_p: TopP = None, seed: Seed = 0, precision: Precision = "fp32",
    batch_size: BatchSize = None, skip_broken: SkipBroken = False,
) -> None:
    """Measure the quality of a model on its data set. Takes a few minutes, most of them to train a classifier.

    It measures the reconstruction of the test images (PSNR) and the use of the codebook. A small classifier, trained
    for this only, shows how often generated images show their class. Its features give the Fréchet distance of
    generated images to real test images, and, for comparison, that of held-out real images. This distance is no FID: it
    compares models of one data set.

    Example:

    $ python -m var evaluate -m runs/clothes -o quality.json
    """
    check_backend(backend)
    prepare_output(output, ".json")
    from . import evaluate

    check_precision(precision)
    sampling = {"cfg": cfg, "top_k": top_k, "top_p": top_p}
    evaluate.run(
        output, model, path, data, backend, images, held_out, epochs, sampling, seed, precision, batch_size, skip_broken
    )


def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or their log.jsonl files.")],
    output: Annotated[Path, typer.Option(
        "--output", "-o", metavar="FILE.png", help="The picture.")] = Path("curves.png"),
) -> None:
    """Draw the curves of trainings, running or finished: losses, accuracy, PSNR, use of the codebook.

    Needs matplotlib, which the extra `plots` of this package installs.

    Example:

    $ python -m var plot runs/tokenizer runs/clothes -o curves.png
    """
    prepare_output(output, ".png")
    from . import curves

    curves.run(runs, output)


def register(app: typer.Typer) -> None:
    """Add these commands to the program."""
    for command in (train_tokenizer, train, evaluate, plot):
        app.command(cls=Command, rich_help_panel="Training", help=help_text(command))(command)
