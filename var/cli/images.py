"""The commands about images: demo, generate, profile, reconstruct, info.

This module declares the commands and their options. A command imports its work, and with it torch, when it runs.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import (
    Command,
    check_backend,
    check_device,
    check_precision,
    help_text,
    note,
    prepare_output,
    progress,
    say,
)

Model = Annotated[str, typer.Option(
    "--model", "-m", metavar="NAME|FOLDER",
    help="fashion (ships with the package: ten kinds of clothes at 32×32 pixels), d16, d20, d24, d30 or d36 (released "
         "models, which need --path), or a folder with var.safetensors and vqvae.safetensors.",
)]
ModelPath = Annotated[str | None, typer.Option(
    "--path", metavar="FOLDER|FILE|HUB-ID",
    help="Where the files of a released model are: a folder with var_d16.pth and vae_ch160v4096z32.pth (or the same as "
         ".safetensors), a Hub id such as FoundationVision/var, from which they are downloaded once, or one file with "
         "both networks, such as a checkpoint of the official training.",
)]
Backend = Annotated[str, typer.Option(
    "--backend", "-b",
    help="Implementation of the kernels: auto takes the best one that this machine has, reference is plain PyTorch; "
         "`python -m var_kernels` lists all. If a backend that is named cannot serve, that is an error: no other one "
         "serves instead.",
)]
Device = Annotated[str, typer.Option("--device", help="Where the model runs: cpu, cuda, cuda:1 …")]
Cfg = Annotated[float | None, typer.Option(
    "--cfg", min=0.0, show_default="what the model's file says, else 1.5",
    help="Strength of classifier-free guidance at the last scale. It grows linearly from 0 at the first one. 0 "
         "switches it off and halves the work.",
)]
TopK = Annotated[int | None, typer.Option(
    "--top-k", min=0, show_default="what the model's file says, else 900 for d16 … d36, else 0",
    help="Draw only from the k most likely tokens; 0: draw from all.",
)]
TopP = Annotated[float | None, typer.Option(
    "--top-p", min=0.0, max=1.0, show_default="what the model's file says, else 0.96",
    help="Draw only from the smallest set of tokens whose probability exceeds p; 0: draw from all.",
)]
MoreSmooth = Annotated[bool, typer.Option(
    "--more-smooth",
    help="Feed Gumbel-softmax mixtures of codes forward instead of single codes. Pictures are smoother, but no samples "
         "of the model's distribution.",
)]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="The same seed gives the same images.")]
Precision = Annotated[str, typer.Option(
    "--precision",
    help="fp32 or bf16. bf16 takes half the memory and is faster if the processor multiplies bf16; images differ "
         "slightly.",
)]
BatchSize = Annotated[int | None, typer.Option(
    "--batch-size", min=1, show_default="as many as keep the KV cache within 1 GiB, at most 100",
    help="Number of images that are generated at a time. It does not change any image.",
)]
Data = Annotated[Path | None, typer.Option(
    "--data", "-d", metavar="FOLDER", show_default="Fashion-MNIST where its Debian package installs it",
    help="A folder with Fashion-MNIST's IDX files (also below it, where its Debian package was unpacked), or a folder "
         "with one folder of images per class (optionally below train/ and test/).",
)]


def demo(
    output: Annotated[Path, typer.Option(
        "--output", "-o", metavar="FOLDER", help="Folder for the pictures.")] = Path("demo"),
    model: Model = "fashion", path: ModelPath = None, backend: Backend = "auto", seed: Seed = 0, data: Data = None,
    per_class: Annotated[int, typer.Option(
        "--per-class", "-n", min=1, max=100, help="Images per class in the grid.")] = 8,
) -> None:
    """See the model and the kernels at work: three pictures and two tables, in less than a minute on two cores.

    Writes grid.png (generated images of ten classes), coarse-to-fine.png (images decoded after each scale) and, if the
    data set is present, reconstructions.png (test images through the tokenizer and back). Then it compares the chosen
    backend with the reference in plain PyTorch, for whole generations and for single kernels: times and differences.

    Examples:

    $ python -m var demo

    $ python -m var demo -o pictures --seed 7 --data ~/fashion-mnist
    """
    check_backend(backend)
    prepare_output(output, folder=True)
    from . import demo as work

    work.run(output, model, path, backend, seed, data, per_class)


def generate(
    labels: Annotated[str | None, typer.Option(
        "--labels", "-l", metavar="LIST", show_default="all of a model with up to 20 classes",
        help="Classes separated by commas: numbers, ranges, names or all. *N after an item asks for N images, as in "
             "'0,3-5,sandal*4'. Numbers count the classes from 0; of a model whose classes all have numbers as names, "
             "they are these names.",
    )] = None,
    number: Annotated[int, typer.Option(
        "--number", "-n", min=1, help="Images per class for items of --labels without *N.")] = 1,
    model: Model = "fashion", path: ModelPath = None, cfg: Cfg = None, top_k: TopK = None, top_p: TopP = None,
    more_smooth: MoreSmooth = False, seed: Seed = 0, precision: Precision = "fp32", backend: Backend = "auto",
    device: Device = "cpu", batch_size: BatchSize = None,
    output: Annotated[Path, typer.Option(
        "--output", "-o", metavar="FOLDER|FILE.png|FILE.npz",
        help="A .png file gets one sheet with labels. A folder gets one PNG per image, in its own size. A .npz file "
             "gets the uint8 array arr_0 (N, H, W, 3), which the ADM evaluator of FID reads, and labels and tokens.",
    )] = Path("generated.png"),
) -> None:
    """Generate images of chosen classes, any number of them.

    An image depends on the seed, its class and its place in the list, not on the batch size or on other images. A
    folder and a .npz file keep finished images: after an interruption the same command generates only the others.

    Examples:

    $ python -m var generate --labels 'trouser*3,bag,7-9' -o clothes.png

    $ python -m var generate --labels all -n 50 --seed 1 -o samples.npz

    $ python -m var generate -m d16 --path FoundationVision/var -l 980,437*2 --precision bf16 -o volcano/
    """
    check_backend(backend)
    check_device(device)
    from ..generation import batches
    from ..model.opening import open_model
    from .labels import parse_labels

    opened = open_model(model, path, backend, device)
    sampling = batches.sampling_for(opened, cfg=cfg, top_k=top_k, top_p=top_p, more_smooth=more_smooth)
    check_precision(precision)
    chosen = parse_labels(_default_labels(labels, opened), opened.pipeline.class_names, number)
    prepare_output(output, ".png", ".npz", folder=True)
    _write_images(opened, chosen, sampling, seed, precision, batch_size, output, backend)


def _write_images(
    opened: Any, labels: list[int], sampling: Any, seed: int, precision: str, batch_size: int | None, output: Path,
    backend: str,
) -> None:
    from ..generation import batches, memory
    from ..generation.request import PRECISIONS
    from . import image_sets

    pipeline, count = opened.pipeline, len(labels)
    how = f"{sampling}, seed {seed}, {precision}"
    description = f"var {opened.name}: {how}, weights {_fingerprint(pipeline)}"
    images = image_sets.image_set(
        output, labels, pipeline.class_names, description, pipeline.vqvae.config.image_size,
        pipeline.var.config.schedule.length,
    )
    new = count - len(images.done)
    if images.done:
        note(f"{output}: {len(images.done)} of {count} images are there from an earlier run")
    started = time.perf_counter()
    try:
        with progress("generating", batches.count_scales(pipeline, new, batch_size)) as advance:
            images.write(batches.generate_batches(
                pipeline, labels, sampling, seed=seed, batch_size=batch_size, precision=precision, advance=advance,
                done=images.done,
            ))
    except (KeyboardInterrupt, OSError):
        if images.finished():
            note(f"{output}: {images.finished()} of {count} images are finished and kept; the same command goes on")
        raise
    seconds = time.perf_counter() - started
    spent = ""
    if new:
        configs, device = (pipeline.var.config, pipeline.vqvae.config), pipeline.var.pos_1LC.device
        prepared = memory.fixed_bytes(*configs, PRECISIONS[precision].itemsize, device, pipeline.var.backend)
        spent = f", {seconds / new:.3f} s per image"
        if prepared:
            spent += f", with a prepared copy of the weights of {prepared / 2**20:.0f} MiB"
    say(f"{output}: {count} image{'s' * (count > 1)}, {how}, backend {backend}; {seconds:.2f} s{spent}")


def _fingerprint(pipeline: Any) -> str:
    """Eight hex digits that identify a model, so that a retrained one does not continue the images of the old one."""
    from ..model.weights import weights_hash

    # Only the last layer of each network is hashed: training changes it, and hashing a whole large model takes seconds.
    return weights_hash(pipeline.var.head, pipeline.vqvae.decoder.conv_out)[:8]


def _default_labels(labels: str | None, opened: Any) -> str:
    if labels is not None:
        return labels
    classes = len(opened.pipeline.class_names)
    if classes > 20:
        raise ValueError(f"--labels: expected a list of classes, as {opened.name} has {classes} of them, got none")
    return "all"


def profile(
    model: Model = "fashion", path: ModelPath = None, precision: Precision = "fp32", batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, show_default="1; as many as generate takes for fashion",
                                 help="Number of images that are generated together.")] = None,
    cfg: Cfg = None, top_k: TopK = None, top_p: TopP = None, backend: Backend = "auto", device: Device = "cpu",
    output: Annotated[Path, typer.Option(
        "--output", "-o", metavar="FILE.png",
        help="The picture. It has a bar for each scale and one for the decoder, divided by stage.",
    )] = Path("profile.png"),
) -> None:
    """See where the time of a generation goes: a table and a picture by scale and stage.

    Without --path, released models (d16 … d36) are measured with random weights: times do not depend on the weights.

    Examples:

    $ python -m var profile

    $ python -m var profile -m d16 --precision bf16 --batch-size 4 -o d16.png
    """
    check_backend(backend)
    check_device(device)
    prepare_output(output, ".png")
    from . import profile

    chosen = {"cfg": cfg, "top_k": top_k, "top_p": top_p}
    profile.run(output, model, path, backend, device, precision, batch_size, chosen)


def reconstruct(
    images: Annotated[list[Path], typer.Argument(
        metavar="IMAGE...", exists=True, dir_okay=False, readable=True, help="Image files: PNG, JPEG, WebP …")],
    model: Model = "fashion", path: ModelPath = None, backend: Backend = "auto", device: Device = "cpu",
    precision: Precision = "fp32",
    output: Annotated[Path, typer.Option(
        "--output", "-o", metavar="FOLDER|FILE.png",
        help="A .png file gets one sheet of originals and reconstructions. A folder gets one PNG per reconstruction.",
    )] = Path("reconstructed.png"),
) -> None:
    """Take images through the tokenizer and back, to see what the tokens can hold.

    The shorter side of an image of another size is resized, and its centre is cut out; a line says so. Prints the peak
    signal-to-noise ratio (PSNR, in dB) of each image.

    Examples:

    $ python -m var reconstruct coat.png shoe.jpg -o pairs.png

    $ python -m var reconstruct -m d16 --path ~/var-weights photo.jpg -o out/
    """
    check_backend(backend)
    check_device(device)
    from ..model.opening import open_model
    from . import reconstruct

    check_precision(precision)
    opened = open_model(model, path, backend, device)
    pictures = [reconstruct.read_image(file, opened.pipeline.vqvae.config.image_size) for file in images]
    prepare_output(output, ".png", folder=True)
    reconstruct.run(pictures, opened.pipeline.vqvae, precision, output)


def info(
    model: Model = "fashion", path: ModelPath = None,
) -> None:
    """Show a model: its configuration, schedule of scales, parameters and memory, and the metadata of its files.

    Released models (d16 … d36) are described without their weights.

    Examples:

    $ python -m var info

    $ python -m var info -m d30
    """
    from . import info

    info.run(model, path)


def register(app: typer.Typer) -> None:
    """Add these commands to the program."""
    for command in (demo, generate, profile, reconstruct, info):
        app.command(cls=Command, rich_help_panel="Images", help=help_text(command))(command)

