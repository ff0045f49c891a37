"""A posterior over the weights of any structure, put around it from outside."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import get_args

import pyro
import torch
from pyro.nn import PyroModule, PyroSample, pyro_method
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution

from ..annealing import subsample
from ..contract import is_set_up, takes_labels
from ..traces import CLOSED_FORM, evaluating, fixed_noise, guide_sites, log_densities
from .distributions import DiagonalNormal, Draws
from .noise import Drawn, LayerNoise, ManyWeights, Noise
from .posteriors import MeanField, Posterior
from .priors import Normal, Prior

PREFIX = "weights."  # of the sites' names
Where = str | Sequence[str] | Callable[[str, nn.Parameter], bool]


class BayesianWeights(PyroModule):
    r"""Any structure, with distributions in place of points for some or all of its weights w.

        L = N/B sum_b E_q(w) [ELBO(x_b; w)] - KL(q(w) || p(w))

    (Kingma & Welling 2014, appendix F; Blundell et al. 2015.) Itself a structure: a `PyroModule` whose `weights` are
    `PyroSample`s, one for each chosen parameter. Each is a global site `"weights.NAME"`, drawn before the data plate,
    and the structure's own `model` and `guide` run with what was drawn. `fit` counts the KL of the weights once for all
    N rows, and in closed form where there is one; by `beta={"z*": 1.0, "weights.*": linear(0, 1, epochs=20)}` it is
    annealed apart from that of the latents.

    The structure given is copied, and its weights are where the posterior begins: pass an untrained one to start from
    scratch, a trained one to start from its point estimate.

    Args:
        structure: any structure; not changed.
        where: which parameters: `"all"`, names, modules (`"decoder"`) or patterns (`"*.weight"`), one or several, or a
            function `(name, parameter) -> bool`. `generative(structure, x)` gives those that p(x, z) depends on. The
            others stay points.
        prior: `(value, fan_in) -> Prior`, of `pyro_lvae.bayes.priors`.
        posterior: `(value, fan_in) -> Posterior`, of `pyro_lvae.bayes.posteriors`.
        noise: how draws reach the layers while training: `"shared"`, one draw for the batch;
            `"local_reparameterization"` (convolutions take flipout then too) or `"flipout"`, for each datum anew:
            unbiased too, with gradients that are less noisy, but for batch norm, which mixes the data. These need
            independent Normal entries, and act where a layer sees one row a datum (not K particles).
        num_weights: S draws while training, each for a copy of the batch, in batched products.

    Attributes:
        weights: the `PyroModule` of the weights, p(w).
        priors, posteriors: their modules; `prior(name)` and `posterior(name)` give that of a parameter.

    Raises:
        ValueError: `where` fits no parameter, or what it fits cannot be treated so.

    Batch norm in training mode sees the rows of all S draws together.
    """

    def __init__(
        self,
        structure: nn.Module,
        where: Where = "all",
        prior: Callable[[Tensor, int], Prior] = Normal,
        posterior: Callable[[Tensor, int], Posterior] = MeanField,
        *,
        noise: Noise = "shared",
        num_weights: int = 1,
    ):
        super().__init__()
        if noise not in get_args(Noise):
            raise ValueError(f"noise is {noise!r}; expected one of {', '.join(map(repr, get_args(Noise)))}")
        if not isinstance(num_weights, int) or num_weights < 1 or (num_weights > 1 and noise != "shared"):
            raise ValueError(
                f"num_weights={num_weights!r} with noise={noise!r}: give a whole number from 1; several draws need "
                "noise='shared', for the other kinds draw for each datum as it is"
            )
        if not isinstance(structure, nn.Module):
            came = f"the class {structure.__name__}" if isinstance(structure, type) else f"a {type(structure).__name__}"
            raise ValueError(f"structure is {came}; expected an nn.Module with model and guide, an instance")
        if not is_set_up(structure):
            raise ValueError(f"{type(structure).__name__}.__init__ must begin with super().__init__()")
        if not (callable(where) or isinstance(where, (str, Sequence))):
            raise ValueError(f"where is {where!r}; expected names, patterns, or a function of name and parameter")
        _check_makers(prior=prior, posterior=posterior)
        self._modules["structure"] = copy.deepcopy(structure)
        self.noise, self.num_weights = noise, num_weights
        chosen = chosen_parameters(self.structure, where)
        fan_in = _fan_in(self.structure)
        self._places = {name: _places(self.structure, p) for name, p in chosen.items()}
        values = {name: p.detach() for name, p in chosen.items()}
        self.priors = nn.ModuleDict({_key(n): prior(v, fan_in[n]) for n, v in values.items()})
        self.posteriors = nn.ModuleDict({_key(n): posterior(v, fan_in[n]) for n, v in values.items()})
        self.weights = PyroModule()
        for name in chosen:
            setattr(self.weights, name, PyroSample(partial(_prior_of, self.prior(name), PREFIX + name)))
        for module, attribute in (place for places in self._places.values() for place in places):
            module._parameters[attribute] = None
        self._drawn: list[Drawn] = []
        self._check_noise()

    def _pyro_set_supermodule(self, name: str, context) -> None:
        """Within a `PyroModule`, too, the sites are `"weights.NAME"`: guide and prior must agree on them."""

    @property
    def structure(self) -> nn.Module:
        """The wrapped structure; by this way around Pyro, one that is a `PyroModule` keeps the names of its sites."""
        return self._modules["structure"]

    @property
    def names(self) -> list[str]:
        """The parameters that have a distribution."""
        return list(self._places)

    def prior(self, name: str) -> Prior:
        """The prior of a parameter."""
        return self.priors[_key(name)]

    def posterior(self, name: str) -> Posterior:
        """The posterior of a parameter."""
        return self.posteriors[_key(name)]

    def put_posterior(self, name: str, posterior: Posterior) -> None:
        """Give a parameter another posterior."""
        self.posteriors[_key(name)] = posterior

    @property
    def takes_labels(self) -> bool:
        """Whether the structure within is conditional on labels."""
        return takes_labels(self.structure)

    def model(self, x: Tensor, y: Tensor | None = None):
        """p(w) p(x, z | w) for `x` of `[B, D]`."""
        try:
            return self._run(self.structure.model, self.weights_of_model(), x, y)
        finally:
            self._drawn = []  # what was drawn belongs to one step

    def guide(self, x: Tensor, y: Tensor | None = None):
        """q(w) q(z | x, w) for `x` of `[B, D]`."""
        return self._run(self.structure.guide, self.weights_of_guide(), x, y)

    @pyro_method
    def weights_of_model(self) -> dict[str, Tensor]:
        """p(w): samples every weight, with what its prior depends on."""
        with _WeightSites(self.names, self.num_draws):
            return {name: getattr(self.weights, name) for name in self.names}

    def weights_of_guide(self) -> dict[str, Tensor]:
        """q(w): the same sites."""
        self._drawn = []
        with _WeightSites(self.names, self.num_draws):
            for name in self.names:
                self.prior(name).guide(PREFIX + name)
                q = self.posterior(name)()
                moments = (q.loc, q.scale) if isinstance(q, DiagonalNormal) else (None, None)
                self._drawn.append(Drawn(name, pyro.sample(PREFIX + name, q), *moments))
        return {d.name: d.value for d in self._drawn}

    def put(self, weights: dict[str, Tensor]) -> nn.Module:
        """A copy of the wrapped structure, with these weights as its parameters."""
        structure, places = copy.deepcopy((self.structure, self._places))
        for name, value in weights.items():
            parameter = nn.Parameter(value.detach().clone())
            for module, attribute in places[name]:
                module._parameters[attribute] = parameter
        return structure

    def draw(self) -> nn.Module:
        """The wrapped structure with a draw of its weights; noise from torch's default generator."""
        with torch.no_grad():
            return self.put({name: self.posterior(name)().sample() for name in self.names})

    def mean(self) -> nn.Module:
        """The wrapped structure with the posterior means of its weights."""
        return self.put({name: self.posterior(name).mean for name in self.names})

    @property
    def num_draws(self) -> int:
        """Draws of the weights as it stands: S while training, and 1 otherwise."""
        return self.num_weights if self.training else 1

    def _run(self, fn: Callable, weights: dict[str, Tensor], x: Tensor, y: Tensor | None):
        count, batch = self.num_draws, len(x)
        weights = {name: self._without_ones(name, w) for name, w in weights.items()}
        x, y = (t if t is None or count == 1 else t.repeat(count, *[1] * (t.ndim - 1)) for t in (x, y))
        with ExitStack() as stack:
            stack.enter_context(self._using(weights))
            stack.enter_context(self._handler(weights, len(x)))
            if count > 1:
                stack.enter_context(subsample(batch))  # S copies of the rows stand for the rows
            return fn(x) if y is None else fn(x, y)

    def _without_ones(self, name: str, w: Tensor) -> Tensor:
        """A weight as the layer has it: `Predictive` hands it back with a dim of 1 for every plate."""
        lead = w.shape[: w.ndim - self.prior(name).event_dim]
        return w.reshape(w.shape[len(lead) :]) if lead and lead.numel() == 1 else w

    def _handler(self, weights: dict[str, Tensor], rows: int):
        """What the structure runs under: nothing, where plain weights do."""
        if many := [Drawn(n, w) for n, w in weights.items() if w.ndim > self.prior(n).event_dim]:
            return ManyWeights(many, rows // self.num_weights)
        own = [d for d in self._drawn if weights[d.name] is d.value]  # not those that were given from outside
        if self.noise != "shared" and self.training and own:
            return LayerNoise(own, rows, self.noise)
        return ExitStack()

    @contextmanager
    def _using(self, weights: dict[str, Tensor]):
        """The wrapped structure with the weights in the places of its parameters."""
        try:
            for name, value in weights.items():
                for module, attribute in self._places[name]:
                    module._parameters[attribute] = value
            yield
        finally:
            for places in self._places.values():
                for module, attribute in places:
                    module._parameters[attribute] = None

    def _check_noise(self) -> None:
        odd = [n for n in self.names if not isinstance(self.posterior(n)(), DiagonalNormal)]
        if self.noise != "shared" and odd:
            raise ValueError(
                f"noise={self.noise!r} needs independent Normal entries, and the posterior of {odd[0]!r} is "
                f"{type(self.posterior(odd[0])).__name__}; use MeanField, or noise='shared'"
            )

    def __getstate__(self) -> dict:
        # What was drawn belongs to one step: copies and pickles start without it.
        return {**self.__dict__, "_drawn": []}


class _WeightSites(Messenger):
    """At the sites of weights: the KL is taken in closed form, and S draws count 1/S each."""

    def __init__(self, names: Sequence[str], count: int):
        super().__init__()
        self.sites, self.count = {PREFIX + name for name in names}, count

    def _pyro_sample(self, msg: dict) -> None:
        if msg["name"] not in self.sites:
            return
        msg["infer"][CLOSED_FORM] = True
        if self.count > 1:
            msg["fn"], msg["scale"] = Draws(msg["fn"], self.count), msg["scale"] / self.count


def _prior_of(prior: Prior, site: str, weights: PyroModule):
    """What `PyroSample` asks for; no closure, since copies of the whole must have the copied prior."""
    return prior(site)


def _check_makers(**makers) -> None:
    for name, maker in makers.items():
        if isinstance(maker, (nn.Module, Distribution)) or not callable(maker):
            kind, example = {"prior": ("priors", "Normal"), "posterior": ("posteriors", "MeanField")}[name]
            came = repr(maker) if isinstance(maker, str) else f"a {type(maker).__name__}"
            raise ValueError(
                f"{name} is {came}; expected what makes one of a weight and its fan-in, such as the class itself: "
                f"{name}={kind}.{example}, or partial({kind}.{example}, ...) with options, from pyro_lvae.bayes.{kind}"
            )


def chosen_parameters(structure: nn.Module, where: Where) -> dict[str, nn.Parameter]:
    """{name: parameter} that `where` fits; those without a gradient are never meant."""
    named = {n: p for n, p in structure.named_parameters() if p.requires_grad}
    if callable(where):
        chosen = {n: p for n, p in named.items() if where(n, p)}
    else:
        patterns = (where,) if isinstance(where, str) else tuple(where)
        for pattern in patterns:
            if not any(_fits(n, pattern) for n in named):
                raise ValueError(f"where names {pattern!r}, which fits no parameter; {_what_there_is(named)}")
        chosen = {n: p for n, p in named.items() if any(_fits(n, pattern) for pattern in patterns)}
    if not chosen:
        raise ValueError(f"where chooses no parameter; {_what_there_is(named)}")
    if scalars := [n for n, p in chosen.items() if p.ndim == 0]:
        raise ValueError(f"{scalars[0]!r} is a scalar, and a weight has at least one dim; leave it out of where")
    recurrent = [n for n, m in structure.named_modules() if isinstance(m, nn.RNNBase)]
    if odd := [n for n in chosen if n.rpartition(".")[0] in recurrent]:
        raise ValueError(f"{odd[0]!r} is of a recurrent layer, which keeps its weights flat; leave it out of where")
    return chosen


def _what_there_is(named: dict[str, nn.Parameter]) -> str:
    """Of a large network, the modules say more than all of its parameters."""
    if not named:
        return "the structure has none that are trained"
    parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in named))
    return f"the structure's parts are {parts}, and its first parameter is {next(iter(named))}"


def generative(structure: nn.Module, x: Tensor, y: Tensor | None = None) -> list[str]:
    """Names of the parameters theta that p(x, z) depends on, found by running model and guide on a few rows."""
    args = (x[:2],) if y is None else (x[:2], y[:2])
    named = {n: p for n, p in structure.named_parameters() if p.requires_grad}
    with evaluating(structure), fixed_noise(x.device), torch.enable_grad():
        values = {name: value.detach()[None] for name, (_, value) in guide_sites(structure, *args).items()}
        log_p = sum(v.sum() for v in log_densities(structure.model, values, *args, num_particles=1).values())
        found = torch.autograd.grad(log_p, list(named.values()), allow_unused=True)
    return [n for n, g in zip(named, found, strict=True) if g is not None]


def _fits(name: str, pattern: str) -> bool:
    return pattern == "all" or fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def _key(name: str) -> str:
    return f"of/{name.replace('.', '/')}"  # a ModuleDict admits no dots, and no name of its own


def _places(structure: nn.Module, parameter: nn.Parameter) -> list[tuple[nn.Module, str]]:
    """Wherever in the structure a parameter stands."""
    return [(m, a) for m in structure.modules() for a, p in m._parameters.items() if p is parameter]


def _fan_in(structure: nn.Module) -> dict[str, int]:
    """{parameter: inputs of a unit of its layer}; a bias shares its weight's."""
    return {n: _inputs(structure.get_submodule(n.rpartition(".")[0]), p) for n, p in structure.named_parameters()}


def _inputs(layer: nn.Module, p: Tensor) -> int:
    weight = getattr(layer, "weight", None)
    if isinstance(layer, nn.Embedding):
        return 1  # an entry is looked up, not added up
    of = weight if isinstance(weight, Tensor) and p.ndim < 2 <= weight.ndim else p
    if getattr(layer, "transposed", False) and of.ndim > 1:
        of = of.transpose(0, 1)
    return of[0].numel() if of.ndim > 1 else 1  # a gain of batch norm has one input
