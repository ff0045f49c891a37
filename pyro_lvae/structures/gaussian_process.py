"""The variational Gaussian process: a guide that draws z_1 by a random function of latent inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..conditionals import normal
from ..nets import linear
from .hierarchy import GaussianHierarchy


class GaussianProcess(nn.Module):
    r"""Random functions with mean zero, given their values t at inputs s, at a further input xi.

        k(a, b) = sigma^2_ARD [exp(-1/2 sum_j omega_j (a_j - b_j)^2) + jitter [a is b]]
        f_i(xi) | s, t ~ N(k(xi, s) K^-1 t_i, k(xi, xi) - k(xi, s) K^-1 k(s, xi)),  K_nm = k(s_n, s_m)

    omega and sigma^2_ARD are learned, positive by softplus, and all f_i share them. The jitter is a share of
    sigma^2_ARD, so the mean does not depend on sigma^2_ARD, and the variance is at least jitter sigma^2_ARD.

    Args:
        in_dim: size c of the inputs.
        jitter: relative to sigma^2_ARD.
    """

    def __init__(self, in_dim: int, jitter: float = 0.01):
        super().__init__()
        self.raw_omega = nn.Parameter(torch.full((in_dim,), math.log(math.expm1(1 / in_dim))))
        self.raw_amplitude = nn.Parameter(torch.full((1,), math.log(math.expm1(0.5))))
        self.jitter = jitter

    @property
    def omega(self) -> Tensor:
        """Inverse squared length-scales, `[c]`; 1/c at first, so that draws of N(0, I) are about one scale apart."""
        return F.softplus(self.raw_omega)

    @property
    def amplitude(self) -> Tensor:
        """sigma^2_ARD, `[1]`; 0.5 at first."""
        return F.softplus(self.raw_amplitude)

    def forward(self, xi: Tensor, s: Tensor, t: Tensor) -> dist.TorchDistribution:
        """f(xi), `[..., B, d]`, for xi `[..., B, c]`, s `[B, m, c]` and t `[B, m, d]`."""
        with torch.autocast(xi.device.type, enabled=False):  # a factor of K needs all of its digits
            s, t = s.to(xi), t.to(xi)
            jitter = self.jitter * torch.eye(s.shape[1], dtype=xi.dtype, device=xi.device)
            lower = torch.linalg.cholesky_ex(self._correlation(s, s) + jitter).L  # as `cholesky`, without waiting
            rho = self._correlation(xi.unsqueeze(-2), s).squeeze(-2).reshape(-1, *s.shape[:2])
            right = torch.cat([rho.permute(1, 2, 0), t], -1)  # the factor is used once for all particles
            v, w = torch.linalg.solve_triangular(lower, right, upper=False).split([len(rho), t.shape[-1]], -1)
            mean = torch.einsum("bmk,bmd->kbd", v, w).reshape(*xi.shape[:-1], -1)
            explained = v.square().sum(1).T.reshape(*xi.shape[:-1], 1)
            share = (1 + self.jitter - explained).clamp_min(self.jitter)  # no less but for rounding
            return normal(mean, (self.amplitude * share).expand_as(mean))

    def _correlation(self, a: Tensor, b: Tensor) -> Tensor:
        """`[..., n, m]` of inputs `[..., n, c]` and `[..., m, c]`."""
        return (-0.5 * self.omega * (a.unsqueeze(-2) - b.unsqueeze(-3)).square()).sum(-1).exp()


class VariationalGP(GaussianHierarchy):
    r"""L latent layers; the guide of the lowest is a variational Gaussian process (Tran et al. 2016).

        xi ~ N(0, I),  f_i | xi, x ~ GP(0, k) given D(x),  z_1i | f, x ~ N(f_i, sigma^2_i(x))
        z_i | z_i-1 ~ N(mu_q,i(z_i-1), sigma^2_q,i(z_i-1)),  i = 2 ... L

    The variational data D(x) = {(s_n, t_n)} are outputs of the inference network. q(z_1|x) integrates xi and f out and
    takes many shapes, but has no density in closed form; so an auxiliary r stands in the model after x, and the ELBO of
    the pair is the paper's bound:

        log p(x) >= E_q[log p(x, z) + log r(xi, f|x, z_1) - log q(xi) q(f|xi, x) q(z|f, x)]
        r(xi, f|x, z_1) = N(mu_xi, diag sigma^2_xi) N(z_1 + mu_f, diag sigma^2_f),  all of MLP([MLP(x), z_1])

    (Sections 2 and 3 there.) It lies E[KL(q(xi, f|x, z_1) || r)] below the ELBO of q(z|x), so that training may settle
    where xi is without effect. Sites are `"z1"` ... `"zL"`, `"x"`, `"xi"` and `"f"`, the latter being f at xi alone.

    Deviations: the paper has any mean-field distribution with parameters f; here it is Gaussian about f, with variances
    from the inference network. The process is that of z_1; the layers above have the guide of `HierarchicalVAE`. The
    kernel has a jitter, and r takes f to be z_1 but for a correction. Before training f(xi) is near xi, shifted by x.

    Args:
        x_dim: size D of the data `[B, D]`.
        z_dims: sizes of z_1 ... z_L, nearest the data first.
        hidden_dims: MLP widths, one a layer.
        num_points: m, the size of D(x); the work grows as its cube.
        xi_dim: c, the size of xi; that of z_1 if left out.
        jitter: of the kernel, relative to sigma^2_ARD.
        **options: `likelihood`, `skip`, `num_hidden`, `batch_norm`, `head_batch_norm`, `activation`,
            `min_variance` as in `GaussianHierarchy`.

    Raises:
        ValueError: sizes below 1, or a jitter that is not positive.

    >>> VariationalGP(9, (3, 2), (8, 4), num_points=5).process.omega
    tensor([0.3333, 0.3333, 0.3333], grad_fn=<SoftplusBackward0>)
    """

    def __init__(
        self,
        x_dim: int,
        z_dims: Sequence[int] = (64, 32, 16, 8, 4),
        hidden_dims: Sequence[int] = (512, 256, 128, 64, 32),
        *,
        num_points: int = 16,
        xi_dim: int | None = None,
        jitter: float = 0.01,
        **options,
    ):
        super().__init__(x_dim, z_dims, hidden_dims, **options)
        self.num_points, self.xi_dim = num_points, self.z_dims[0] if xi_dim is None else xi_dim
        if min(self.num_points, self.xi_dim) < 1 or not jitter > 0:
            raise ValueError(
                f"num_points={num_points}, xi_dim={self.xi_dim}, jitter={jitter}; sizes must be at least 1, and the "
                "jitter above 0"
            )
        z_dim, c = self.z_dims[0], self.xi_dim
        self.process = GaussianProcess(c, jitter)
        self.encoder = self._mlp(x_dim, 0)
        self.inputs = linear(self.encoder.out_dim, num_points * c)
        self.outputs = linear(self.encoder.out_dim, num_points * z_dim)
        self.raw_variance = linear(self.encoder.out_dim, z_dim)
        self._start_near_identity()
        self.bottom_up = nn.ModuleList(
            self._gaussian(self.z_dims[i - 1], i, self.z_dims[i]) for i in range(1, self.num_layers)
        )
        self.features = self._mlp(x_dim, 0)
        self.auxiliary = self._gaussian(self.features.out_dim + z_dim, 0, c + z_dim)

    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """p(x, z_1 ... z_L) r(xi, f|x, z_1) for `x` of `[B, D]`; `y` is ignored."""
        with pyro.plate("data", len(x), dim=-1):
            z = self._latents(x)
            x = pyro.sample("x", self._given(z), obs=x)
            for name, r in zip(("xi", "f"), self._reverse(x, z[-1]), strict=True):
                pyro.sample(name, r)
        return x

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        """q(xi) q(f|xi, x) q(z_1|f, x) q(z_2|z_1) ... q(z_L|z_L-1) for `x` of `[B, D]`; `y` is ignored."""
        h = self.encoder(x)
        s, t = self.inputs(h), self.outputs(h)
        variance = F.softplus(self.raw_variance(h)) + self._head_options["min_variance"]
        with pyro.plate("data", len(x), dim=-1):
            xi = pyro.sample("xi", dist.Normal(x.new_zeros(self.xi_dim), x.new_ones(self.xi_dim)).to_event(1))
            f = self.process(xi, *(points.unflatten(-1, (self.num_points, -1)) for points in (s, t)))
            z = pyro.sample("z1", normal(pyro.sample("f", f), variance))
            for i, q in enumerate(self.bottom_up):
                z = pyro.sample(f"z{i + 2}", q(z))

    @torch.no_grad()
    def _start_near_identity(self) -> None:
        """f(xi) near a shift(x) + xi, with little noise: a guide that begins without xi may never come to use it."""
        s = nn.init.normal_(self.inputs.bias).unflatten(0, (self.num_points, -1))  # where xi will fall
        self.inputs.weight.mul_(0.1)
        self.outputs.bias.copy_((s @ torch.eye(self.xi_dim, self.z_dims[0])).flatten())
        self.outputs.weight.copy_(linear(self.encoder.out_dim, self.z_dims[0]).weight.repeat(self.num_points, 1))
        self.raw_variance.bias.fill_(-3.0)

    def _reverse(self, x: Tensor, z: Tensor) -> tuple[dist.TorchDistribution, dist.TorchDistribution]:
        """r(xi|x, z_1) and r(f|x, z_1)."""
        h = self.features(x)
        rows = torch.broadcast_shapes(h.shape[:-1], z.shape[:-1])
        mlp, head = self.auxiliary
        moments = head.moments(mlp(torch.cat([v.expand(*rows, -1) for v in (h, z)], -1)))
        (mu_xi, mu_f), (var_xi, var_f) = (moment.split([self.xi_dim, z.shape[-1]], -1) for moment in moments)
        return normal(mu_xi, var_xi), normal(z + mu_f, var_f)  # z_1 is f and a little noise
