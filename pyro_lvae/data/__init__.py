"""Named data sets and files of the user's own, as tensors that live on the training device."""

from .dataset import DataError, Dataset
from .labels import check_labels, few_labels
from .sources import DATASETS, load

__all__ = ["DATASETS", "DataError", "Dataset", "check_labels", "few_labels", "load"]
