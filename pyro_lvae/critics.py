"""Critics: networks that learn the log-ratio of two densities from draws of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pyro
import torch
from pyro.distributions import Unit
from torch import Tensor, nn
from torch.nn import functional as F

from .nets import MLP, linear

PRIOR_OF, PENALTY = "prior_of", "penalty"  # in `infer` of a factor: what it is a part of


class Critic(nn.Module):
    r"""T(u), which learns log a(u) - log b(u) by telling draws of a from draws of b.

        T* = argmax_T E_a[log sigma(T(u))] + E_b[log(1 - sigma(T(u)))] = log a - log b

    (Goodfellow et al. 2014; Sugiyama et al. 2012, density-ratio estimation by classification.) Its parameters are no
    part of an ELBO, which could be made as large as one likes by them: they have `requires_grad=False`, but within
    `critics_learning`, where the critic's own loss is minimised.

    Args:
        in_dim: size of u, all inputs side by side.
        hidden_dim: width of its layers.
        num_hidden: number of them.
        activation: makes the nonlinearity.

    >>> critic = Critic(3, 8)
    >>> critic(torch.zeros(5, 4, 2), torch.zeros(4, 1)).shape
    torch.Size([5, 4])
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int = 256,
        num_hidden: int = 3,
        *,
        activation: Callable[[], nn.Module] = nn.LeakyReLU,
    ):
        super().__init__()
        mlp = MLP(in_dim, hidden_dim, num_hidden, batch_norm=False, activation=activation)
        self.net = nn.Sequential(mlp, linear(mlp.out_dim, 1))
        self.requires_grad_(False)

    def forward(self, *inputs: Tensor) -> Tensor:
        """T `[...]`, nats, for inputs `[..., u_i]` whose leading dims broadcast."""
        leading = torch.broadcast_shapes(*(u.shape[:-1] for u in inputs))
        return self.net(torch.cat([u.expand(*leading, -1) for u in inputs], -1)).squeeze(-1)

    def loss(self, of_a: tuple[Tensor, ...], of_b: tuple[Tensor, ...]) -> Tensor:
        """The logistic loss, a scalar in nats: 2 log 2 where the critic knows nothing.

        Args:
            of_a, of_b: draws of a and of b, as `forward` takes them.
        """
        return logistic_loss(self(*of_a), self(*of_b))


def logistic_loss(t_a: Tensor, t_b: Tensor) -> Tensor:
    """`Critic.loss`, given T at draws of a and of b."""
    return F.softplus(-t_a).mean() + F.softplus(t_b).mean()


class PairCritic(Critic):
    r"""T(x, z), which passes x through layers of its own first, once however many z there are for it.

    Args:
        x_dim: size of x `[..., x_dim]`.
        z_dim: size of z `[..., z_dim]`.
        hidden_dim, num_hidden, activation: of both parts, as for `Critic`.

    >>> PairCritic(4, 2, 8)(torch.zeros(5, 4), torch.zeros(3, 5, 2)).shape
    torch.Size([3, 5])
    """

    def __init__(
        self,
        x_dim: int,
        z_dim: int,
        hidden_dim: int = 256,
        num_hidden: int = 2,
        *,
        activation: Callable[[], nn.Module] = nn.LeakyReLU,
    ):
        super().__init__(hidden_dim + z_dim, hidden_dim, num_hidden, activation=activation)
        self.features = MLP(x_dim, hidden_dim, num_hidden, batch_norm=False, activation=activation)
        self.requires_grad_(False)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """T(x, z) `[...]`, nats."""
        return super().forward(self.features(x), z)


def factor(name: str, log_factor: Tensor, *, prior_of: str | None = None) -> None:
    """`pyro.factor(name, log_factor)` of a model, which says what it is a part of.

    Args:
        log_factor: nats, `[..., B]`; stands inside the data plate.
        prior_of: the latent site whose prior is multiplied by it: it is annealed with that site, and belongs to its KL.
            Left out, it is a penalty of the training, and no part of a bound on log p(x).
    """
    unit = Unit(log_factor)
    mark = {PENALTY: True} if prior_of is None else {PRIOR_OF: prior_of}
    pyro.sample(name, unit, obs=unit.sample(), infer={"is_auxiliary": True} | mark)


def has_critic(structure: nn.Module) -> bool:
    """Whether there is something in it that learns beside the ELBO."""
    return any(isinstance(m, Critic) for m in structure.modules())


def critic_loss(structure: nn.Module, x: Tensor, y: Tensor | None = None) -> Tensor:
    """The loss of all critics in a structure on a batch: a scalar in nats.

    Every module with a method `critic_loss(pair, x, y)` is asked, where `pair` is the structure as a whole, so that
    draws are those of the model and guide as they are, whatever stands around.
    """
    learners = [m for m in structure.modules() if callable(getattr(m, "critic_loss", None))]
    if not learners:
        raise ValueError(
            f"{type(structure).__name__} holds a Critic and no critic_loss(pair, x, y) that would train it; write "
            "one, or make it a network of another kind"
        )
    return sum(m.critic_loss(structure, x, y) for m in learners)


@contextmanager
def critics_learning(structure: nn.Module) -> Iterator[list[nn.Parameter]]:
    """The parameters of all critics in a structure; they take gradients for as long as the block lasts."""
    critics = [m for m in structure.modules() if isinstance(m, Critic)]
    for critic in critics:
        critic.requires_grad_(True)
    try:
        yield [p for critic in critics for p in critic.parameters()]
    finally:
        for critic in critics:
            critic.requires_grad_(False)
