"""The importance-weighted bound, per datum."""

from __future__ import annotations

import math

from torch import Tensor

from ..traces import Ledger
from .base import LedgerELBO


class IWAE(LedgerELBO):
    r"""The importance-weighted bound of K particles.

        L_K = N/B sum_b E[log 1/K sum_k w_kb] + E[log p(W) - log q(W)],  w = p(x, z|W) / q(z|x, W)

    (Burda et al. 2016, eq. 8.) The log-mean-exp runs over the particles of each datum alone. A
    KL weight beta acts inside it, the subsampling scale N/B outside; global sites W (Bayesian
    weights) are drawn once, shared by the particles, and enter outside.

    Pyro's `RenyiELBO(alpha=0)` is the same bound only where every site is in the data plate and
    the plate is not subsampled.

    Args:
        num_particles: K; 1 is the ELBO.

    >>> import torch
    >>> from pyro_lvae import VAE
    >>> vae, x = VAE(x_dim=4, z_dim=2, hidden_dim=8), torch.ones(3, 4)
    >>> IWAE(num_particles=5).differentiable_loss(vae.model, vae.guide, x).shape
    torch.Size([])
    """

    def __init__(self, num_particles: int = 5):
        super().__init__(num_particles=num_particles)

    def bound(self, sites: Ledger) -> Tensor:
        log_mean = sites.local_log_weight().logsumexp(0) - math.log(self.num_particles)
        return sites.plate_scale() * log_mean.sum() + sites.global_log_weight()
