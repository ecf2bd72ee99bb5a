"""Numbers in --labels: places in the list of classes or, where all classes have numbers as names, these names."""

import dataclasses

import numpy as np
import pytest
import torch

import var
from tests.helpers.cli import REFERENCE, refused, run
from tests.helpers.training import VAR_CONFIG, VQVAE_CONFIG
from var.cli import evaluate
from var.cli.labels import parse_labels

FOLDERS = ("0", "1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9")  # twelve folders in the order of their text


@pytest.mark.parametrize(
    ("text", "names"),
    [("10-11", "10 11"), ("8", "8"), ("8-9", "8 9"), ("8-11", "8 9 10 11"), ("9-10*2", "9 9 10 10"), ("all", "all"),
     ("010", "10"), ("2,0-1", "2 0 1")],
)  # fmt: skip
def test_a_range_of_numbers_means_names_where_all_names_are_numbers(text, names):
    expected = FOLDERS if names == "all" else names.split()
    assert [FOLDERS[label] for label in parse_labels(text, FOLDERS)] == list(expected)


@pytest.mark.parametrize("text", ["12", "0-12", "-1", "11-10", "cat", "1.5"])
def test_a_number_that_is_no_name_is_refused_with_the_names(text):
    with pytest.raises(ValueError, match="among the names of the classes, which are 0, 1, 2, .*, 10, 11, got") as error:
        parse_labels(text, FOLDERS)
    assert f"got {text!r}" in str(error.value)


def test_names_that_are_numbers_may_have_gaps_signs_and_zeros():
    names = ("-1", "007", "20", "30")
    assert parse_labels("-1-20", names) == [0, 1, 2]
    assert parse_labels("7,30", names) == [1, 3]
    with pytest.raises(ValueError, match="names of the classes"):
        parse_labels("0", names)  # the place of "-1", but the name of no class
    with pytest.raises(ValueError, match="may mean '1' .*'01'"):
        parse_labels("001", ("1", "01"))


def test_a_range_is_refused_where_some_of_its_numbers_are_names_of_other_classes():
    names = ("1", "0", "cat", "dog")
    assert parse_labels("0,1,2-3,cat", names) == [1, 0, 2, 3, 2]
    with pytest.raises(ValueError, match=r"one by one.*got '0-1'"):
        parse_labels("0-1", names)
    assert parse_labels("0-2", ("0", "1", "cat")) == [0, 1, 2]  # the same by place and by name


def test_names_that_differ_in_case_only_are_two_classes():
    names = ("Bag", "bag", "box")
    assert parse_labels("bag,Bag,BOX", names) == [1, 0, 2]
    with pytest.raises(ValueError, match=r"got 'BAG', which may mean 'Bag' \(number 0\), 'bag' \(number 1\)"):
        parse_labels("BAG", names)


@pytest.mark.parametrize("text", ["0*999999999999999999", "0-1*6000000", "0*9000000,1*9000000"])
def test_a_list_that_would_fill_the_memory_is_refused(text):
    with pytest.raises(ValueError, match="--labels: expected at most 10,000,000 images"):
        parse_labels(text, ("a", "b"))
    with pytest.raises(ValueError, match="--labels: expected at most 10,000,000 images"):
        parse_labels("all", ("a", "b"), count=10**30)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """An untrained model of twelve classes with numbers as names."""
    folder = tmp_path_factory.mktemp("numbered")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = var.VAR(dataclasses.replace(VAR_CONFIG, num_classes=12, class_names=FOLDERS))
        transformer.init_weights()
        var.save(folder / "vqvae.safetensors", var.VQVAE(VQVAE_CONFIG))
        var.save(folder / "var.safetensors", transformer)
    return folder


def test_generate_takes_the_folders_10_and_11_and_not_the_classes_at_these_places(numbered, tmp_path):
    run("generate", "-m", numbered, *REFERENCE, "-l", "10-11", "-o", tmp_path / "set.npz")
    with np.load(tmp_path / "set.npz") as arrays:
        assert arrays["labels"].tolist() == [2, 3]
    message = refused("generate", "-m", numbered, *REFERENCE, "-l", "12", "-o", tmp_path / "a.png")
    assert "names of the classes" in message


def test_info_shows_no_places_beside_names_that_are_numbers(numbered):
    assert f"classes: {', '.join(FOLDERS)}\n" in run("info", "-m", numbered)


class Data:
    name = "folder"
    class_names = tuple(map(str, range(12)))


def test_evaluate_matches_the_classes_of_the_data_by_name(capsys):
    def generate(labels, seeds):
        return [FOLDERS[label] for label in labels]

    labels = torch.arange(12)
    assert evaluate._with_labels_of(Data, generate, FOLDERS)(labels, None) == list(Data.class_names)
    for names in ((), Data.class_names):
        assert evaluate._with_labels_of(Data, generate, names) is generate
    assert evaluate._with_labels_of(Data, generate, tuple("abcdefghijkl")) is generate
    assert "have other names than those of the model" in capsys.readouterr().err
