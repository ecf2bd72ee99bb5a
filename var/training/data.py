"""Opens the data set of a training and divides it into images to train on and images that are held out."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..data.datasets import open_dataset
from ..data.interface import ImageData, check_batch_size, split_indices


class TrainingData(NamedTuple):
    """A data set, and the indices of both of its parts."""

    data: ImageData
    train: Tensor
    held_out: Tensor


def open_training_data(options: Any, image_size: int) -> tuple[TrainingData, Any]:
    """The data set of `options` (of either training), and the options with the numbers that depend on its size.

    Raises DataError for unusable data, and for a number of images that the data set does not have, before any work.
    """
    data = open_dataset(
        options.data, "train", image_size, random_crop=options.random_crop, flip=options.flip,
        skip_broken=options.skip_broken,
    )
    options = options.fitted(len(data))
    train, held_out = split_indices(len(data), options.val_images, "val_images")
    check_batch_size(options.batch_size, len(train))
    return TrainingData(data, train, held_out), options
