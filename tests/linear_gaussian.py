"""Linear-Gaussian hierarchies, for which log p(x) and the posterior are known in closed form."""

import pyro
import pyro.distributions as dist
import torch
from torch import nn
from torch.distributions import MultivariateNormal


def make_linear(structure):
    """Make the conditionals of a package structure built with `num_hidden=0`, `batch_norm=False` linear-Gaussian."""
    for name, module in structure.named_modules():
        if type(module).__name__ == "Normal" and module.scale is None:
            head, half = module.head[0], module.head[0].weight.shape[0] // 2
            head.weight.data[half:] = 0
            in_guide = any(part in name for part in ("bottom_up", "evidence", "guide"))
            # A wide guide, and a likelihood that says little, keep the importance weights even.
            head.bias.data[half:] = 3.0 if in_guide else 1.0 if "likelihood" in name else 0.3
            head.weight.data[:half] *= 0.3 if in_guide else 1.0
            head.bias.data[:half].normal_(0, 0.3)
    if getattr(structure, "guide_top_down", None) is not None:  # its own networks, near the model's
        structure.guide_top_down.load_state_dict(structure.top_down.state_dict())
        for parameter in structure.guide_top_down.parameters():
            parameter.data += 0.05
    return structure.double().eval()


def marginal(structure) -> MultivariateNormal:
    """p(x) of such a structure, by propagating mean and covariance of all layers from the top down."""
    size = structure.z_dims[-1]
    mean, cov = torch.zeros(size).double(), torch.eye(size).double()
    heads = [getattr(net, "net", net)[1] for net in reversed(structure.top_down)]
    for head in [*heads, structure.likelihood]:
        a, b = head.head[0].weight.detach(), head.head[0].bias.detach()
        half = len(b) // 2
        noise = torch.nn.functional.softplus(b[half:]) + head.min_variance
        w = torch.nn.functional.pad(
            a[:half], (len(mean) - a.shape[1], 0)
        )  # without skip, the layer above alone is seen
        mean, across = torch.cat([mean, w @ mean + b[:half]]), w @ cov
        cov = torch.cat([torch.cat([cov, across.T], 1), torch.cat([across, across @ w.T + torch.diag(noise)], 1)])
    return MultivariateNormal(mean[-half:], cov[-half:, -half:])


class ExactPosterior(nn.Module):
    """z2 -> z1 -> x, all linear-Gaussian, with the exact posterior q(z2|x) q(z1|z2, x) as guide."""

    def __init__(self, x_dim=4, z1=3, z2=2):
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.a = nn.Parameter(torch.randn(z1, z2, generator=g).double())
        self.w = nn.Parameter(torch.randn(x_dim, z1, generator=g).double())
        self.s1, self.sx = 0.7, 0.4  # variances

    def model(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(self.a.shape[1]), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(z2 @ self.a.T, self.s1**0.5).to_event(1))
            pyro.sample("x", dist.Normal(z1 @ self.w.T, self.sx**0.5).to_event(1), obs=x)

    def guide(self, x, y=None):
        noise = self.s1 * self.w @ self.w.T + self.sx * torch.eye(len(self.w)).double()
        m2, c2 = posterior(self.w @ self.a, noise, x, torch.eye(self.a.shape[1]).double())
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", dist.MultivariateNormal(m2, c2))
            prior = self.s1 * torch.eye(len(self.a)).double()
            top = z2 @ self.a.T
            noise = self.sx * torch.eye(len(self.w)).double()
            m1, c1 = posterior(self.w, noise, x - top @ self.w.T, prior)
            pyro.sample("z1", dist.MultivariateNormal(top + m1, c1))

    def log_prob(self, x):
        c1 = self.a @ self.a.T + self.s1 * torch.eye(len(self.a)).double()
        cov = self.w @ c1 @ self.w.T + self.sx * torch.eye(len(self.w)).double()
        return MultivariateNormal(torch.zeros(len(self.w)).double(), cov).log_prob(x)


def posterior(w, noise, x, prior):
    """Mean and covariance of z given x = w z + N(0, noise), z ~ N(0, prior)."""
    gain = prior @ w.T @ torch.linalg.inv(w @ prior @ w.T + noise)
    cov = prior - gain @ w @ prior
    return x @ gain.T, (cov + cov.T) / 2
