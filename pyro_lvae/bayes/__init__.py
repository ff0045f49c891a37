"""Posteriors over weights: `BayesianWeights` around any structure, its priors, posteriors and gradient noise."""

from .baselines import SWAG, laplace
from .posteriors import POSTERIORS
from .priors import PRIORS
from .weights import PREFIX, BayesianWeights, chosen_parameters, generative

__all__ = ["POSTERIORS", "PREFIX", "PRIORS", "SWAG", "BayesianWeights", "chosen_parameters", "generative", "laplace"]
