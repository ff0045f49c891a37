"""Every rule of a structure, broken once."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_lvae import VAE, ContractError, check
from pyro_lvae.conditionals import Normal
from pyro_lvae.nets import MLP
from pyro_lvae.traces import generate


class Good(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc, self.dec = nn.Linear(6, 2), nn.Linear(2, 6)

    def plate(self, x):
        return pyro.plate("data", len(x), dim=-1)

    def prior(self, x):
        return dist.Normal(x.new_zeros(2), 1.0).to_event(1)

    def likelihood(self, z):
        return dist.Bernoulli(logits=self.dec(z)).to_event(1)

    def posterior(self, x):
        return dist.Normal(self.enc(x), 1.0).to_event(1)

    def model(self, x, y=None):
        with self.plate(x):
            z = pyro.sample("z1", self.prior(x))
            pyro.sample("x", self.likelihood(z), obs=x)

    def guide(self, x, y=None):
        with self.plate(x):
            pyro.sample("z1", self.posterior(x))


class NoEvent(Good):
    def prior(self, x):
        return dist.Normal(x.new_zeros(len(x), 2), 1.0)

    def plate(self, x):
        return pyro.plate("rows", len(x), dim=-2)


class ForgotToEvent(Good):
    def prior(self, x):
        return dist.Normal(x.new_zeros(2), 1.0)


class WrongShape(Good):
    """As many latent dims as rows: Pyro itself sees nothing wrong."""

    def __init__(self):
        super().__init__()
        self.enc, self.dec = nn.Linear(6, 4), nn.Linear(4, 6)

    def prior(self, x):
        return dist.Normal(x.new_zeros(4), 1.0)

    def posterior(self, x):
        return dist.Normal(self.enc(x), 1.0)


class OtherName(Good):
    def model(self, x, y=None):
        with self.plate(x):
            z = pyro.sample("z1", self.prior(x))
            pyro.sample("pixels", self.likelihood(z), obs=x)


class GuideMisses(Good):
    def guide(self, x, y=None):
        self.enc(x)


class Choice(Good):
    """A mixture, whose component the model alone has."""

    asked = None

    def component(self, x):
        return dist.Bernoulli(x.new_tensor(0.5))

    def model(self, x, y=None):
        with self.plate(x):
            c = pyro.sample("c", self.component(x), infer={"enumerate": self.asked})
            z = pyro.sample("z1", self.prior(x))
            pyro.sample("x", self.likelihood(z + c[..., None]), obs=x)


class Sequential(Choice):
    asked = "sequential"


class EnumeratesNormal(Choice):
    asked = "parallel"

    def component(self, x):
        return dist.Normal(x.new_tensor(0.0), 1.0)


class LayersInAList(Good):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(6, 2)]

    def posterior(self, x):
        return dist.Normal(self.layers[0](x), 1.0).to_event(1)


class NotSetUp(Good):
    def __init__(self):
        pass


class NegativeScale(Good):
    def posterior(self, x):
        return dist.Normal(self.enc(x), -1.0).to_event(1)


class WrongWidth(Good):
    def posterior(self, x):
        return dist.Normal(self.enc(x[:, :5]), 1.0).to_event(1)


class MisnamedInTheModel(Good):
    def model(self, x, y=None):
        with pyro.plate("batch", len(x), dim=-1):
            pyro.sample("x", self.likelihood(pyro.sample("z1", self.prior(x))), obs=x)


class GuideHasMore(Good):
    def guide(self, x, y=None):
        with self.plate(x):
            pyro.sample("z1", self.posterior(x))
            pyro.sample("z9", self.posterior(x))


class GuideObserves(Good):
    def guide(self, x, y=None):
        with self.plate(x):
            pyro.sample("z1", self.posterior(x), obs=x[:, :2])


class NoPlate(Good):
    def model(self, x, y=None):
        z = pyro.sample("z1", self.prior(x))
        pyro.sample("x", self.likelihood(z).to_event(0), obs=x[0])


class WrongDim(Good):
    def plate(self, x):
        return pyro.plate("data", len(x), dim=-2)

    def prior(self, x):
        return dist.Normal(x.new_zeros(len(x), 1, 2), 1.0).to_event(1)

    def posterior(self, x):
        return dist.Normal(self.enc(x)[:, None], 1.0).to_event(1)

    def likelihood(self, z):
        return dist.Bernoulli(logits=self.dec(z)).to_event(1)


class LatentOutside(Good):
    def model(self, x, y=None):
        z = pyro.sample("z1", self.prior(x).expand([len(x)]))
        with self.plate(x):
            pyro.sample("x", self.likelihood(z), obs=x)


class GuideOutside(Good):
    def guide(self, x, y=None):
        pyro.sample("z1", self.posterior(x))


class EnumeratedOutside(Good):
    def model(self, x, y=None):
        c = pyro.sample("c", dist.Bernoulli(x.new_tensor(0.5)), infer={"enumerate": "parallel"})
        with self.plate(x):
            z = pyro.sample("z1", self.prior(x))
            pyro.sample("x", self.likelihood(z + c), obs=x)


class Scaled(Good):
    def model(self, x, y=None):
        with pyro.poutine.scale(scale=0.5):
            super().model(x)


class KnowsN(Good):
    def plate(self, x):
        return pyro.plate("data", 100, subsample_size=len(x), dim=-1)


class UsesParam(Good):
    def guide(self, x, y=None):
        loc = pyro.param("loc", torch.zeros(2))
        with self.plate(x):
            pyro.sample("z1", dist.Normal(loc + self.enc(x), 1.0).to_event(1))


class UsesModule(Good):
    def model(self, x, y=None):
        pyro.module("net", self)
        super().model(x)


class ReadsData(Good):
    def likelihood(self, z):
        return dist.Bernoulli(logits=self.dec(z) + self.seen).to_event(1)

    def model(self, x, y=None):
        self.seen = x.mean()
        self.seen = x
        super().model(x)


class Auxiliary(Good):
    """r(a | x, z) follows x in the model, and q(z | x, a) takes up a in the guide (Maaloe et al. 2016)."""

    def model(self, x, y=None):
        with self.plate(x):
            z = pyro.sample("z1", self.prior(x))
            seen = pyro.sample("x", self.likelihood(z), obs=x)
            pyro.sample("a", dist.Normal(self.read(x, seen) + z.sum(-1, keepdim=True), 1e-3).to_event(1))

    def guide(self, x, y=None):
        with self.plate(x):
            a = pyro.sample("a", dist.Normal(x, 1.0).to_event(1))
            pyro.sample("z1", dist.Normal(self.enc(a), 1.0).to_event(1))

    def read(self, x, seen):
        return seen


class AuxiliaryReadsArgument(Auxiliary):
    def read(self, x, seen):
        return x


class AuxiliaryAndReadingPrior(Auxiliary):
    def prior(self, x):
        return dist.Normal(self.enc(x), 1.0).to_event(1)


class LabelledAuxiliary(Auxiliary):
    """The label is a site, and the auxiliary variable follows x and it."""

    def model(self, x, y=None):
        with self.plate(x):
            label = pyro.sample("y", dist.Bernoulli(x.new_tensor(0.5)), obs=y)
            z = pyro.sample("z1", self.prior(x))
            seen = pyro.sample("x", self.likelihood(z + label.unsqueeze(-1)), obs=x)
            pyro.sample("a", dist.Normal(seen + label.unsqueeze(-1), 1.0).to_event(1))


class TorchBatchNorm(Good):
    def __init__(self):
        super().__init__()
        self.dec = nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5), nn.Linear(5, 6))


class NoParticles(Good):
    def likelihood(self, z):
        return dist.Bernoulli(logits=self.dec(z.reshape(len(self.rows), 2))).to_event(1)

    def model(self, x, y=None):
        self.rows = x
        super().model(x)


class MixesRows(Good):
    """The guide centres the batch, in evaluation mode too."""

    def guide(self, x, y=None):
        super().guide(x - x.mean(0))


class Crashes(Good):
    def model(self, x, y=None):
        raise RuntimeError("out of cheese")


class NoLabels(Good):
    def model(self, x):
        super().model(x)


class NoGuide(nn.Module):
    def model(self, x, y=None): ...


class Pair:
    def model(self, x, y=None): ...

    def guide(self, x, y=None): ...


BROKEN = {
    NoEvent: r"site 'z1': inside plate\(s\) \['rows'\]",
    ForgotToEvent: r"Shape mismatch inside plate\('data'\) .*; did you forget .to_event\(1\)\?",
    WrongShape: r"site 'z1': log_prob has shape \(4, 4\) .*, expected \(4,\); did you forget .to_event\(1\)\?",
    OtherName: r"the model observes \['pixels'\], expected \"x\"",
    GuideMisses: "site 'z1': the model samples it and the guide does not",
    GuideHasMore: "site 'z9': the guide samples it and the model does not",
    GuideObserves: "site 'z1': observed in the guide",
    NoPlate: "site 'x': outside the data plate",
    WrongDim: "plate 'data' has size 4 at dim -2, expected 4 at dim -1",
    LatentOutside: r"site 'z1': outside the data plate in the model, with batch shape \(4,\); put it in",
    GuideOutside: "site 'z1': outside the data plate in the guide",
    EnumeratedOutside: "site 'c': enumerated outside the data plate",
    Scaled: "site 'z1': scaled by 0.5 in the model; leave KL weights",
    KnowsN: "site 'z1': scaled by 25 in the model",
    UsesParam: r"pyro.param or pyro.module is used \(loc\)",
    UsesModule: r"pyro.param or pyro.module is used \(net\$\$\$dec.bias, net\$\$\$dec.weight",
    ReadsData: "site 'x': its distribution in the model changes with x",
    AuxiliaryReadsArgument: r"site 'a': its distribution .* changes with x; .* what pyro.sample\(\"x\", ...\) returns",
    Choice: r"site 'c': .* in the guide too, or mark it infer={\"enumerate\": \"parallel\"} in the model",
    Sequential: r"site 'c': marked infer={\"enumerate\": 'sequential'} in the model; write \"parallel\"$",
    EnumeratesNormal: r"site 'c': marked to be enumerated in the model, and a Normal of event shape \(\) cannot be",
    LayersInAList: r"tensors of shapes \[\((2, 6|2,)\), .* keep layers as attributes or in an nn.ModuleList",
    NotSetUp: r"let it begin with super\(\).__init__\(\)",
    NegativeScale: r"invalid values: \(test_contract.py:\d+\) NaN or out of range; .* softplus or exp",
    WrongWidth: r"cannot be multiplied \(4x5 and 6x2\) \(test_contract.py:\d+\); a layer was made for rows, or",
    MisnamedInTheModel: "the plate of the data is called 'batch'; write pyro.plate",
    AuxiliaryAndReadingPrior: "site 'z1': its distribution in the model changes with x",
    NoParticles: r"leading particle dim \[2, B, z\] must pass through model and guide: RuntimeError",
    TorchBatchNorm: "; torch's batch norm takes no dim of particles, pyro_lvae.nets.BatchNorm does",
    MixesRows: "site 'z1': the density of a row in the guide changes with the rows beside it",
    Crashes: r"model and guide must run on x of shape \(4, 6\): RuntimeError: out of cheese \(test_contract.py:",
    NoLabels: r"model\(x\) must take labels too",
    NoGuide: r"there is no method guide\(x, y=None\)",
    Pair: "a structure is an nn.Module, this is a Pair",
}


@pytest.fixture
def x6():
    return (torch.rand(5, 6) > 0.5).float()


def test_a_good_structure_passes(x6):
    check(Good(), x6)


class FollowsAGradient(Good):
    """Its guide sees how a network's output changes with x; the leaf behind that is made in each call."""

    def posterior(self, x):
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.enc(leaf).square().sum(), leaf, create_graph=True)
        return dist.Normal(self.enc(x + slope), 1.0).to_event(1)


class GlobalPlate(Good):
    """As many global scales as the rows that are looked at; the plate of the data has its name in the model."""

    def both(self, x):
        with pyro.plate("components", 4):
            pyro.sample("s", dist.Normal(x.new_tensor(0.0), 1.0))

    def model(self, x, y=None):
        self.both(x)
        super().model(x)

    def guide(self, x, y=None):
        self.both(x)
        super().guide(x)


class SequentialInBoth(Sequential):
    def guide(self, x, y=None):
        with self.plate(x):
            pyro.sample("c", self.component(x), infer={"enumerate": "sequential"})
            pyro.sample("z1", self.posterior(x))


def test_what_only_looks_like_a_broken_rule_passes(x6):
    check(FollowsAGradient(), x6.clone().requires_grad_())
    check(SequentialInBoth(), x6)  # which TraceEnum_ELBO enumerates
    with pytest.raises(ContractError) as caught:
        check(GlobalPlate(), x6)
    assert "site 's': inside plate(s) ['components']" in str(caught.value)
    assert "called" not in str(caught.value)


class Point(Good):
    """A point mass, whose rows differ by rounding, alone and among others."""

    def guide(self, x, y=None):
        with self.plate(x):
            pyro.sample("z1", dist.Delta(self.enc(x) + 1e-6 * len(x)).to_event(1))


def test_a_point_is_not_taken_for_one_that_depends_on_other_rows(x6):
    check(Point(), x6)


def test_auxiliary_variables_may_follow_the_site_x(x6):
    check(Auxiliary(), x6)
    check(Auxiliary(), torch.zeros(4, 6))
    check(LabelledAuxiliary(), x6, torch.ones(5))


@pytest.mark.parametrize("structure", [Auxiliary, AuxiliaryAndReadingPrior])
def test_only_the_sites_that_read_the_argument_are_named(structure, x6):
    faulty = structure()
    faulty.read = lambda x, seen: x
    with pytest.raises(ContractError) as caught:
        check(faulty, x6)
    named = ["a"] if structure is Auxiliary else ["z1", "a"]
    assert [sentence.split(":")[0] for sentence in caught.value.broken] == [f"site {name!r}" for name in named]


def test_a_drawn_x_is_followed_by_its_auxiliary_variable(x6):
    """x is drawn, not the one given, and a is within 6 standard deviations of what follows from it."""
    found = generate(Auxiliary(), x6, {})
    (_, z), (_, x), (_, a) = found["z1"], found["x"], found["a"]
    assert not torch.equal(x, x6)
    torch.testing.assert_close(a, x + z.sum(-1, keepdim=True), atol=6e-3, rtol=0)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda c: c.__name__)
def test_a_broken_rule_is_said_in_a_sentence(broken, x6):
    with pytest.raises(ContractError, match=BROKEN[broken]) as caught:
        check(broken(), x6)
    assert all("\n" not in sentence for sentence in caught.value.broken)


class Misnamed(nn.Module):
    """The data plate under another name."""

    def model(self, x, y=None):
        with pyro.plate("batch", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), torch.ones(x.shape[1])).to_event(1), obs=x)

    def guide(self, x, y=None):
        with pyro.plate("batch", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x[:, :2], 1.0).to_event(1))


def test_a_plate_of_another_name_is_one_rule(x6):
    with pytest.raises(ContractError) as caught:
        check(Misnamed(), x6)
    assert caught.value.broken == [
        "the plate of the data is called 'batch'; write pyro.plate(\"data\", len(x), dim=-1)"
    ]


def test_every_broken_rule_is_said_at_once(x6):
    class Many(Scaled, UsesParam):
        pass

    with pytest.raises(ContractError) as caught:
        check(Many(), x6)
    text = str(caught.value)
    assert "scaled by 0.5" in text
    assert "pyro.param" in text
    assert f"breaks {len(caught.value.broken)} rule" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:, :5], r"or for a latent, of another size \(x_dim is to be the columns of x\)"),
        (lambda x: 0.5 * x, r"binarise the data, or pass another likelihood \(pyro_lvae.conditionals.Normal"),
        (lambda x: x.double(), r"must have one dtype: x.float\(\), or structure.double\(\)"),
    ],
)
def test_rows_of_another_size_or_dtype_name_the_remedy(change, message, x6):
    with pytest.raises(ContractError, match=message):
        check(Good(), change(x6))


def test_data_outside_the_likelihoods_support_names_the_remedy(x6):
    with pytest.raises(ContractError, match="binarise the data, or pass another likelihood"):
        check(Good(), x6 + 0.5)


@pytest.mark.parametrize("x", [torch.zeros(3, 2, 2), torch.zeros(0, 6), [[1.0]]])
def test_data_must_be_rows(x):
    with pytest.raises(ContractError, match=r"x must be a tensor \[B, D\]"):
        check(Good(), x)


def test_reading_the_data_shows_on_constant_data_too():
    with pytest.raises(ContractError, match="changes with x"):
        check(ReadsData(), torch.zeros(4, 6))


def test_leaves_no_trace(x6):
    good = Good()
    good.norm = nn.BatchNorm1d(6)
    state, rng = {k: v.clone() for k, v in good.state_dict().items()}, torch.get_rng_state()
    check(good, x6)
    assert torch.equal(torch.get_rng_state(), rng)
    assert good.training
    assert all(torch.equal(v, state[k]) for k, v in good.state_dict().items())
    with pytest.raises(ContractError):
        check(UsesParam(), x6)
    assert len(pyro.get_param_store()) == 0


class OneRow(VAE):
    """Its prior is computed once for all rows, by a network with batch norm."""

    def __init__(self):
        super().__init__(12, 3, 8)
        self.of_prior = nn.Sequential(MLP(2, 4), Normal(4, 3))

    def model(self, x, y=None):
        prior = self.of_prior(x.new_zeros(1, 2))
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z1", prior.expand([len(x)]))
            return pyro.sample("x", self.likelihood(self.decoder(z)), obs=x)


def test_what_runs_in_evaluation_mode_alone_is_refused(x):
    structure = OneRow()
    before = copy.deepcopy(structure.state_dict())
    with pytest.raises(ContractError, match="run in training mode too: .*; batch norm needs several rows"):
        check(structure, x)
    assert all(torch.equal(v, before[k]) for k, v in structure.state_dict().items())


def test_data_that_are_not_finite_are_named(x):
    with pytest.raises(ContractError, match="x holds NaN"):
        check(VAE(12, 3, 8), x * float("nan"))


@pytest.mark.parametrize(
    ("make", "x", "message"),
    [
        (lambda: Good, torch.zeros(3, 6), r"this is the class Good; give one of its instances, Good\(\.\.\.\)"),
        (Good, torch.zeros(3, 6).numpy(), r"is ndarray; torch.as_tensor\(array\) or data.x_train is one"),
    ],
)
def test_what_was_meant_is_named(make, x, message):
    with pytest.raises(ContractError, match=message):
        check(make(), x)
