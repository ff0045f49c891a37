"""Tensor -> Distribution: modules whose forward returns a Pyro distribution with event dims declared.

A *likelihood* is any callable `(in_dim, x_dim) -> nn.Module` whose result maps features
`[..., in_dim]` to a distribution over `x` with `batch_shape` `[...]` and `event_shape` `[x_dim]`.
The classes here are such callables, `functools.partial(Normal, scale=0.1)` is one, and so is any
class of your own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .nets import BatchNorm, linear

MAX_DF = 100.0  # of a learned t: it is Gaussian to within a percent, and float32 still takes its normaliser exactly


class Bernoulli(nn.Module):
    """Binary data: h -> B(x | sigmoid(W h + b)), by logits, which cannot saturate.

    Args:
        in_dim: size of the features `[..., in_dim]`.
        out_dim: number of binary variables D; log-densities are nats per datum, summed over D.
        grey: admit values between 0 and 1, scored by the cross-entropy x log p + (1 - x) log(1 - p), as many
            papers do: the mean log-probability of binary images drawn from x, and no density of grey values.
        mean: of the training data, a number or `[D]`, about where p starts: b = logit(mean), held within .001 and
            .999, as in the code of Burda et al. (2016). A deep model that starts elsewhere may keep a single active
            unit in its upper layers for long.

    Raises:
        ValueError: the mean is of another size, or leaves [0, 1].
    """

    def __init__(self, in_dim: int, out_dim: int, *, grey: bool = False, mean: float | Tensor | None = None):
        super().__init__()
        self.logits = linear(in_dim, out_dim)
        if mean is not None:
            self._start_at(torch.as_tensor(mean, dtype=torch.get_default_dtype()))
        self.grey = grey

    def _start_at(self, mean: Tensor) -> None:
        if mean.shape not in ((), self.logits.bias.shape) or not ((mean >= 0) & (mean <= 1)).all():
            raise ValueError(
                f"mean is {list(mean.shape)} from {mean.min():g} to {mean.max():g}; expected a number or "
                f"{list(self.logits.bias.shape)}, the mean of each entry of binary data, within [0, 1]"
            )
        with torch.no_grad():
            self.logits.bias.copy_(mean.clamp(1e-3, 1 - 1e-3).logit())

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        return (_Grey if self.grey else dist.Bernoulli)(logits=self.logits(h)).to_event(1)


class _Grey(dist.Bernoulli):
    support = dist.constraints.unit_interval


class Normal(nn.Module):
    r"""Real data: h -> N(mu(h), sigma^2(h)), or with a fixed scale.

        mu = linear(h),  sigma^2 = softplus(linear(h)) + min_variance

    The heads of Sonderby et al. 2016 (eqs. 5-7). Their floor of 1e-5 entered the log-densities
    only; here it is part of the variance, in the precision merge too.

    Args:
        in_dim: size of the features `[..., in_dim]`.
        out_dim: size of the variable; log-densities are nats per datum, summed over it.
        scale: a fixed standard deviation, in the units of the variable; `None` learns sigma^2(h).
        heteroscedastic: a learned sigma^2 depends on h; with `False` each entry has one for all data.
        batch_norm: normalise both heads before the softplus, as the ladder paper's recipe does.
        gain: of the initial weights.
        min_variance: floor of the learned variance. As a likelihood of data on a grid (grey
            values), give the grid's spacing squared or more: a density has no upper bound.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        scale: float | None = None,
        heteroscedastic: bool = True,
        batch_norm: bool = False,
        gain: float = 1.0,
        min_variance: float = 1e-5,
    ):
        super().__init__()
        if scale is not None and not scale > 0:
            raise ValueError(f"scale is {scale}; a fixed standard deviation must be positive")
        heads = 2 if scale is None and heteroscedastic else 1
        self.head = nn.Sequential(linear(in_dim, heads * out_dim, bias=not batch_norm, gain=gain))
        if batch_norm:
            self.head.append(BatchNorm(heads * out_dim))
        elif heads == 2:
            nn.init.ones_(self.head[0].bias[out_dim:])
        self.entry_variance = nn.Parameter(torch.ones(out_dim)) if scale is None and not heteroscedastic else None
        self.min_variance = min_variance
        self.register_buffer("scale", None if scale is None else torch.tensor(float(scale)))

    def moments(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance, each `[..., out_dim]`."""
        if self.scale is not None:
            mu = self.head(h)
            return mu, (self.scale**2).expand_as(mu)
        if self.entry_variance is not None:
            mu = self.head(h)
            return mu, (F.softplus(self.entry_variance) + self.min_variance).expand_as(mu)
        mu, raw = self.head(h).chunk(2, dim=-1)
        return mu, F.softplus(raw) + self.min_variance

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        return normal(*self.moments(h))


class Point(nn.Module):
    """A point mass: h -> delta(W h + b), the code of an autoencoder; its log-density counts as 0.

    Args:
        in_dim: size of the features `[..., in_dim]`.
        out_dim: size of the variable.
    """

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.point = linear(in_dim, out_dim)

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        return dist.Delta(self.point(h)).to_event(1)


@contextmanager
def label_errors(y: Tensor, num_classes: int, remedy: str, called: str = "num_classes") -> Iterator[None]:
    """What looks labels up within it fails with a `ValueError` that says which label is out of range.

    (On CUDA it is looked for while Pyro validates; one met later would end the process.)
    """

    def wrong() -> Tensor:
        return y[(y < 0) | (y >= num_classes)]

    try:
        if y.is_cuda and dist.is_validation_enabled() and len(wrong()):
            raise RuntimeError
        yield
    except (IndexError, RuntimeError) as error:
        if not len(wrong()):
            raise
        message = f"a label is {wrong()[0]}; {called}={num_classes} takes 0 to {num_classes - 1}{remedy}"
        raise ValueError(message) from error


def one_hot(y: Tensor, num_classes: int, like: Tensor, remedy: str) -> Tensor:
    """Labels `[...]` as `[..., num_classes]` in the dtype of `like`; `ValueError` as by `label_errors`."""
    y = y.long()
    with label_errors(y, num_classes, remedy):
        return F.one_hot(y, num_classes).to(like)


def is_point(fn: dist.TorchDistribution) -> bool:
    """Whether a distribution is a point mass."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)


class GaussianMixture(nn.Module):
    r"""A mixture without inputs, the prior of a latent layer: () -> sum_c pi_c N(mu_c, diag(sigma^2_c)).

        pi = softmax(w),  sigma^2_c = exp(s_c) + min_variance

    Args:
        size: size of the variable.
        num_components: C.
        spread: standard deviation of the means at first.
        min_variance: floor of the variances.

    Attributes:
        logits: w, `[C]`; `loc`: mu, `[C, size]`; `log_variance`: s, `[C, size]`.
    """

    def __init__(self, size: int, num_components: int = 10, *, spread: float = 1.0, min_variance: float = 1e-5):
        super().__init__()
        if num_components < 1:
            raise ValueError(f"num_components is {num_components}; a mixture has at least 1")
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.loc = nn.Parameter(spread * torch.randn(num_components, size))
        self.log_variance = nn.Parameter(torch.zeros(num_components, size))
        self.min_variance = min_variance

    def forward(self) -> dist.TorchDistribution:
        return mixture(self.logits, normal(self.loc, self.log_variance.exp() + self.min_variance))

    def component(self, c: Tensor) -> dist.TorchDistribution:
        """N(mu_c, diag(sigma^2_c)) of the numbers c, `[...]`."""
        c = c.long()
        with label_errors(c, len(self.logits), "; count clusters from 0", "num_clusters"):
            loc, log_variance = F.embedding(c, self.loc), F.embedding(c, self.log_variance)
        return normal(loc, log_variance.exp() + self.min_variance)


class _Mixture(dist.MixtureSameFamily):
    _before_expansion = None

    @property
    def support(self):  # torch's own constraint of mixtures has no bijection, which annealing asks for
        return self.component_distribution.support

    def expand(self, batch_shape, _instance=None):  # as a plate does
        wider = super().expand(batch_shape, _instance)
        wider._before_expansion = self._before_expansion or self
        return wider

    def log_prob(self, value: Tensor) -> Tensor:
        """As torch's; for one set of C diagonal normals by matrix products, without the tensor `[..., C, D]`.

            sum_d w_cd (z_d - mu_cd)^2 = sum_d w_cd z_d^2 - 2 w_cd mu_cd z_d + w_cd mu_cd^2,  w_cd = sigma_cd^-2

        Where the sigmas are small this is a small difference of large terms, so it is taken in float64, and values in
        float64 go torch's way.
        """
        one = self._before_expansion or self
        q = one.component_distribution
        normals = isinstance(q, dist.Independent) and isinstance(q.base_dist, dist.Normal)
        is_double = torch.double in (value.dtype, one.mixture_distribution.logits.dtype)
        if not normals or one.batch_shape or len(q.event_shape) != 1 or is_double:
            return super().log_prob(value)
        if self._validate_args:
            self._validate_sample(value)
        loc, scale, z = q.base_dist.loc.double(), q.base_dist.scale.double(), value.double()
        precision = scale**-2
        squares = z**2 @ precision.T - 2 * z @ (precision * loc).T + (precision * loc**2).sum(-1)
        constants = scale.log().sum(-1) + loc.shape[-1] / 2 * math.log(2 * math.pi)
        log_p = (one.mixture_distribution.logits - constants - squares / 2).logsumexp(-1).to(value.dtype)
        return log_p.expand(torch.broadcast_shapes(log_p.shape, self.batch_shape))


def mixture(logits: Tensor, components: dist.TorchDistribution) -> dist.TorchDistribution:
    """sum_c softmax(logits)_c components_c, for components of batch shape `[..., C]`."""
    return _Mixture(dist.Categorical(logits=logits), components)


class StudentT(nn.Module):
    r"""Real data with outliers: h -> t_nu(mu(h), sigma(h)), entry by entry; nu -> infinity is `Normal`.

        log p(x|h) = sum_d log G((nu+1)/2) - log G(nu/2) - log(pi nu sigma^2)/2
                           - (nu+1)/2 log(1 + (x - mu)^2 / (nu sigma^2))

    (Lange et al. 1989.) An entry far off costs the logarithm of its distance, where the Gaussian has its square.

        mu = linear(h),  sigma = softplus(linear(h)) + min_scale,  nu = min_df + (100 - min_df) sigmoid(a)

    Args:
        in_dim: size of the features `[..., in_dim]`.
        out_dim: size of the variable D; log-densities are nats per datum, summed over D.
        df: fixed degrees of freedom nu, between 2 (so that mean and variance exist) and 100; `None` learns one for
            each entry.
        scale: a fixed sigma, in the units of the variable (the standard deviation is sigma sqrt(nu / (nu - 2)));
            `None` learns it.
        heteroscedastic: a learned sigma depends on h; with `False` each entry has one for all data.
        min_scale: floor of the learned sigma; on a grid of values, give its spacing or more.
        min_df: floor of the learned nu, above 2.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        df: float | None = None,
        scale: float | None = None,
        heteroscedastic: bool = True,
        min_scale: float = 3e-3,
        min_df: float = 2.1,
    ):
        super().__init__()
        if scale is not None and not scale > 0:
            raise ValueError(f"scale is {scale}; a fixed one must be positive")
        if not min_scale > 0:
            raise ValueError(f"min_scale is {min_scale}; a floor of the scale must be positive")
        for name, nu in (("df", df), ("min_df", min_df)):
            if nu is not None and not 2 < nu < MAX_DF:
                raise ValueError(
                    f"{name} is {nu}; it must be above 2, where mean and variance exist, and below {MAX_DF:g}, whence "
                    "Normal does"
                )
        self.mu = linear(in_dim, out_dim)
        by_features, by_entry = scale is None and heteroscedastic, scale is None and not heteroscedastic
        self.raw_scale = linear(in_dim, out_dim) if by_features else None
        if by_features:
            nn.init.ones_(self.raw_scale.bias)
        self.entry_scale = nn.Parameter(torch.ones(out_dim)) if by_entry else None
        start = math.log(3.0 / (MAX_DF - 5.0))  # nu = 5, if the floor is near 2
        self.raw_df = nn.Parameter(torch.full((out_dim,), start)) if df is None else None
        self.min_scale, self.min_df = min_scale, min_df
        self.register_buffer("scale", None if scale is None else torch.tensor(float(scale)))
        self.register_buffer("fixed_df", None if df is None else torch.tensor(float(df)))

    @property
    def df(self) -> Tensor:
        """nu, `[D]`, or a scalar where it is fixed."""
        if self.raw_df is None:
            return self.fixed_df
        return self.min_df + (MAX_DF - self.min_df) * self.raw_df.sigmoid()

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        return HeavyTailed(self.df, self.mu(h), self._scale(h)).to_event(1)

    def _scale(self, h: Tensor) -> Tensor:
        if self.scale is not None:
            return self.scale
        raw = self.entry_scale if self.raw_scale is None else self.raw_scale(h)
        return F.softplus(raw) + self.min_scale


class HeavyTailed(dist.StudentT):
    """Pyro's Student-t with a distribution function, which torch lacks; it has no gradient."""

    def cdf(self, value: Tensor) -> Tensor:
        from scipy.special import stdtr

        t = ((value - self.loc) / self.scale).detach()
        return torch.as_tensor(stdtr(self.df.detach().cpu().numpy(), t.cpu().numpy())).to(t)


def normal(mu: Tensor, variance: Tensor) -> dist.TorchDistribution:
    """N(mu, variance), independent over the last dim, which is the event dim."""
    return dist.Normal(mu, variance.sqrt()).to_event(1)


def precision_merge(mu_1: Tensor, var_1: Tensor, mu_2: Tensor, var_2: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean and variance of the normalised product of two Gaussian densities.

        sigma^2 = 1 / (sigma_1^-2 + sigma_2^-2)
        mu      = (mu_1 sigma_1^-2 + mu_2 sigma_2^-2) / (sigma_1^-2 + sigma_2^-2)

    Sonderby et al. 2016, eqs. 17-18. The first is printed there as an equation for sigma; it is
    the variance sigma^2, as the product of two Gaussians shows. The form used here divides once
    and never by a small variance alone.

    >>> precision_merge(*(torch.tensor(v) for v in (0.0, 1.0, 3.0, 0.5)))
    (tensor(2.), tensor(0.3333))
    """
    total = var_1 + var_2
    return (mu_1 * var_2 + mu_2 * var_1) / total, var_1 * var_2 / total
