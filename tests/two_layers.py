"""A two-layer hierarchy small enough to write every density out by hand, with the roles of its parameters apart.

A gradient estimator is a choice of what each role of a parameter is given: `draw` (the
parameters inside the reparameterised draws), `score` (inside log q, at given draws) and `model`
(inside log p). `Roles` computes all densities from three separate copies of the parameters.
"""

import math

import pyro
import pyro.distributions as dist
import torch
from torch import nn


class TwoLayers(nn.Module):
    """z2 -> z1 -> x with a top-down guide; optionally a global shift g, and a deterministic site outside the plate."""

    def __init__(self, shifted=False, deterministic=False, size=None):
        super().__init__()
        g = torch.Generator().manual_seed(5)
        shapes = dict(
            a=(2, 2), w=(3, 2), p1=(2,), e2=(2, 3), s2=(2,), e1x=(2, 3), e1z=(2, 2), s1=(2,), gm=(3,), gs=(3,)
        )
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(0.5 * torch.randn(*shape, generator=g).double()))
        self.shifted, self.deterministic, self.size = shifted, deterministic, size

    def plate(self, x):
        return pyro.plate("data", self.size or len(x), subsample_size=len(x) if self.size else None, dim=-1)

    def model(self, x, y=None):
        shift = 0.0
        if self.shifted:
            shift = pyro.sample("g", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        if self.deterministic:
            pyro.deterministic("norm", self.w.square().sum())
        with self.plate(x):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(z2 @ self.a.T, self.p1.exp()).to_event(1))
            pyro.sample("x", dist.Normal(z1.tanh() @ self.w.T + shift, 0.6).to_event(1), obs=x)

    def guide(self, x, y=None):
        if self.shifted:
            pyro.sample("g", dist.Normal(self.gm, self.gs.exp()).to_event(1))
        with self.plate(x):
            z2 = pyro.sample("z2", dist.Normal(x @ self.e2.T, self.s2.exp()).to_event(1))
            pyro.sample("z1", dist.Normal(x @ self.e1x.T + z2.sin() @ self.e1z.T, self.s1.exp()).to_event(1))


def log_normal(z, mean, scale):
    scale = torch.as_tensor(scale, dtype=z.dtype).expand_as(z)
    return (-0.5 * ((z - mean) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


def kl_normal(m, s, pm, ps):
    ps = torch.as_tensor(ps, dtype=m.dtype)
    return ((ps / s).log() + (s**2 + (m - pm) ** 2) / (2 * ps**2) - 0.5).sum(-1)


class Roles:
    """Every density of `structure` at one draw of K particles; `draw`, `score`, `model` are {name: leaf}."""

    def __init__(self, structure, x, num_particles, beta=None, scale=1.0):
        self.x, self.scale = x, scale
        beta = {"z1": 1.0, "z2": 1.0, "g": 1.0} | (beta or {})
        self.beta = beta
        self.draw, self.score, self.model = (
            {n: p.detach().clone().requires_grad_() for n, p in structure.named_parameters()} for _ in range(3)
        )
        d, q, p = self.draw, self.score, self.model
        shape = (num_particles, len(x), 2)
        one = torch.ones(shape, dtype=x.dtype)
        g, self.global_weight = 0.0, x.new_zeros(())
        self.kl_global = x.new_zeros(())
        if structure.shifted:
            eps = torch.normal(x.new_zeros(3), x.new_ones(3))
            g = d["gm"] + d["gs"].exp() * eps
            log_p, log_q = log_normal(g, torch.zeros(3), 1.0), log_normal(g, q["gm"], q["gs"].exp())
            self.global_weight = beta["g"] * (log_p - log_q)
            self.kl_global = beta["g"] * kl_normal(q["gm"], q["gs"].exp(), torch.zeros(3), 1.0)
        if structure.size:
            torch.randperm(structure.size)  # the plate draws its rows
        e2 = torch.normal(0 * one, one)
        self.z2 = z2 = x @ d["e2"].T + d["s2"].exp() * e2
        e1 = torch.normal(0 * one, one)
        z1 = x @ d["e1x"].T + z2.sin() @ d["e1z"].T + d["s1"].exp() * e1
        self.z1, self.m1, self.mp = z1, x @ q["e1x"].T + z2.sin() @ q["e1z"].T, z2 @ p["a"].T
        self.log_px = log_normal(x, z1.tanh() @ p["w"].T + g, 0.6)
        m2, m1 = x @ q["e2"].T, x @ q["e1x"].T + z2.sin() @ q["e1z"].T
        self.log_p = {"z2": log_normal(z2, torch.zeros(2), 1.0), "z1": log_normal(z1, z2 @ p["a"].T, p["p1"].exp())}
        self.log_q = {"z2": log_normal(z2, m2, q["s2"].exp()), "z1": log_normal(z1, m1, q["s1"].exp())}
        self.kl = {
            "z2": beta["z2"] * kl_normal(m2, q["s2"].exp(), torch.zeros(2), 1.0).expand(num_particles, -1),
            "z1": beta["z1"] * kl_normal(m1, q["s1"].exp(), z2 @ p["a"].T, p["p1"].exp()),
        }
        self.share = {n: beta[n] * (self.log_q[n] - self.log_p[n]) for n in ("z1", "z2")}
        self.log_w = self.log_px - self.share["z1"] - self.share["z2"]

    def total(self, per_datum):
        return self.scale * per_datum.sum() + self.global_weight

    def gradient(self, value, *roles):
        """{parameter: d value}, over the roles named."""
        out = {}
        for role in roles:
            leaves = getattr(self, role)
            grads = torch.autograd.grad(value, list(leaves.values()), retain_graph=True, materialize_grads=True)
            for name, grad in zip(leaves, grads, strict=True):
                out[name] = out.get(name, 0) + grad
        return out


def add(*gradients):
    return {n: sum(g.get(n, 0) for g in gradients) for n in gradients[0]}


def only(gradient, *names):
    """A gradient, 0 but for some parameters."""
    return {n: g if n in names else torch.zeros_like(g) for n, g in gradient.items()}
