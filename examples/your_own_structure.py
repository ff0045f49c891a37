"""A structure of your own: data with outliers. Each datum is an outlier with probability pi, or comes from z1.

    python examples/your_own_structure.py            # a minute
    python examples/your_own_structure.py --smoke    # seconds

The switch c is summed out by Pyro's TraceEnum_ELBO; everything outside the class is the library's.
"""

from __future__ import annotations

import argparse

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyro_lvae import Dataset, check, fit, kl_per_layer
from pyro_lvae.conditionals import Normal
from pyro_lvae.experiments import script
from pyro_lvae.nets import MLP


class OutlierVAE(nn.Module):
    """p(z1) = N(0, I), p(c) = B(pi), p(x|z1, c=0) = N(mu(z1), sigma^2(z1)), p(x|z1, c=1) = N(0, 10^2)."""

    def __init__(self, x_dim: int, z_dim: int = 2, hidden_dim: int = 64):
        super().__init__()
        self.encoder = nn.Sequential(MLP(x_dim, hidden_dim), Normal(hidden_dim, z_dim))
        self.decoder = nn.Sequential(MLP(z_dim, hidden_dim), Normal(hidden_dim, x_dim, min_variance=1e-2))
        self.logit_pi, self.z_dim = nn.Parameter(torch.tensor(0.0)), z_dim

    def model(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z1", dist.Normal(x.new_zeros(self.z_dim), 1.0).to_event(1))
            outlier = dist.Bernoulli(logits=self.logit_pi)
            c = pyro.sample("c", outlier, infer={"enumerate": "parallel"}).unsqueeze(-1)
            inlier = self.decoder(z)
            scale = torch.where(c == 1, 10.0, inlier.stddev)
            pyro.sample("x", dist.Normal(torch.where(c == 1, 0.0, inlier.mean), scale).to_event(1), obs=x)

    def guide(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z1", self.encoder(x))


def rings(n: int, outliers: float = 0.1) -> torch.Tensor:
    """A noisy circle in four dims, with a tenth of the rows replaced by wide noise."""
    angle = 2 * torch.pi * torch.rand(n)
    x = torch.stack([f(k * angle) for k in (1, 2) for f in (torch.sin, torch.cos)], 1) + 0.1 * torch.randn(n, 4)
    return torch.where(torch.rand(n, 1) < outliers, 10 * torch.randn(n, 4), x)


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two epochs")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    data = Dataset("rings", rings(4000), rings(500))
    structure = OutlierVAE(data.x_dim)
    check(structure, data.x_train)
    estimator = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1)
    fit(structure, data, estimator, epochs=2 if args.smoke else 100, callbacks=None if not args.smoke else ())
    pi = structure.logit_pi.sigmoid().item()
    print(f"share of outliers: learned {pi:.3f}, true 0.1;  KL {kl_per_layer(structure, data.x_test)}")
    return pi


if __name__ == "__main__":
    script(main)
