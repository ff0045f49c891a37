"""Likelihood-free inference: the model is a simulator, which can be run but not scored."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import torch
from pyro.distributions import Normal as GaussianDistribution
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from ..conditionals import Normal
from ..critics import PairCritic
from ..nets import MLP, Shared
from .around import drawn

FOR_MEAN = 32  # runs of the simulator that E[x|z] is the mean of


class ImplicitLikelihoodVAE(nn.Module):
    r"""One latent layer below a simulator x ~ p(x|z_1) whose density is unknown (Tran, Ranganath & Blei 2017).

        p(z_1) = N(0, I),  x = simulator(z_1),  q(z_1|x) = N(mu(x), sigma^2(x))
        T* = log q(x, z_1) - log p(x, z_1),  q(x, z_1) = q_data(x) q(z_1|x)
        L = -E_q(x, z_1)[T(x, z_1)] <= E_data[log p(x)] - E_data[log q_data(x)]

    (Section 3 there, for local latents; the simulator has no parameters to learn.) The critic T tells pairs of data and
    draws of the guide from pairs of the simulator; `fit` trains it in turn. The site "x" has log-density
    -T(x, z_1) + log q(z_1|x) - log p(z_1), which estimates log p(x|z_1) - log q_data(x): bounds and likelihoods are
    relative to the density of the data, at most 0 on the mean, and every estimator works. Draws of the model
    are the simulator's.

    Args:
        x_dim: size D of the data `[B, D]`.
        simulator: z_1 `[..., z_dim]` -> x `[..., D]`, at random, for any leading dims; no gradient is asked of it. On
            the command line the path of a function annotated `-> torch.Tensor`.
        z_dim: size of z_1.
        hidden_dim: width of the networks.
        num_hidden: hidden layers of each.
        activation: makes the nonlinearity.

    >>> structure = ImplicitLikelihoodVAE(4, simulator=lambda z: z.repeat_interleave(2, -1), z_dim=2, hidden_dim=8)
    >>> critic_input = structure.simulator(torch.zeros(3, 2)).shape
    >>> critic_input
    torch.Size([3, 4])
    """

    has_own_guide = True

    def __init__(
        self,
        x_dim: int,
        simulator: Callable[[Tensor], Tensor],
        z_dim: int = 2,
        hidden_dim: int = 128,
        *,
        num_hidden: int = 2,
        activation: Callable[[], nn.Module] = nn.LeakyReLU,
    ):
        super().__init__()
        self.x_dim, self.z_dim, self.simulator = x_dim, z_dim, simulator
        mlp = MLP(x_dim, hidden_dim, num_hidden, batch_norm=False, activation=activation)
        self.encoder = Shared(nn.Sequential(mlp, Normal(mlp.out_dim, z_dim)))
        self.critic = PairCritic(x_dim, z_dim, hidden_dim, num_hidden, activation=activation)
        self._check_simulator()

    def model(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """p(x, z_1) for `x` of `[B, D]`; `y` is ignored."""
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z1", self._prior(x))
            return pyro.sample("x", self._likelihood(z), obs=x)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        """q(z_1|x); `y` is ignored."""
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z1", self.encoder(x))

    def critic_loss(self, pair: nn.Module, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The critic's loss on a batch `[B, D]`, a scalar in nats."""
        z = drawn(pair, x, y)["z1"][1]
        simulated = self._prior(x).sample((len(x),))
        return self.critic.loss((x, z), (self.simulate(simulated), simulated))

    @torch.no_grad()
    def simulate(self, z: Tensor) -> Tensor:
        """A run of the simulator for every z `[..., z_dim]`: `[..., D]`."""
        return self.simulator(z)

    def _prior(self, x: Tensor) -> TorchDistribution:
        return GaussianDistribution(x.new_zeros(self.z_dim), x.new_ones(self.z_dim)).to_event(1)

    def _likelihood(self, z: Tensor) -> Simulated:
        weights = dict(self.encoder.named_parameters())  # those of this run, should they be draws

        def log_ratio(x: Tensor) -> Tensor:
            q = torch.func.functional_call(self.encoder, weights, (x,)).base_dist
            loc, scale = q.loc.detach().to(z), q.scale.detach().to(z)  # the score of q is the guide's alone
            held = GaussianDistribution(loc, scale).to_event(1)
            return held.log_prob(z) - self._prior(x).log_prob(z) - self.critic(x, z)

        return Simulated(self.simulate, z, self.x_dim, log_ratio)

    def _check_simulator(self) -> None:
        z = torch.zeros(2, 3, self.z_dim)
        try:
            with torch.random.fork_rng(devices=[]):
                found = tuple(self.simulate(z).shape)
        except Exception as error:
            raise ValueError(f"the simulator fails on z of shape {tuple(z.shape)}: {error}") from error
        if found != (2, 3, self.x_dim):
            raise ValueError(
                f"the simulator makes {found} of z of shape {tuple(z.shape)}; expected {(2, 3, self.x_dim)}: z and x "
                "are its last dim, and the dims before it stay"
            )


class Simulated(TorchDistribution):
    """The law of a simulator given z, with a log-density relative to that of the data, which is estimated.

    Args:
        simulate: z `[..., z]` -> x `[..., D]`.
        z: `[..., B, z]`.
        x_dim: D.
        log_ratio: x `[..., B, D]` -> nats `[..., B]`.
    """

    arg_constraints = {}  # noqa: RUF012, as torch has it
    support = constraints.real_vector

    def __init__(self, simulate, z: Tensor, x_dim: int, log_ratio: Callable[[Tensor], Tensor], batch_shape=None):
        self.simulate, self.z, self.log_ratio = simulate, z, log_ratio
        shape = z.shape[:-1] if batch_shape is None else batch_shape
        super().__init__(shape, torch.Size([x_dim]), validate_args=False)

    def expand(self, batch_shape, _instance=None) -> Simulated:
        return Simulated(self.simulate, self.z, self.event_shape[0], self.log_ratio, torch.Size(batch_shape))

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008, as torch has it
        return self.simulate(self.z.expand(*sample_shape, *self.batch_shape, -1))

    @property
    def mean(self) -> Tensor:
        return self.sample(torch.Size([FOR_MEAN])).mean(0)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.log_ratio(value)
