"""Estimators side by side: what each is worth on one batch, and in the same training time."""

from .batch import compare
from .chosen import ESTIMATORS
from .gradients import parameter_groups
from .training import compare_training

__all__ = ["ESTIMATORS", "compare", "compare_training", "parameter_groups"]
