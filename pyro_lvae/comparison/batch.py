"""Estimators side by side on one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pyro
from pyro.infer import ELBO
from torch import Tensor, nn

from ..evaluate import (
    ais_log_likelihood,
    bidirectional_monte_carlo,
    check_annealable,
    log_likelihood,
    refuse_global_sites,
)
from ..evaluate.chunks import args_of, check_rows
from ..objectives import label
from ..results import Comparison
from ..traces import fixed_noise
from .chosen import ESTIMATORS, check_counts, chosen_estimators, first_sites
from .gradients import Measured, many_particles, parameter_groups, reference_gradient


def compare(
    structure: nn.Module,
    x: Tensor,
    estimators: str | Sequence[ELBO] = ESTIMATORS,
    *,
    num_repeats: int = 100,
    num_samples: int = 5000,
    reference_particles: int = 1000,
    reference_repeats: int = 4,
    num_temperatures: int = 100,
    num_chains: int = 16,
    y: Tensor | None = None,
    seed: int = 0,
) -> Comparison:
    """Measure estimators on one structure, trained or not, and one batch.

    Everything runs in evaluation mode, so that batch norm is a fixed function and all figures are
    of the same model. The structure's weights, modes and gradients stay as they are. Parameters fall into those
    that log p alone reads ("model"), those that log q alone reads ("guide"), and "shared" ones.

    Args:
        x: the batch `[B, D]`, binary where the likelihood asks for it.
        estimators: objects, or a list in words such as `"IWAE(50), DReG(50)"`.
        num_repeats: draws of each value and gradient; they are taken in turn, so that their times compare.
        num_samples: importance samples a row of the log p(x) that gaps are measured from.
        reference_particles, reference_repeats: the gradient of log p(x) is that of IWAE with so many
            particles (of `RWS`, where a site cannot be reparameterised), averaged over so many draws.
        num_temperatures, num_chains: of annealed importance sampling from the guide, and of bidirectional Monte
            Carlo on data drawn from the model; 0 temperatures leave both out.
        y: labels `[B, ...]`, where the structure takes them.
        seed: of all noise; the caller's random state stays as it is.

    Raises:
        ValueError: an estimator that was named does not suit the structure; an argument is out of range.
    """
    repeats = dict(
        num_repeats=num_repeats, reference_repeats=reference_repeats, reference_particles=reference_particles
    )
    check_counts(2, **repeats)
    check_counts(1, num_samples=num_samples, num_chains=num_chains)
    check_counts(0, num_temperatures=num_temperatures)
    x, y = check_rows(structure, x, y)
    args = args_of(x, y, slice(None))
    sites = first_sites(structure, args)  # with Pyro's validation: data outside the support are refused
    refuse_global_sites(sites)
    with fixed_noise(x.device, seed), pyro.validation_enabled(False), _own_gradients(structure):
        chosen, skipped = chosen_estimators(estimators, sites)
        if num_temperatures:
            try:
                check_annealable(structure, x, y, start="guide")
            except ValueError as error:
                skipped["annealed importance sampling"], num_temperatures = str(error), 0
        groups = parameter_groups(structure, *args)
        many = many_particles(reference_particles, sites)
        reference = reference_gradient(many, structure, args, groups, reference_repeats)
        measured = {label(e): Measured(e, structure, args, groups, sites) for e in chosen}
        for _ in range(num_repeats):
            for each in measured.values():
                each.draw()
        gap = None
        if num_temperatures:
            options = dict(num_chains=num_chains, num_temperatures=num_temperatures, start="guide", y=y)
            gap = bidirectional_monte_carlo(structure, x, **options).gap.mean().item()
        return Comparison(
            structure=type(structure).__name__,
            num_rows=len(x),
            num_parameters={g: sum(p.numel() for p in members) for g, members in groups.items()},
            log_p=log_likelihood(structure, x, num_samples, y=y).mean().item(),
            num_samples=num_samples,
            log_p_annealed=ais_log_likelihood(structure, x, **options).mean().item() if num_temperatures else None,
            annealed_gap=gap,
            reference_particles=reference_particles,
            reference_norm={group: moments.norm() for group, moments in reference.items()},
            rows=[each.quality(reference) for each in measured.values()],
            skipped=skipped,
        )


@contextmanager
def _own_gradients(structure: nn.Module) -> Iterator[None]:
    """The parameters' gradients, as they were before."""
    held = [(p, p.grad) for p in structure.parameters()]
    try:
        yield
    finally:
        for p, gradient in held:
            p.grad = gradient
