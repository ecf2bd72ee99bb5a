"""Data sets of images by class, and pictures to look at."""

from .datasets import DataError, FashionMNIST, ImageData, ImageFolder, open_dataset

__all__ = ["DataError", "FashionMNIST", "ImageData", "ImageFolder", "open_dataset"]
