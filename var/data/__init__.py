"""Images in and out: data sets by class, and pictures for people."""

from .datasets import DataError, FashionMNIST, ImageData, ImageFolder, open_dataset

__all__ = ["DataError", "FashionMNIST", "ImageData", "ImageFolder", "open_dataset"]
