"""The command line: what it writes, what it refuses and how it says so."""

import dataclasses
import errno
import inspect
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import var
from tests.helpers.cli import REFERENCE, files_below, invoke, refused, run, save_model
from tests.helpers.training import VAR_CONFIG, VQVAE_CONFIG, write_fashion_mnist
from var.cli import demo, images, training
from var.cli.labels import parse_labels
from var.data import pictures
from var.generation import batches, memory
from var.model import opening

SIZE = VQVAE_CONFIG.image_size
CELL = 96  # side of a 32-pixel image on a sheet


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


# ------------------------------------------------------------------------------------------------------------ help


@pytest.mark.parametrize(
    "command", ["demo", "generate", "profile", "reconstruct", "info", "train-tokenizer", "train", "evaluate", "plot"]
)
def test_help_describes_every_option_and_shows_an_example(command):
    text = run(command, "--help")
    assert f"$ python -m var {command}" in text
    function = getattr(training, command.replace("-", "_"), None) or getattr(images, command)
    for name, hint in inspect.get_annotations(function, eval_str=True).items():
        if name != "return":
            (information,) = hint.__metadata__
            assert information.help and information.help.endswith((".", "…")), name
            options = information.param_decls or (information.metavar or f"--{name.replace('_', '-')}",)
            assert any(option in text for option in options), name


# -------------------------------------------------------------------------------------------------------- generate


def test_generate_writes_a_sheet_with_a_row_per_class(model, tmp_path):
    output = tmp_path / "new" / "sheet.png"
    line = run("generate", "-m", model, *REFERENCE, "-l", "bag*3,0", "-o", output)
    assert str(output) in line and "4 images" in line and "seed 0" in line
    with Image.open(output) as sheet:
        assert sheet.mode == "RGB" and "cfg 2.5, top_k 7, top_p 0.9" in sheet.text["Description"]
        assert 3 * CELL < sheet.width < 6 * CELL and 2 * CELL < sheet.height < 3 * CELL
    assert files_below(tmp_path) == ["new/sheet.png"]


def test_generate_repeats_its_image_only_for_the_same_seed_and_options(model, tmp_path):
    def pixels(name, *options):
        run("generate", "-m", model, *REFERENCE, "-o", tmp_path / name, *options)
        with Image.open(tmp_path / name) as image:
            return np.asarray(image)

    first = pixels("a.png", "--seed", 1)
    np.testing.assert_array_equal(first, pixels("b.png", "--seed", 1))
    assert (first != pixels("c.png", "--seed", 2)).any()
    assert (first != pixels("d.png", "--seed", 1, "--cfg", 0)).any()
    assert (first != pixels("e.png", "--seed", 1, "--more-smooth")).any()


def test_generate_into_a_folder_writes_each_image_in_its_size(model, tmp_path):
    run("generate", "-m", model, *REFERENCE, "-l", "T-shirt/top, 9", "-n", 2, "-o", tmp_path / "out")
    names = ["000-t-shirt-top.png", "001-t-shirt-top.png", "002-ankle-boot.png", "003-ankle-boot.png"]
    assert files_below(tmp_path / "out") == names
    with Image.open(tmp_path / "out" / names[0]) as image:
        assert image.size == (SIZE, SIZE) and image.mode == "RGB"


def test_npz_is_what_the_library_generates(model, tmp_path):
    output = tmp_path / "set.npz"
    run("generate", "-m", model, *REFERENCE, "-l", "3,1,4", "--seed", 5, "-o", output)
    pipeline = var.load(path=model, backend="reference")
    expected = pipeline.var.generate(pipeline.vqvae, torch.tensor([3, 1, 4]), cfg=2.5, top_k=7, top_p=0.9,
                                     seeds=batches.image_seeds(5, range(3)))
    with np.load(output) as arrays:
        np.testing.assert_array_equal(arrays["tokens"], expected.tokens)
        np.testing.assert_array_equal(arrays["labels"], [3, 1, 4])
        pixels = ((expected.images.permute(0, 2, 3, 1) + 1) * 127.5).clamp(0, 255)
        # A pixel within a rounding of fp32 of one half may be rounded either way, and is on some processors.
        assert np.abs(arrays["arr_0"].astype(np.float32) - pixels.numpy()).max() <= 0.5 + 1e-3
        assert arrays["arr_0"].dtype == np.uint8
        assert list(arrays)[0] == "arr_0"


def test_several_batches_make_one_set(model, tmp_path):
    run("generate", "-m", model, *REFERENCE, "-l", "all", "--batch-size", 4, "-o", tmp_path / "set.npz")
    with np.load(tmp_path / "set.npz") as arrays:
        assert arrays["arr_0"].shape == (10, SIZE, SIZE, 3) and arrays["labels"].tolist() == list(range(10))
        assert (arrays["tokens"][0] != arrays["tokens"][4]).any()


def test_bf16_gives_nearly_the_same_images(model, tmp_path):
    arrays = []
    for precision in ("fp32", "bf16"):
        # Greedy, so that a rounding changes few tokens; random draws would differ at once.
        run("generate", "-m", model, *REFERENCE, "-l", "0-3", "--top-k", 1, "--precision", precision,
            "-o", tmp_path / f"{precision}.npz")
        with np.load(tmp_path / f"{precision}.npz") as file:
            arrays.append({name: file[name] for name in file})
    assert (arrays[0]["tokens"] == arrays[1]["tokens"]).mean() > 0.9
    assert (arrays[0]["arr_0"] != arrays[1]["arr_0"]).any()


def test_the_embedded_model_is_the_default(model, tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "WEIGHTS", model)
    assert "cfg 2.5" in run("generate", *REFERENCE, "-l", "0", "-o", tmp_path / "a.png")


def test_sampling_takes_options_before_those_of_the_file_and_of_the_paper(model):
    opened = opening.OpenModel("own", None, {"sampling_cfg": "3", "sampling_top_k": "9"})
    assert batches.sampling_for(opened) == batches.Sampling(3.0, 9, 0.96)
    assert batches.sampling_for(opened, cfg=0.0, top_k=0, top_p=None) == batches.Sampling(0.0, 0, 0.96)
    assert batches.sampling_for(opened._replace(name="d16", metadata={})) == batches.Sampling(1.5, 900, 0.96)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("3", [3]), (" 0, 2 ,1", [0, 2, 1]), ("1-3", [1, 2, 3]), ("1 - 2*2", [1, 1, 2, 2]), ("box*3", [0] * 3),
        ("BOX", [0]), ("2-1 cup", [1]), ("all", [0, 1, 2, 3]), ("big*2,", [2, 2]), ("4*4", [3]), ("4*4*2", [3, 3]),
        ("0*0,1", [1]),
    ],
)  # fmt: skip
def test_labels(text, labels):
    assert parse_labels(text, ("Box", "2-1 cup", "big", "4*4")) == labels


def test_count_applies_to_items_without_a_count_of_their_own():
    assert parse_labels("1,0*1", ("a", "b"), count=3) == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [("4", "0-3"), ("-1", "0-3"), ("2-1", "0-3"), ("1-9", "0-3"), ("bocks", "names such as Box"), ("", "at least one"),
     (",", "at least one"), ("1*0", "at least one"), ("1.5", "got '1.5'"), ("4*4*x", "got '4*4*x'")],
)  # fmt: skip
def test_bad_labels(text, message):
    with pytest.raises(ValueError, match="--labels") as error:
        parse_labels(text, ("Box", "cup", "big", "4*4"))
    assert message in str(error.value)


def test_a_batch_fits_into_a_gibibyte():
    d16 = var.PRESETS["d16"][1]
    assert memory.cache_bytes(d16, 2, 4) == 2 * 2 * 680 * 1024 * 16 * 4  # k and v, with and without the class, fp32
    assert batches.default_batch_size(d16) == 6
    assert batches.default_batch_size(VAR_CONFIG) == 100


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-l", "12"), "--labels: expected class numbers in 0-9, got '12'"),
        (("-l", "hat"), "got 'hat'"),
        (("--top-p", "1.5"), "'--top-p'"),
        (("--top-p", "nan"), "top"),
        (("--cfg", "-1"), "'--cfg'"),
        (("--cfg", "inf"), "cfg"),
        (("--top-k", "x"), "'--top-k'"),
        (("--seed", "-1"), "'--seed'"),
        (("--backend", "tpu"), "--backend: expected one of auto, "),
        (("--model", "d99"), "--model: expected one of fashion, d16,"),
        (("--model", "d16"), "--path"),
        (("--model", "d16", "--path", "nowhere"), "expected an existing folder, a file or a Hub id"),
        (("--precision", "fp8"), "--precision: expected fp32 or bf16, got 'fp8'"),
        (("--device", "abacus"), "--device"),
        (("-o", "file.jpg"), "--output: expected a folder or a .png file or a .npz file, got file.jpg"),
        (("--batch-size", "0"), "'--batch-size'"),
        (("--tpo-p", "1"), "--tpo-p"),
        (("surplus",), "surplus"),
    ],
)
def test_generate_refuses_bad_input_in_one_line(model, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused("generate", "-m", model, *REFERENCE, *arguments)
    assert files_below(tmp_path) == []


def test_a_model_without_names_asks_for_labels(tmp_path):
    var.save(tmp_path / "vqvae.safetensors", var.VQVAE(VQVAE_CONFIG))
    var.save(tmp_path / "var.safetensors", var.VAR(dataclasses.replace(VAR_CONFIG, num_classes=30)))
    assert "--labels: expected a list" in refused("generate", "-m", tmp_path, "-o", tmp_path / "a.png")
    assert "got '30'" in refused("generate", "-m", tmp_path, "-l", 30, "-o", tmp_path / "a.png")


@pytest.mark.parametrize("command", ["generate", "reconstruct", "demo", "evaluate"])
def test_an_unwritable_output_is_refused_before_the_work(model, tmp_path, command):
    (tmp_path / "file").touch()
    picture = tmp_path / "picture.png"
    Image.new("RGB", (SIZE, SIZE)).save(picture)
    output = tmp_path / "file" / {"demo": "out", "evaluate": "out.json"}.get(command, "out.png")
    arguments = (picture,) if command == "reconstruct" else ()
    assert "--output: cannot write" in refused(command, *arguments, "-m", model, *REFERENCE, "-o", output)
    assert files_below(tmp_path) == ["file", "picture.png"]


def test_a_full_disk_leaves_nothing_behind(model, tmp_path, monkeypatch):
    def save(image, path, *arguments, **options):
        Path(path).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", save)
    (tmp_path / "sheet.png").write_text("an earlier one")
    message = refused("generate", "-m", model, *REFERENCE, "-l", 0, "-o", tmp_path / "sheet.png")
    assert "No space left on device" in message
    assert files_below(tmp_path) == ["sheet.png"] and (tmp_path / "sheet.png").read_text() == "an earlier one"


def test_too_many_images_for_a_sheet_are_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "_LARGEST_SIDE", 4 * CELL)
    assert ".npz" in refused("generate", "-m", model, *REFERENCE, "-o", tmp_path / "sheet.png")


def test_broken_weights_are_named(model, tmp_path):
    (tmp_path / "var.safetensors").write_bytes((model / "var.safetensors").read_bytes()[:1000])
    (tmp_path / "vqvae.safetensors").write_bytes((model / "vqvae.safetensors").read_bytes())
    assert str(tmp_path / "var.safetensors") in refused("info", "-m", tmp_path)


@pytest.mark.parametrize(
    "error", [RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), MemoryError()]
)
def test_out_of_memory_advises_a_smaller_batch(model, tmp_path, monkeypatch, error):
    monkeypatch.setattr(batches, "generate_batches", _raising(error))
    assert "--batch-size" in refused("generate", "-m", model, "-o", tmp_path / "a.png")


def test_a_fault_of_the_program_keeps_its_traceback(model, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "generate_batches", _raising(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        run("generate", "-m", model, "-o", tmp_path / "a.png")


def test_traceback_shows_where_an_error_comes_from(model):
    with pytest.raises(ValueError, match="--labels"):
        run("--traceback", "generate", "-m", model, "-l", 99)


def test_interruption_exits_with_130_and_leaves_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "generate_batches", _raising(KeyboardInterrupt()))
    assert run("generate", "-m", model, "-o", tmp_path / "a.npz", status=130) == "interrupted\n"
    assert files_below(tmp_path) == []


def _raising(error):
    def raise_it(*arguments, **options):
        raise error
        yield

    return raise_it


# ----------------------------------------------------------------------------------------------- reconstruct, info


def test_reconstruct_puts_originals_above_reconstructions(model, tmp_path):
    names = [tmp_path / "one.png", tmp_path / "two.png"]
    for name, colour in zip(names, ("red", "blue"), strict=True):
        Image.new("RGB", (SIZE, SIZE), colour).save(name)
    arguments = [*names, "-m", model, *REFERENCE, "-o", tmp_path / "pairs.png"]
    result = invoke("reconstruct", *arguments)
    assert result.exit_code == 0 and result.stdout.count("PSNR") == 2 and result.stderr == ""
    with Image.open(tmp_path / "pairs.png") as sheet:
        colours = [colour for _, colour in sheet.getcolors(1 << 20)]
        assert {(255, 0, 0), (0, 0, 255)} <= set(colours) and sheet.width < 5 * CELL and sheet.height < 3 * CELL


def test_reconstruct_fits_images_and_says_so(model, tmp_path):
    (tmp_path / "other").mkdir()
    Image.new("RGBA", (100, 64)).save(tmp_path / "same.png")
    Image.new("L", (SIZE // 2, SIZE // 2)).save(tmp_path / "other" / "same.png")
    Image.new("RGB", (SIZE, 2 * SIZE)).save(tmp_path / "tall.jpg")
    files = [tmp_path / name for name in ("same.png", "other/same.png", "tall.jpg")]
    result = invoke("reconstruct", *files, "-m", model, "-o", tmp_path / "out", *REFERENCE)
    assert result.exit_code == 0, result.output
    notes = result.stderr.splitlines()
    assert "100×64 pixels, resized to 50×32 and cropped to its central 32×32" in notes[0]
    assert "16×16 pixels, resized to 32×32 for" in notes[1] and "32×64 pixels, cropped" in notes[2]
    expected = ["same-2-reconstruction.png", "same-reconstruction.png", "tall-reconstruction.png"]
    assert files_below(tmp_path / "out") == expected


def test_many_images_are_reconstructed_in_rows(model, tmp_path):
    for number in range(12):
        Image.new("RGB", (SIZE, SIZE)).save(tmp_path / f"{number}.png")
    run("reconstruct", *sorted(tmp_path.iterdir()), "-m", model, *REFERENCE, "-o", tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width < 4 * CELL and sheet.height > 12 * CELL


@pytest.mark.parametrize("content", [b"no picture", b"", "truncated"])
def test_a_broken_image_is_named(model, tmp_path, content):
    file = tmp_path / "broken.png"
    noise = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[:-500] if content == "truncated" else content)
    message = refused("reconstruct", file, "-m", model, *REFERENCE, "-o", tmp_path / "a.png")
    assert f"{file}: not a readable image" in message
    assert files_below(tmp_path) == ["broken.png"]


def test_a_missing_image_and_a_decompression_bomb_are_refused(model, tmp_path, monkeypatch):
    assert "does not exist" in refused("reconstruct", tmp_path / "nothing.png", "-m", model)
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert "not a readable image" in refused("reconstruct", tmp_path / "a.png", "-m", model, "-o", tmp_path / "b.png")


def test_info_shows_configuration_schedule_and_metadata(model):
    text = run("info", "-m", model)
    assert "69 tokens per image" in text and "9 Ankle boot" in text
    assert "sampling_cfg: 2.5" in text and "data: none" in text
    parameters = [parameter for network in var.load(path=model) for parameter in network.parameters()]
    assert f"{sum(parameter.numel() for parameter in parameters):,}" in text


def test_info_describes_released_models_without_weights():
    text = run("info", "-m", "d30")
    assert "680 tokens per image" in text and "1920" in text and "described without its weights" in text
    assert "packed weights of a generator" in text and "working memory of one image" in text


# ------------------------------------------------------------------------------------------------------------ demo


def test_demo_writes_pictures_and_compares(model, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "_OP_SECONDS", 0.0)
    monkeypatch.setattr(demo, "_ROUNDS", 1)
    write_fashion_mnist(tmp_path / "data")
    text = run("demo", "-m", model, "-o", tmp_path / "out", "-d", tmp_path / "data", "-n", 2)
    names = ["coarse-to-fine.png", "grid.png", "reconstructions.png"]
    assert files_below(tmp_path / "out") == names
    for name in names:
        assert str(tmp_path / "out" / name) in text
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.height > 10 * CELL and 2 * CELL < grid.width < 4 * CELL
    tokens = 10 * VAR_CONFIG.schedule.length
    assert f"{tokens} of {tokens}" in text  # both backends draw the same tokens
    for op in ("block_causal_attention", "adaln_layer_norm", "gated_residual_adaln", "nearest_code", "quantize"):
        assert op in text


def test_demo_without_data_says_how_to_get_it(model, tmp_path, monkeypatch):
    monkeypatch.setattr("var.data.fashion_mnist._IDX_SEARCH_PATH", (tmp_path / "nowhere",))
    for name in ("_print_generation", "_print_ops"):
        monkeypatch.setattr(demo, name, lambda *arguments: None)
    result = invoke("demo", "-m", model, *REFERENCE, "-o", tmp_path, "-n", 1)
    assert result.exit_code == 0 and files_below(tmp_path) == ["coarse-to-fine.png", "grid.png"]
    assert "apt-get" in result.stderr and result.stderr.count("\n") == 1
    unusable = ("-d", model, "-o", tmp_path / "b")
    assert f"{model}: no class directories" in refused("demo", "-m", model, *REFERENCE, *unusable)
    assert files_below(tmp_path / "b") == []
