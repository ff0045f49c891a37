"""Two processes against one: the same losses and weights, to float rounding."""

import os
import subprocess
import sys

import pytest
import torch

from pyro_lvae import GECO, VAE
from pyro_lvae.distributed import Processes

pytest.importorskip("accelerate")

# Its noise is a function of the row, so that a row has the same wherever it is drawn.
SCRIPT = """
import sys, warnings
import pyro, torch, pyro.distributions as dist
from pyro_lvae import SampledELBO, Dataset, LadderVAE, fit, linear
from pyro_lvae.distributed import processes

class Same(dist.Normal):
    def rsample(self, sample_shape=torch.Size()):
        return self.loc + self.scale * torch.sin(5 * self.loc.detach())
    def expand(self, batch_shape, _instance=None):
        return Same(self.loc.expand(batch_shape), self.scale.expand(batch_shape))

import pyro_lvae.structures.ladder as ladder
ladder.normal = lambda mu, variance: Same(mu, variance.sqrt()).to_event(1)

class Weighted(LadderVAE):
    def model(self, x, y=None):
        pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        return super().model(x)
    def guide(self, x, y=None):
        pyro.sample("w", Same(self.likelihood.logits.bias.sum(), torch.ones(())))
        super().guide(x)

out, batch_norm, cls, compile = sys.argv[1], sys.argv[2] == "bn", eval(sys.argv[3]), sys.argv[4] == "compile"
if compile:
    import torch._inductor
    torch._inductor.compile = lambda graph, inputs, options=None: graph
torch.set_default_dtype(torch.double)
torch.manual_seed(0)
rows = (torch.rand(51, 12) > 0.5).double()
data = Dataset("rows", rows[:46], rows[46:])
structure = cls(12, (5, 3), (16, 8), batch_norm=batch_norm)
order = torch.randperm(46)
Dataset.order = lambda self: order
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    history = fit(
        structure, data, epochs=3, batch_size=16, beta=linear(0.1, 1, epochs=2), clip_norm=5.0, clip_value=0.4,
        compile=compile, callbacks=(), out=out if len(sys.argv) > 5 else None, resume="resume" in sys.argv[5:],
    )
if processes().is_first:
    found = {"objective": [m.objective for m in history], "said": " ".join(str(w.message) for w in said)}
    torch.save({**found, **structure.state_dict()}, out + ".pt")
"""


def run(tmp_path, name, processes, *options):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    out = str(tmp_path / name)
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([*launch, str(script), out, *options], env=env, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out + ".pt", weights_only=True)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("plain", "LadderVAE", "eager"), marks=pytest.mark.slow),
        ("bn", "LadderVAE", "compile"),  # which stays eager, and says so
        ("plain", "Weighted", "compile"),
    ],
    ids=["plain", "batch-norm", "global-site-compiled"],
)
def test_two_processes_are_one_with_the_whole_batch(tmp_path, options):
    one, two = run(tmp_path, "one", 1, *options), run(tmp_path, "two", 2, *options)
    assert two["objective"] == pytest.approx(one["objective"], rel=1e-9)
    assert ("batch norm over several processes cannot be compiled" in two["said"]) == (options[0] == "bn")
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(two[name], value, rtol=1e-6, atol=1e-8)


CRITICS = """
import sys
from functools import partial
import torch
from pyro_lvae import VAE, Dataset, FactorVAE, OptimalPriorVAE, fit
from pyro_lvae.distributed import processes

torch.manual_seed(0)
rows = (torch.rand(46, 12) > 0.5).float()
base = partial(VAE, z_dim=3, hidden_dim=8)
data = Dataset("rows", rows[:40], rows[40:])
no_buffers = partial(VAE, z_dim=3, hidden_dim=8, batch_norm=False)
fit(FactorVAE(12, no_buffers, critic_hidden_dim=8), data, epochs=1, batch_size=20, callbacks=())
structure = FactorVAE(12, partial(OptimalPriorVAE, base=base, critic_hidden_dim=8), critic_hidden_dim=8)
fit(structure, data, epochs=2, batch_size=20, callbacks=())
torch.save(structure.state_dict(), f"{sys.argv[1]}-{processes().rank}.pt")
"""


def test_critics_in_two_processes_stay_one(tmp_path):
    """Weights, and what critics keep beside them (log Z), are the same in both after training."""
    script = tmp_path / "script.py"
    script.write_text(CRITICS)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, str(script), str(tmp_path / "state")]
    done = subprocess.run(command, env=env, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    states = [torch.load(tmp_path / f"state-{rank}.pt", weights_only=True) for rank in (0, 1)]
    changed = [name for name, value in states[0].items() if not torch.equal(value, states[1][name])]
    assert not changed
    assert any(name.endswith("log_normalizer") and value != 0 for name, value in states[0].items())


def test_command_line_in_two_processes_resumed_by_one(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    rest = ["-m", "pyro_lvae", "train", "--out", str(tmp_path / "run"), "--num_samples", "5", "--num_images", "20"]
    rest += ["--structure", "LadderVAE", "--structure.z_dims", "[4,2]", "--structure.hidden_dims", "[16,8]"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    warm_up = ["--beta.length", "1"]
    two = [*launch, *rest, *warm_up, "--epochs", "2"]
    one = [sys.executable, *rest, "--resume", "--epochs", "3"]
    for command in (two, one):
        done = subprocess.run(command, env=env, timeout=300, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert (tmp_path / "run" / "report.html").exists()


def test_shares_cover_the_batch():
    rows = torch.arange(7)
    assert sorted(torch.cat([Processes(r, 3).share(rows) for r in range(3)]).tolist()) == list(range(7))


def test_what_several_processes_cannot_do():
    two = Processes(0, 2)
    with pytest.raises(ValueError, match="choose another batch_size"):
        two.check(VAE(12, 3, 8), None, 45, 1)
    with pytest.raises(ValueError, match="GECO learns a multiplier"):
        two.check(VAE(12, 3, 8), GECO(3.0), 45, 10)
    foreign = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="batch norm in 0 "):
        two.check(foreign, None, 45, 10)
