"""The benchmark's two models as one would write them in PyTorch alone, for comparison."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Moments = tuple[Tensor, Tensor]


def block(in_dim: int, hidden: int) -> nn.Sequential:
    layers = []
    for size in (in_dim, hidden):
        layers += [nn.Linear(size, hidden, bias=False), nn.BatchNorm1d(hidden), nn.LeakyReLU()]
    return nn.Sequential(*layers)


def moments(h: Tensor) -> Moments:
    mu, raw = h.chunk(2, -1)
    return mu, F.softplus(raw) + 1e-5


class Gaussian(nn.Module):
    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(in_dim, 2 * out_dim, bias=False), nn.BatchNorm1d(2 * out_dim))

    def forward(self, h):
        return moments(self.net(h))


class Plain(nn.Module):
    """-ELBO of a batch, in nats per datum, from one pass."""

    def up(self, x: Tensor) -> list[Moments]:
        """What q knows of each layer from x."""
        raise NotImplementedError

    def down(self, evidence: list[Moments]) -> tuple[Tensor, list[Tensor]]:
        """The logits of x at a draw of q, and 2 (log q - log p) of that draw, entry by entry in each layer."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        logits, terms = self.down(self.up(x))
        loss = 0.5 * sum(t.sum() for t in terms)
        return (loss + F.binary_cross_entropy_with_logits(logits, x, reduction="sum")) / len(x)

    def log_weights(self, x: Tensor, evidence: list[Moments], num_samples: int) -> Tensor:
        """log p(x, z) - log q(z) of draws for one row of x."""
        logits, terms = self.down([(mu.expand(num_samples, -1), var.expand(num_samples, -1)) for mu, var in evidence])
        error = F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
        return -error - 0.5 * sum(t.sum(-1) for t in terms)


@torch.no_grad()
def log_likelihood(model: Plain, x: Tensor, num_samples: int) -> Tensor:
    """log p(x) by importance sampling, row by row, in nats."""
    model.eval()
    log_w = [model.log_weights(row, model.up(row), num_samples) for row in x.split(1)]
    return torch.stack(log_w).logsumexp(1) - math.log(num_samples)


class PlainVAE(Plain):
    def __init__(self, x_dim=784, z_dim=20, hidden=400):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(x_dim, hidden), nn.LeakyReLU(), nn.Linear(hidden, 2 * z_dim))
        self.decoder = nn.Sequential(nn.Linear(z_dim, hidden), nn.LeakyReLU(), nn.Linear(hidden, x_dim))

    def up(self, x):
        return [moments(self.encoder(x))]

    def down(self, evidence):
        ((mu, var),) = evidence
        z = mu + var.sqrt() * torch.randn_like(mu)
        return self.decoder(z), [z.square() - (z - mu).square() / var - var.log()]


class PlainLadder(Plain):
    def __init__(self, x_dim=784, z_dims=(64, 32, 16, 8, 4), hidden_dims=(512, 256, 128, 64, 32)):
        super().__init__()
        inputs = (x_dim, *hidden_dims[:-1])
        self.bottom_up = nn.ModuleList(map(block, inputs, hidden_dims))
        self.evidence = nn.ModuleList(map(Gaussian, hidden_dims, z_dims))
        self.top_down = nn.ModuleList(
            nn.Sequential(block(above, hidden), Gaussian(hidden, z))
            for above, hidden, z in zip(z_dims[1:], hidden_dims[1:], z_dims[:-1], strict=True)
        )
        self.decoder, self.logits = block(z_dims[0], hidden_dims[0]), nn.Linear(hidden_dims[0], x_dim)

    def up(self, x):
        d, evidence = x, []
        for net, head in zip(self.bottom_up, self.evidence, strict=True):
            d = net(d)
            evidence.append(head(d))
        return evidence

    def down(self, evidence):
        *evidence, (mu, var) = evidence
        z = mu + var.sqrt() * torch.randn_like(mu)
        terms = [z.square() - (z - mu).square() / var - var.log()]
        for net, (e_mu, e_var) in zip(reversed(self.top_down), reversed(evidence), strict=True):
            p_mu, p_var = net(z)
            total = e_var + p_var
            mu, var = (e_mu * p_var + p_mu * e_var) / total, e_var * p_var / total
            z = mu + var.sqrt() * torch.randn_like(mu)
            log_q, log_p = (z - mu).square() / var + var.log(), (z - p_mu).square() / p_var + p_var.log()
            terms.append(log_p - log_q)
        return self.logits(self.decoder(z)), terms
