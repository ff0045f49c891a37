"""The five-layer ladder VAE as one would write it in PyTorch alone, for comparison."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def block(in_dim: int, hidden: int) -> nn.Sequential:
    layers = []
    for size in (in_dim, hidden):
        layers += [nn.Linear(size, hidden, bias=False), nn.BatchNorm1d(hidden), nn.LeakyReLU()]
    return nn.Sequential(*layers)


class Gaussian(nn.Module):
    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(in_dim, 2 * out_dim, bias=False), nn.BatchNorm1d(2 * out_dim))

    def forward(self, h):
        mu, raw = self.net(h).chunk(2, -1)
        return mu, F.softplus(raw) + 1e-5


class PlainLadder(nn.Module):
    """-ELBO of a batch, in nats per datum, from one pass."""

    def __init__(self, x_dim=784, z_dims=(64, 32, 16, 8, 4), hidden_dims=(512, 256, 128, 64, 32)):
        super().__init__()
        inputs = (x_dim, *hidden_dims[:-1])
        self.up = nn.ModuleList(map(block, inputs, hidden_dims))
        self.evidence = nn.ModuleList(map(Gaussian, hidden_dims, z_dims))
        self.down = nn.ModuleList(
            nn.Sequential(block(above, hidden), Gaussian(hidden, z))
            for above, hidden, z in zip(z_dims[1:], hidden_dims[1:], z_dims[:-1], strict=True)
        )
        self.decoder, self.logits = block(z_dims[0], hidden_dims[0]), nn.Linear(hidden_dims[0], x_dim)

    def forward(self, x):
        d, evidence = x, []
        for up, head in zip(self.up, self.evidence, strict=True):
            d = up(d)
            evidence.append(head(d))
        mu, var = evidence[-1]
        z = mu + var.sqrt() * torch.randn_like(mu)
        loss = 0.5 * (z.square() - (z - mu).square() / var - var.log()).sum()
        for down, (e_mu, e_var) in zip(reversed(self.down), reversed(evidence[:-1]), strict=True):
            p_mu, p_var = down(z)
            total = e_var + p_var
            mu, var = (e_mu * p_var + p_mu * e_var) / total, e_var * p_var / total
            z = mu + var.sqrt() * torch.randn_like(mu)
            log_q, log_p = (z - mu).square() / var + var.log(), (z - p_mu).square() / p_var + p_var.log()
            loss = loss + 0.5 * (log_p - log_q).sum()
        logits = self.logits(self.decoder(z))
        return (loss + F.binary_cross_entropy_with_logits(logits, x, reduction="sum")) / len(x)
