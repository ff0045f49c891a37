"""The ladder VAE: a top-down guide that corrects the generative distribution with evidence from x."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
from torch import Tensor, nn

from ..conditionals import normal, precision_merge
from ..nets import Shared
from .hierarchy import GaussianHierarchy


class LadderVAE(GaussianHierarchy):
    r"""L latent layers and a ladder guide (Sonderby et al. 2016, eqs. 11-19).

    A deterministic pass upwards, d_0 = x, gives each layer its evidence:

        d_n = MLP(d_n-1),  mu^_q,n = Linear(d_n),  sigma^2^_q,n = softplus(Linear(d_n))

    and a stochastic pass downwards merges it with the generative distribution:

        q(z_L|x)        = N(mu^_q,L, sigma^2^_q,L)
        q(z_i|z_i+1, x) = N(mu_q,i, sigma^2_q,i)
        sigma^2_q,i     = 1 / (sigma^_q,i^-2 + sigma_p,i^-2)
        mu_q,i          = (mu^_q,i sigma^_q,i^-2 + mu_p,i sigma_p,i^-2) sigma^2_q,i

    (The paper prints the third line as an equation for sigma_q,i; it is the variance.) With `skip` mu_p,i and
    sigma^2_p,i are functions of z_i+1 ... z_L, and so q(z_i|z_i+1 ... z_L, x).

    Args:
        x_dim: size D of the data `[B, D]`.
        z_dims: sizes of z_1 ... z_L, nearest the data first.
        hidden_dims: MLP widths, one a layer.
        share_top_down: the guide's mu_p,i and sigma^2_p,i are the model's own networks, as the
            paper's text has it; both ask at the very same z, and it is computed once. With `False`
            the guide has top-down networks of its own, as in the authors' published runs.
        mu_upwards: pass only mu^_q,n to the next MLP upwards, instead of d_n.
        **options: `likelihood`, `skip`, `num_hidden`, `batch_norm`, `head_batch_norm`, `activation`,
            `min_variance` as in `GaussianHierarchy`.

    >>> LadderVAE(x_dim=9, z_dims=(3, 2), hidden_dims=(8, 4)).num_layers
    2
    """

    def __init__(
        self,
        x_dim: int,
        z_dims: Sequence[int] = (64, 32, 16, 8, 4),
        hidden_dims: Sequence[int] = (512, 256, 128, 64, 32),
        *,
        share_top_down: bool = True,
        mu_upwards: bool = False,
        **options,
    ):
        super().__init__(x_dim, z_dims, hidden_dims, **options)
        self.mu_upwards = mu_upwards
        self.bottom_up, self.evidence = nn.ModuleList(), nn.ModuleList()
        below = x_dim
        for i, z_dim in enumerate(self.z_dims):
            self.bottom_up.append(self._mlp(below, i))
            self.evidence.append(self._head(self.bottom_up[i].out_dim, z_dim))
            below = z_dim if mu_upwards else self.bottom_up[i].out_dim
        if share_top_down:
            self.top_down = nn.ModuleList(Shared(net) for net in self.top_down)
            self.guide_top_down = None
        else:
            self.guide_top_down = self._top_down()

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        """q(z_L|x) q(z_L-1|z_L, x) ... q(z_1|z_2, x) for `x` of `[B, D]`; `y` is ignored."""
        *evidence, top = self._upwards(x)
        top_down = self.top_down if self.guide_top_down is None else self.guide_top_down
        with pyro.plate("data", len(x), dim=-1):
            z = [pyro.sample(f"z{self.num_layers}", normal(*top))]
            for i in reversed(range(self.num_layers - 1)):
                p = top_down[i](*self._seen(z))
                merged = precision_merge(*evidence[i], p.mean, p.variance)
                z.append(pyro.sample(f"z{i + 1}", normal(*merged)))

    def _upwards(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The evidence (mu^_q,n, sigma^2^_q,n) of each layer, n = 1 ... L, each `[B, z_n]`."""
        d, evidence = x, []
        for mlp, head in zip(self.bottom_up, self.evidence, strict=True):
            d = mlp(d)
            evidence.append(head.moments(d))
            d = evidence[-1][0] if self.mu_upwards else d
        return evidence
