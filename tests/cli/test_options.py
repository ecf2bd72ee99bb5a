"""Values of options that no command can take: one line says so, whatever the type and the size of the number."""

import json

import pytest

from tests.helpers.cli import REFERENCE, files_below, refused, save_model
from tests.helpers.training import write_image_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_image_folder(folder, {"cats": 8, "dogs": 8})
    return folder


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--top-k", "1.5"), ("--top-k", 10**20), ("--top-k", "-1"), ("--cfg", "nan"), ("--cfg", "-inf"),
        ("--top-p", "nan"), ("--seed", 2**32), ("--seed", "-1"), ("--seed", "1.5"), ("--number", "0"),
        ("--number", "-3"), ("--batch-size", "-1"), ("--batch-size", 10**30), ("--device", "meta"),
        ("--device", ""), ("--device", "0"),
    ],
)  # fmt: skip
def test_generate_refuses_numbers_that_it_cannot_take(model, tmp_path, option, value):
    assert option in refused("generate", "-m", model, *REFERENCE, option, value, "-o", tmp_path / "a.png")
    assert files_below(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--cfg", "1e308"), "too large"), (("-n", 10**15), "at most 10,000,000 images"), (("--path", "/"), "--model")],
)
def test_generate_refuses_what_fails_later_in_one_line_as_well(model, tmp_path, arguments, message):
    assert message in refused("generate", "-m", model, *REFERENCE, "-l", "0", *arguments, "-o", tmp_path / "a.png")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--lr", "nan"), ("--min-lr", "inf"), ("--weight-decay", "-1"), ("--beta1", "2"),
        ("--checkpoint-minutes", "-1"), ("--max-minutes", "nan"), ("--val-every", "-1"), ("--seed", 2**70),
        ("--vocab-size", 10**25),
        ("--ch-mult", f"1,{10**25}"), ("--phi-ratio", "2"), ("--beta", "nan"), ("--l1-weight", "-1"),
        ("--vq-weight", "inf"), ("--init-images", "0"), ("--restart-every", "0"), ("--restart-until", "nan"),
        ("--restart-threshold", "-1"), ("--ema-decay", "nan"), ("--grad-clip", "nan"),
    ],
)  # fmt: skip
def test_the_training_of_the_tokenizer_refuses_numbers_that_it_cannot_take(data, tmp_path, option, value):
    assert option in refused("train-tokenizer", "-d", data, *REFERENCE, option, value, "-o", tmp_path / "run")
    assert files_below(tmp_path) == []


@pytest.mark.parametrize(("option", "value"), [("--patch-nums", f"3,{10**12}"), ("--vocab-size", 10**18)])
def test_sizes_of_a_network_that_no_memory_holds_are_one_line(data, tmp_path, option, value):
    arguments = ("-d", data, *REFERENCE, option, value, "-o", tmp_path / "run", "--val-images", 2)
    message = refused("train-tokenizer", *arguments)
    assert "too large" in message or "out of memory" in message


@pytest.mark.parametrize(
    ("option", "value"),
    [("--encode-batch", "0"), ("--mlp-ratio", "1e30"), ("--mlp-ratio", "nan"), ("--label-dropout", "nan")],
)
def test_the_training_of_the_transformer_refuses_numbers_that_it_cannot_take(model, data, tmp_path, option, value):
    assert option in refused("train", "-t", model, "-d", data, *REFERENCE, option, value, "-o", tmp_path / "run")


@pytest.mark.parametrize(("option", "value"), [("--epochs", "nan"), ("--images", 10**12), ("--held-out", "-1")])
def test_evaluate_refuses_numbers_that_it_cannot_take(model, data, tmp_path, option, value):
    assert option in refused("evaluate", "-m", model, "-d", data, *REFERENCE, option, value, "-o", tmp_path / "q.json")


@pytest.mark.parametrize("text", [b"\xff\xfe", b'{"step": "x"}\n[1]\n3', b"", b"[]"])
def test_a_log_without_numbers_is_refused(tmp_path, text):
    (tmp_path / "log.jsonl").write_bytes(text)
    assert "log.jsonl: expected the log of a training" in refused("plot", tmp_path, "-o", tmp_path / "a.png")


def test_a_log_with_other_values_among_the_numbers_is_drawn(tmp_path):
    from var.cli import curves

    lines = [{"step": 1, "loss": None, "note": "x"}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 1.0}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert curves._read(tmp_path)[0] == {"step": 1}
