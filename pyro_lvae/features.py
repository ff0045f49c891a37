"""A latent structure as an estimator in scikit-learn's convention: features, and the log-density of rows."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pyro.distributions as dist
import torch
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from .bayes import BayesianWeights
from .callbacks import Callback
from .conditionals import Normal
from .contract import check
from .data import Dataset
from .evaluate import encode, log_likelihood
from .evaluate.chunks import MEMORY, cost_of
from .evaluate.samples import expected
from .optim import FusedAdam
from .results import EpochMetrics
from .structures import LadderVAE
from .traces import data_frame, evaluating, fixed_noise, generate, guide_sites
from .train import Beta, fit


def small_ladder(x_dim: int) -> LadderVAE:
    """The default structure: two layers of 8 and 4 units, Normal likelihood of standard deviation above 0.03."""
    return LadderVAE(x_dim, (8, 4), (64, 32), likelihood=partial(Normal, min_variance=1e-3))


class LatentFeatures(TransformerMixin, BaseEstimator):
    r"""Posterior means of a latent structure as features, and log p(x), as a scikit-learn estimator.

        transform(x)      = E_q[z_i | x] of the layers chosen, side by side
        score_samples(x)  = log 1/K sum_k p(x, z_k) / q(z_k | x) - sum_d log s_d,  nats

    Columns are standardised, x -> (x - m) / s, by the training data; the second term makes the log-density that of x
    itself. Weights are trained in float32 and evaluated in float64. Every row meets the same noise, so that its
    features and score do not depend on the rows beside it (guides of Normal draws; others repeat only as a whole). The
    scores share their Monte Carlo error in part: it cancels between rows, and stays in their mean.

    Args:
        structure: makes an untrained structure from the number of columns; `small_ladder` if left out. Of
            `BayesianWeights`, the mean of the trained weights is used.
        layers: sites that `transform` returns, such as `("z2",)` or `"z2"`; all of them if left out, z1 first.
        epochs: passes over the training rows.
        batch_size: rows a step.
        learning_rate: of Adam.
        estimator: the bound that is maximised; as `fit` chooses if left out.
        beta: KL weight, as of `fit`.
        validation_fraction: part of the rows that are held out, by whose ELBO (at beta = 1) the epoch is chosen whose
            weights are kept; with 0, the last.
        standardize: whether columns are standardised; `False` for binary ones.
        num_draws: draws of z behind a posterior mean.
        num_samples: K, importance samples of log p(x).
        random_state: int, numpy `RandomState` or `None`: of weights, batches and noise. Torch's own state stays.
        device: where to train and evaluate, such as "cuda".

    Attributes:
        structure_: the trained structure.
        scaler_: the `StandardScaler`, or `None`.
        layers_: {site: shape of a draw} of what `transform` returns.
        history_: metrics of every epoch, of standardised data.
        best_epoch_: the epoch whose weights are kept.
        n_features_in_: number of columns; `feature_names_in_` where they have names.

    >>> x = np.random.default_rng(0).normal(size=(50, 3))
    >>> LatentFeatures(epochs=2, layers="z2", random_state=0).fit(x).transform(x).shape
    (50, 4)
    """

    def __init__(
        self,
        structure: Callable[[int], nn.Module] | None = None,
        *,
        layers: str | Sequence[str] | None = None,
        epochs: int = 200,
        batch_size: int = 64,
        learning_rate: float = 2e-3,
        estimator: ELBO | None = None,
        beta: Beta = 1.0,
        validation_fraction: float = 0.1,
        standardize: bool = True,
        num_draws: int = 100,
        num_samples: int = 500,
        random_state: int | np.random.RandomState | None = None,
        device: str | None = None,
    ):
        self.structure = structure
        self.layers = layers
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.estimator = estimator
        self.beta = beta
        self.validation_fraction = validation_fraction
        self.standardize = standardize
        self.num_draws = num_draws
        self.num_samples = num_samples
        self.random_state = random_state
        self.device = device

    def fit(self, X, y=None) -> LatentFeatures:
        """Train on rows `[N, D]`; `y` is ignored.

        Raises:
            ValueError: an argument is out of range, `layers` names a site that is none, or the structure breaks a rule.
        """
        X = validate_data(self, X, dtype=[np.float64, np.float32], ensure_min_samples=2)
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction is {self.validation_fraction}; it must be at least 0 and below 1")
        self.seed_ = int(check_random_state(self.random_state).randint(2**31))
        self.scaler_ = StandardScaler().fit(X.astype(np.float64)) if self.standardize else None
        with fixed_noise(torch.device(self.device or "cpu"), self.seed_):
            structure, data = self._untrained(X.shape[1]), self._split(self._standardized(X).float())
            check(structure, data.x_train)
            self.layers_ = self._chosen_layers(structure, data.x_train[:1])
            self._train(structure, data)
        structure = structure.mean() if isinstance(structure, BayesianWeights) else structure
        self.structure_ = structure.double().eval()
        return self

    def _untrained(self, x_dim: int) -> nn.Module:
        if isinstance(self.structure, nn.Module):
            name = type(self.structure).__name__
            raise ValueError(f"structure is a {name}; give what makes one: lambda x_dim: {name}(x_dim, ...)")
        return (small_ladder if self.structure is None else self.structure)(x_dim)

    def _train(self, structure: nn.Module, data: Dataset) -> None:
        best = _Best(structure)
        self.history_ = fit(
            structure,
            data,
            self.estimator,
            epochs=self.epochs,
            batch_size=self.batch_size,
            beta=self.beta,
            optimizer=partial(FusedAdam, lr=self.learning_rate),
            monitor_size=len(data.x_test),
            device=self.device,
            compile=False,  # which the clock decides, and so not the same twice
            callbacks=[best] if self.validation_fraction else (),
        )
        self.best_epoch_ = best.restore() or self.epochs

    def transform(self, X) -> np.ndarray:
        """E_q[z | x] of the layers chosen, side by side: `[N, units]`, in the dtype of X."""
        X, x = self._read(X)
        codes = self._evaluate(encode, x, self.num_draws)
        return torch.cat([codes[name] for name in self.layers_], 1).cpu().numpy().astype(X.dtype)

    def inverse_transform(self, X) -> np.ndarray:
        """E[x | z] at features `[N, units]` of the layers chosen; other layers take their means: `[N, D]`."""
        check_is_fitted(self)
        X = check_array(X, dtype=[np.float64, np.float32])
        if X.shape[1] != self._n_features_out:
            raise ValueError(
                f"X has {X.shape[1]} columns; the features are the {self._n_features_out} of {self.layers_}"
            )
        z = torch.as_tensor(X, dtype=torch.double, device=self._device)
        parts = z.split([shape.numel() for shape in self.layers_.values()], 1)
        latents = {name: z.reshape(-1, *shape) for z, (name, shape) in zip(parts, self.layers_.items(), strict=True)}
        with evaluating(self.structure_), fixed_noise(z.device, self.seed_):
            sites = generate(self.structure_, z.new_zeros(len(z), self.n_features_in_), latents, mean=True)
        x = expected(sites["x"][0]).cpu().numpy()
        return (x if self.scaler_ is None else self.scaler_.inverse_transform(x)).astype(X.dtype)

    def score_samples(self, X) -> np.ndarray:
        """log p(x) of every row by importance sampling, nats, in the units of X: `[N]`."""
        _, x = self._read(X)
        log_p = self._evaluate(partial(log_likelihood, compile=False), x, self.num_samples).cpu().numpy()
        return log_p if self.scaler_ is None else log_p - np.log(self.scaler_.scale_).sum()

    def score(self, X, y=None) -> float:
        """Mean log p(x) of the rows, nats; `y` is ignored."""
        return float(self.score_samples(X).mean())

    def get_feature_names_out(self, input_features=None) -> np.ndarray:
        """z1_0, z1_1 ... by site and unit, whatever the columns of the input are called."""
        check_is_fitted(self)
        return np.array([f"{n}_{i}" for n, shape in self.layers_.items() for i in range(shape.numel())], dtype=object)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    @property
    def _n_features_out(self) -> int:
        return sum(shape.numel() for shape in self.layers_.values())

    @property
    def _device(self) -> torch.device:
        return next(self.structure_.parameters()).device

    def _read(self, X) -> tuple[np.ndarray, Tensor]:
        """Rows as they came, and as the structure takes them."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        return X, self._standardized(X)

    def _standardized(self, X: np.ndarray) -> Tensor:
        X = X.astype(np.float64)
        return torch.as_tensor(X if self.scaler_ is None else self.scaler_.transform(X))

    def _split(self, x: Tensor) -> Dataset:
        """Training rows and held-out ones; a few of the former stand for the latter where none are held out."""
        count = round(self.validation_fraction * len(x))
        count = min(max(1, count), len(x) - 2) if self.validation_fraction else 0
        order = torch.randperm(len(x))
        train, held_out = x[order[count:]], x[order[:count]]
        return Dataset("rows", train, held_out if count else train[:1])

    def _chosen_layers(self, structure: nn.Module, x: Tensor) -> dict[str, torch.Size]:
        names = list(encode(structure, x, 1))  # z1 first
        wanted = names if self.layers is None else [self.layers] if isinstance(self.layers, str) else self.layers
        if not wanted or not set(wanted) <= set(names):
            raise ValueError(f"layers is {self.layers!r}; expected some of {names}")
        with evaluating(structure):
            sites = guide_sites(structure, x)
        return {name: sites[name][1].shape[1:] for name in wanted}

    def _evaluate(self, function: Callable, x: Tensor, num_draws: int):
        """`function(structure, x, num_draws)` with the same noise for every row."""
        x = x.to(self._device)
        with evaluating(self.structure_), fixed_noise(x.device, self.seed_), _SameNoise(self.seed_):
            # the draws of a row stay together: parts of them would meet the same noise
            memory = max(MEMORY, cost_of(self.structure_, x, None)(1, num_draws))
            return function(self.structure_, x, num_draws, memory=memory)


class _SameNoise(Messenger):
    """Normal draws of a guide take the same standard noise in every row of the data, and whenever they are repeated."""

    def __init__(self, seed: int):
        super().__init__()
        self.seed = seed

    def _pyro_sample(self, msg: dict) -> None:
        fn, base = msg["fn"], getattr(msg["fn"], "base_dist", msg["fn"])
        if msg["done"] or msg["is_observed"] or data_frame(msg) is None or not isinstance(base, dist.Normal):
            return
        shape = (*fn.batch_shape[:-1], 1, *fn.event_shape)
        generator = torch.Generator().manual_seed(self.seed ^ zlib.crc32(msg["name"].encode()))
        noise = torch.randn(shape, generator=generator, dtype=base.loc.dtype).to(base.loc.device)
        msg["value"], msg["done"] = base.loc + base.scale * noise, True


class _Best(Callback):
    """Keeps the weights of the epoch with the best ELBO of held-out rows."""

    def __init__(self, structure: nn.Module):
        self.structure, self.elbo, self.epoch, self.weights = structure, -math.inf, None, {}

    def on_epoch(self, metrics: EpochMetrics) -> None:
        if metrics.test_elbo > self.elbo:
            self.elbo, self.epoch = metrics.test_elbo, metrics.epoch
            self.weights = {name: tensor.clone() for name, tensor in self.structure.state_dict().items()}

    def restore(self) -> int | None:
        """Put them back; the epoch that they are of, if there is one."""
        if self.epoch is not None:
            self.structure.load_state_dict(self.weights)
        return self.epoch
