"""Named data sets and files of the user's own, as tensors that live on the training device."""

from .dataset import DataError, Dataset
from .labels import few_labels
from .sources import DATASETS, load

__all__ = ["DATASETS", "DataError", "Dataset", "few_labels", "load"]
