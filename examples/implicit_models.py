"""Densities that only a critic knows: posteriors of several modes, and a simulator that cannot be scored.

    python examples/implicit_models.py           # a few minutes
    python examples/implicit_models.py --smoke   # seconds

1. Posteriors. z ~ N(0, I) in two dims, x = z^2 + noise: for x near (2, 2) the posterior has four modes, and log p(x) is
   known by quadrature. A Gaussian guide (`VAE`), inverse autoregressive flows (`FlowVAE`) and a network of x and noise
   (`ImplicitPosteriorVAE`, adversarial variational Bayes) are trained for the fixed model. The gap log p(x) - ELBO is
   KL(q || p); of the implicit posterior it is an estimate, as its density is. "share" is that of draws at the mode that
   has the fewest, 1/4 at best.
2. A simulator, x = W z + noise, which the structure can run but whose density it does not see
   (`ImplicitLikelihoodVAE`, likelihood-free). The exact posterior is Gaussian: rms is the error of the posterior means.

Under --out: results.md, results.json, draws as PNG. Everything is trained anew each time.
"""

from __future__ import annotations

import math
import time
from argparse import Namespace
from functools import partial

import torch
from matplotlib.figure import Figure
from pyro.distributions import Normal, TorchDistribution
from torch import Tensor, nn

from pyro_lvae import (
    VAE,
    CriticAdam,
    Dataset,
    FlowVAE,
    FusedAdam,
    ImplicitLikelihoodVAE,
    ImplicitPosteriorVAE,
    elbo,
    fit,
)
from pyro_lvae.evaluate import posterior_samples
from pyro_lvae.experiments import fixed_settings, markdown_rows, parsed, parser_of, read_rows, script, write_rows
from pyro_lvae.plots import save
from pyro_lvae.results import write_text
from pyro_lvae.structures.flows import IAF

WEIGHT = torch.tensor([[1.0, 0.5], [-0.3, 0.8], [0.6, -0.6]])
NOISE = 0.5  # of the simulator


class Squares(nn.Module):
    """p(x|z) = N(z^2, sigma^2), in place of a decoder: nothing in the model is learned."""

    def __init__(self, in_dim: int, x_dim: int, sigma: float = 1.0):
        super().__init__()
        self.sigma = sigma

    def forward(self, z: Tensor) -> TorchDistribution:
        return Normal(z.square(), self.sigma).to_event(1)

    def log_evidence(self, x: Tensor) -> Tensor:
        """log p(x) of `[N, 2]`, by the trapezoidal rule: the units are independent."""
        z = torch.linspace(-7, 7, 4001, dtype=torch.double)
        log_joint = Normal(0.0, 1.0).log_prob(z) + Normal(z.square(), self.sigma).log_prob(x.double()[..., None])
        return (log_joint.logsumexp(-1) + math.log(z[1] - z[0])).sum(-1)


def posteriors(args: Namespace) -> tuple[dict[str, dict], Figure]:
    """Gap and modes of each guide, and their draws for x = (2, 2)."""
    torch.manual_seed(args.seed)
    ends = torch.tensor([1.0, 2.0])
    x = torch.cartesian_prod(ends, ends)
    data = Dataset("squares", x.repeat(args.repeats, 1), x.repeat(100, 1))
    likelihood = partial(Squares, sigma=args.sigma)
    options = dict(z_dim=2, hidden_dim=args.hidden_dim, batch_norm=False, likelihood=likelihood, decoder_num_hidden=0)
    guides = {
        "Gaussian": lambda: VAE(2, **options),
        "IAF flows": lambda: FlowVAE(2, partial(VAE, **options), IAF, 4),
        "implicit": lambda: ImplicitPosteriorVAE(2, noise_dim=4, **options),
    }
    exact, found, draws = Squares(2, 2, args.sigma).log_evidence(data.x_test).mean().item(), {}, {}
    for name, make in guides.items():
        structure = trained(make(), data, args)
        draws[name] = posterior_samples(structure, torch.full((4000, 2), 2.0))["z1"]
        gap = exact - elbo(structure, data.x_test, 50).mean().item()
        found[name] = {"log p(x) - ELBO": gap, "share": share_of_rarest_mode(draws[name])}
    return found, scatter(draws)


def share_of_rarest_mode(z: Tensor) -> float:
    """The share of draws in the quadrant that has the fewest."""
    quadrant = (z[:, 0] > 0).long() + 2 * (z[:, 1] > 0).long()
    return quadrant.bincount(minlength=4).min().item() / len(z)


def scatter(draws: dict[str, Tensor]) -> Figure:
    figure = Figure(figsize=(3 * len(draws), 3), layout="constrained")
    for ax, (name, z) in zip(figure.subplots(1, len(draws)), draws.items(), strict=True):
        ax.scatter(*z[:2000].T.tolist(), s=2, alpha=0.3)
        ax.set(title=name, xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xlabel="z[0]", ylabel="z[1]")
    return figure


def trained(structure: nn.Module, data: Dataset, args: Namespace) -> nn.Module:
    fit(
        structure,
        data,
        epochs=args.epochs,
        batch_size=200,
        optimizer=partial(FusedAdam, lr=args.lr),
        critic_optimizer=partial(CriticAdam, lr=3e-3),
        critic_steps=args.critic_steps,
        compile=False,
        callbacks=(),
    )
    return structure


def simulator(z: Tensor) -> Tensor:
    """x = W z + noise."""
    return z @ WEIGHT.T + NOISE * torch.randn(*z.shape[:-1], len(WEIGHT))


def likelihood_free(args: Namespace) -> dict[str, dict]:
    """Errors of the posterior that is found without p(x|z)."""
    torch.manual_seed(args.seed)
    x = simulator(torch.randn(4 * args.repeats + 400, 2))
    data = Dataset("simulated", x[:-400], x[-400:])
    structure = trained(ImplicitLikelihoodVAE(3, simulator, 2, args.hidden_dim), data, args)
    precision = torch.eye(2) + WEIGHT.T @ WEIGHT / NOISE**2
    exact = data.x_test @ WEIGHT @ precision.inverse() / NOISE**2
    with torch.no_grad():
        q = structure.encoder(data.x_test)
    best = precision.diagonal().rsqrt()  # of the nearest Gaussian with independent units
    return {
        "likelihood-free": {
            "rms of means": (q.mean - exact).square().mean().sqrt().item(),
            "rms of the prior's": exact.square().mean().sqrt().item(),
            "sigma / exact": (q.variance.sqrt() / best).mean().item(),
            "ELBO - log density of the data": elbo(structure, data.x_test, 20).mean().item(),
        }
    }


def main(argv: list[str] | None = None) -> dict:
    parser = parser_of(__doc__, "runs/implicit_models", smoke="two short epochs", data=None)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=500, help="rows of each of four x")
    parser.add_argument("--hidden_dim", type=int, default=64)
    parser.add_argument("--sigma", type=float, default=1.0, help="noise of the squares")
    parser.add_argument("--critic_steps", type=int, default=5)
    parser.add_argument("--lr", type=float, default=5e-4)
    args = parsed(parser, argv, epochs=2, repeats=100, hidden_dim=8, critic_steps=1)
    path, settings = args.out / "results.json", fixed_settings(args)
    read_rows(path, settings)  # those of other settings are refused
    started = time.perf_counter()
    of_guides, picture = posteriors(args)
    of_simulator = likelihood_free(args)
    table = markdown_rows("guide", of_guides) + "\n\n" + markdown_rows("inference", of_simulator)
    args.out.mkdir(parents=True, exist_ok=True)
    save({"posteriors": picture}, args.out)
    write_rows(path, settings, {"posteriors": of_guides, "simulator": of_simulator})
    write_text(args.out / "results.md", table + "\n")
    print(f"{table}\n\n{time.perf_counter() - started:.0f} s")
    return {"posteriors": of_guides, "simulator": of_simulator}


if __name__ == "__main__":
    script(main)
