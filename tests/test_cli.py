import json
import re
import subprocess
import sys
from inspect import signature

import numpy as np
import pytest
import torch
import yaml

from pyro_lvae import BidirectionalLadderVAE, LadderVAE, __version__
from pyro_lvae.cli import COMMANDS, main
from pyro_lvae.cli.dispatch import FUNCTIONS
from pyro_lvae.structures import STRUCTURES

SMALL = [
    *("--structure.z_dims", "[4,2]", "--structure.hidden_dims", "[16,8]"),
    *("--epochs", "2", "--beta.length", "1", "--num_samples", "5", "--num_images", "20"),
]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def run(tmp_path):
    main(["train", *SMALL, "--out", "run"])
    return tmp_path / "run"


def _fails(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        main(list(argv))
    assert caught.value.code not in (0, None)
    return " ".join(capsys.readouterr().err.split())


def test_train_fills_a_run_folder_and_ends_with_a_table(tmp_path, capsys):
    main(["train", *SMALL, "--out", "run"])
    run = tmp_path / "run"
    names = {p.name for p in run.iterdir()}
    assert names == {
        *("config.yaml", "metrics.jsonl", "checkpoint.pt", "summary.json", "figures", "report.html", "tensorboard")
    }
    summary = json.loads((run / "summary.json").read_text())
    assert {"test_elbo", "test_log_likelihood", "num_samples", "kl_per_layer", "active_units"} <= set(summary)
    assert {"epochs", "seconds", "images_per_second"} <= set(summary)
    assert (summary["epochs"], summary["num_samples"]) == (2, 5)
    printed = capsys.readouterr().out
    assert "test log p(x)" in printed
    assert "run/report.html" in printed
    assert re.search(r"^epoch 1/2  ELBO train -.*^epoch 2/2  ELBO train -", printed, re.DOTALL | re.MULTILINE)
    assert yaml.safe_load((run / "config.yaml").read_text())["structure"]["init_args"]["z_dims"] == [4, 2]
    assert list((run / "tensorboard").iterdir())


def test_the_same_seed_gives_the_same_run(run):
    main(["train", "--config", "run/config.yaml", "--out", "again", "--tensorboard", "false"])
    states = [torch.load(f"{name}/checkpoint.pt", weights_only=True)["structure"] for name in ("run", "again")]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_a_run_goes_on_with_its_own_options(run):
    main(["train", "--out", "run", "--resume", "--epochs", "3"])
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["epochs"], summary["num_samples"], summary["units"]) == (3, 5, {"z1": 4, "z2": 2})
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    assert yaml.safe_load((run / "config.yaml").read_text())["resume"] is False


def test_a_run_is_not_overwritten_without_being_asked(run, capsys):
    before = (run / "checkpoint.pt").read_bytes()
    assert "--resume" in _fails(capsys, "train", *SMALL, "--out", "run")
    assert (run / "checkpoint.pt").read_bytes() == before
    main(["train", *SMALL, "--seed", "1", "--out", "run", "--overwrite"])
    assert (run / "checkpoint.pt").read_bytes() != before


def test_evaluate_report_and_sample_a_run(run, capsys):
    main(["evaluate", "run", "--num_samples", "7", "--num_images", "9"])
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["num_samples"], summary["num_images"], summary["epochs"]) == (7, 9, 2)
    (run / "report.html").unlink()
    main(["report", "run"])
    assert (run / "report.html").exists()
    main(["sample", "run", "--num_samples", "5"])
    assert (run / "samples-0.png").read_bytes().startswith(b"\x89PNG")
    main(["sample", "run", "--num_samples", "5", "--out", "samples.npy"])
    assert np.load("samples.npy").shape == (5, 64)
    assert "name another file" in _fails(capsys, "sample", "run", "--out", "samples.npy")
    assert "must end in .npy or .png" in _fails(capsys, "sample", "run", "--out", "samples.gif")


def test_list_names_what_there_is(capsys):
    main(["list"])
    printed = capsys.readouterr().out
    for name in (*(s.__name__ for s in STRUCTURES), "Trace_ELBO", "IWAE", "Bernoulli", "digits", "norb"):
        assert name in printed


def test_an_estimator_by_name_has_its_own_defaults():
    main(["train", *SMALL, "--estimator", "IWAE", "--out", "run", "--tensorboard", "false"])
    with open("run/config.yaml") as file:
        assert yaml.safe_load(file)["estimator"]["init_args"]["num_particles"] == 5
    with open("run/summary.json") as file:
        assert json.load(file)["estimator"] == "IWAE"


def test_a_structure_by_name_has_its_own_defaults(tmp_path):
    """Not those of the default structure: its likelihood, its activation, no batch norm."""
    counts = np.random.default_rng(0).poisson(1, (60, 12)).astype("f4")
    np.savez(tmp_path / "own.npz", x_train=counts[:40], x_test=counts[40:])
    options = ["--structure.z_dim", "3", "--structure.hidden_dim", "8", "--structure.transform", "torch.log1p"]
    short = ["--epochs", "1", "--beta", "1", "--num_samples", "3", "--tensorboard", "false"]
    main(["train", "--data", "own.npz", "--structure", "NVDM", *options, *short, "--out", "run"])
    with open("run/config.yaml") as file:
        kept = yaml.safe_load(file)["structure"]["init_args"]
    assert kept["activation"]["class_path"] == "torch.nn.ReLU"
    assert kept["batch_norm"] is False
    assert kept["transform"] == "torch.log1p"
    main(["evaluate", "run", "--num_samples", "3"])


@pytest.mark.parametrize("flags", [["--out=run", "--resume"], ["--resume", "--out", "run"], ["--config", "mine.yaml"]])
def test_however_a_resume_is_asked_for_it_takes_the_runs_options(flags, tmp_path):
    main(["train", *SMALL, "--batch_size", "64", "--beta", "0.5", "--out", "run", "--tensorboard", "false"])
    (tmp_path / "mine.yaml").write_text("out: run\nresume: true\n")
    main(["train", *flags, "--epochs", "3"])
    with open("run/config.yaml") as file:
        kept = yaml.safe_load(file)
    assert (kept["batch_size"], kept["beta"], kept["epochs"]) == (64, 0.5, 3)


def test_overwriting_waits_until_every_input_is_checked(run, capsys):
    before = sorted(p.name for p in run.rglob("*"))
    bad = ["--structure", "HierarchicalVAE", "--estimator", "TraceMeanField_ELBO", "--out", "run", "--overwrite"]
    assert "not be a bound" in _fails(capsys, "train", *bad)
    assert sorted(p.name for p in run.rglob("*")) == before


SUPERVISED = """
import pyro
from pyro_lvae import VAE

def test_a_posterior_over_weights_goes_all_the_way(tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--bayesian.where", "decoder", "--bayesian.prior.learned", "true", "--bayesian.noise", "flipout"]
    main(["train", *SMALL_VAE, *options, "--out", str(out)])
    said = " ".join(capsys.readouterr().out.split())
    assert "averaged over 10 draws of the weights" in said
    assert "KL of the weights" in said
    summary = json.loads((out / "summary.json").read_text())
    assert summary["structure"] == "BayesianWeights of VAE"
    assert summary["num_draws"] == 10
    assert summary["weight_kl"] > 0
    main(["evaluate", str(out), "--num_samples", "5", "--num_images", "4"])
    main(["sample", str(out), "--num_samples", "4"])
    assert (out / "samples-0.png").exists()
    main(["train", *SMALL_VAE, *options, "--out", str(out), "--resume", "--epochs", "3"])


class Conditional(VAE):  # decodes z and the label
    def model(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z1", self._prior(x))
            h = self.decoder(z + y.unsqueeze(-1).to(x))
            pyro.sample("x", self.likelihood(h), obs=x)
"""


def test_a_supervised_run_goes_all_the_way(tmp_path):
    (tmp_path / "my_conditional.py").write_text(SUPERVISED)
    options = ["--structure.z_dim", "2", "--structure.hidden_dim", "8", "--supervised", "true"]
    main(["train", "--structure", "my_conditional.Conditional", *options, *SMALL[4:], "--out", "run"])
    main(["sample", "run", "--num_samples", "400", "--out", "run/many.npy"])
    assert np.load("run/many.npy").shape == (400, 64)


@pytest.mark.parametrize(
    "options",
    [
        ["--estimator", "IWAE", "--estimator.num_particles", "3"],
        ["--estimator", "RenyiELBO", "--estimator.num_particles", "3", "--estimator.vectorize_particles", "true"],
        ["--estimator", "TraceMeanField_ELBO", "--beta", "0.5"],
        ["--structure", "HierarchicalVAE"],
        ["--structure", "pyro_lvae.LadderVAE", "--structure.share_top_down", "false"],
        ["--optimizer", "Adamax", "--optimizer.lr", "0.01", "--clip_norm", "1"],
        ["--lr_scheduler", "CosineAnnealingLR", "--lr_scheduler.T_max", "2"],
        ["--beta.unit", "steps", "--beta.cycles", "2"],
    ],
    ids=lambda o: "-".join(o[:2]),
)
def test_options_come_from_signatures(options):
    structure = [] if "--structure" in options else ["--structure", "LadderVAE"]
    main(["train", *structure, *options, *SMALL, "--out", "run", "--tensorboard", "false"])


def test_real_valued_data_of_ones_own(tmp_path):
    rng = np.random.default_rng(0)
    np.savez("own.npz", x_train=rng.normal(size=(50, 6)), x_test=rng.normal(size=(20, 6)))
    likelihood = ["--structure.likelihood", "pyro_lvae.conditionals.Normal", "--structure.likelihood.scale", "0.5"]
    main(["train", "--data", "own.npz", "--structure", "LadderVAE", *likelihood, *SMALL, "--out", "run"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["data"] == "own"
    assert not (tmp_path / "run" / "figures" / "samples.png").exists()
    main(["sample", "run"])
    assert np.load("run/samples-0.npy").shape == (64, 6)


OWN = """
import pyro, pyro.distributions as dist, torch
from pyro_lvae.nets import linear

class MyVAE(torch.nn.Module):
    '''Nothing inherited.'''
    def __init__(self, x_dim: int, z_dims: tuple[int, ...] = (3,)):
        super().__init__()
        self.enc, self.dec, self.z = linear(x_dim, z_dims[0]), linear(z_dims[0], x_dim), z_dims[0]
    def model(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z1", dist.Normal(x.new_zeros(self.z), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.dec(z)).to_event(1), obs=x)
    def guide(self, x, y=None):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z1", dist.Normal(self.enc(x), 0.5).to_event(1))
"""


FAMILY = {
    "AE": ["AE", "--structure.z_dim", "2", "--structure.hidden_dim", "8"],
    "ConditionalVAE": ["ConditionalVAE", "--structure.z_dim", "2", "--structure.hidden_dim", "8"],
    "BetaVAE": [
        *("BetaVAE", "--structure.z_dim", "2"),
        *("--estimator", "ConstrainedELBO", "--estimator.epsilon", "3"),
    ],
    "VaDE": ["VaDE", "--structure.z_dim", "2", "--structure.hidden_dims", "[8]"],
    "NVDM": ["NVDM", "--structure.z_dim", "2", "--structure.hidden_dim", "8", "--data", "own.npz"],
    "ProdLDA": ["ProdLDA", "--structure.z_dim", "3", "--structure.hidden_dim", "8", "--data", "own.npz"],
    "SparseVAE": ["SparseVAE", "--structure.code", "BetaCode", "--structure.code.a", "0.4", "--structure.z_dim", "4"],
    "MixturePrior": ["MixturePrior", "--structure.num_components", "3"],
    "VampPrior": [
        *("VampPrior", "--structure.base", "LadderVAE", "--structure.base.z_dims", "[4,2]"),
        *("--structure.base.hidden_dims", "[16,8]", "--structure.num_pseudo_inputs", "5"),
    ],
    "FlowVAE": ["FlowVAE", "--structure.flow", "PlanarFlow", "--structure.num_flows", "2"],
    "DenoisingVAE": [
        *("DenoisingVAE", "--structure.level.start", "0.5", "--structure.level.stop", "0.1"),
        *("--structure.level.length", "2", "--structure.corruption", "pyro_lvae.structures.denoising.masking"),
    ],
}


@pytest.mark.parametrize(
    "name",
    [n if n in ("AE", "BetaVAE", "ProdLDA", "FlowVAE") else pytest.param(n, marks=pytest.mark.slow) for n in FAMILY],
)
def test_the_family_goes_all_the_way(name, tmp_path, capsys):
    counts = np.random.default_rng(0).poisson(1, (60, 12)).astype("f4")
    np.savez(tmp_path / "own.npz", x_train=counts[:40], x_test=counts[40:])
    small = ["--epochs", "2", "--beta.length", "1", "--num_samples", "5", "--num_images", "20"]
    main(["train", "--structure", *FAMILY[name], *small, "--tensorboard", "false", "--out", "run"])
    before = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert before["structure"] == name
    assert (before["test_log_likelihood"] is None) == (name == "AE")
    main(["train", "--out", "run", "--resume", "--epochs", "3"])
    main(["evaluate", "run", "--num_samples", "5", "--num_images", "20"])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["epochs"] == 3
    main(["report", "run"])
    figures = {p.stem for p in (tmp_path / "run" / "figures").glob("*.png")}
    is_images = "--data" not in FAMILY[name]
    assert ("samples" in figures) == (is_images and name != "AE")
    assert ("reconstructions" in figures) == is_images
    if name == "AE":
        assert "AE has no prior to draw from" in _fails(capsys, "sample", "run")
    else:
        main(["sample", "run", "--num_samples", "4", *([] if is_images else ["--out", "drawn.npy"])])


def test_a_structure_of_ones_own_by_its_path(tmp_path):
    (tmp_path / "my_own_module.py").write_text(OWN)
    options = ["--structure", "my_own_module.MyVAE", "--structure.z_dims", "[5]", *SMALL[4:], "--out", "run"]
    main(["train", *options])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["units"] == {"z1": 5}
    main(["evaluate", "run", "--num_samples", "3"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--data", "nothing"], "no data set is called 'nothing'"),
        (["train", "--structure.z_dims", "[3]"], "give one hidden size for each latent layer"),
        (["train", "--structure", "HierarchicalVAE", "--estimator", "TraceMeanField_ELBO"], "not be a bound"),
        (["train", "--structure", "torch.nn.Linear"], "an nn.Module with model and guide, and this is none"),
        (["train", "--epochs", "many"], "epochs"),
        (["train", "--estimator", "IWEA"], "there is no estimator 'IWEA'; known are SampledELBO, "),
        (["train", "--estimator", "GECO"], "--estimator GECO: the following arguments are required: distortion"),
        (["train", "--structure", "LaderVAE"], "there is no structure 'LaderVAE'; known are VAE, "),
        (
            ["train", "--structure", "VAE", "--structure.zdim", "3"],
            "no option 'zdim'; --structure.help NAME lists",
        ),
        (
            ["train", "--estimator", "IWAE", "--estimator.k", "3"],
            "'k' is not accepted; --estimator.help IWAE lists",
        ),
        (["train", "--structure", "VAE", "--structure.z_dim", "no"], "train: --structure.z_dim: expected a int. Got"),
        (["train", "--structure", "nothing.Here"], "train: --structure: no module named 'nothing'"),
        (["train", "--structure", "FlowVAE", "--structure.flow", "Plane"], "there is no structure.flow 'Plane'; known"),
        (["train", "--structure", "FlowVAE", "--structure.base", "AE"], "site 'z1' is Independent (64,) in the guide"),
        (["train", "--structure.likelihood", "Norm"], "--structure.likelihood: there is no 'Norm'; give the path"),
        (["train", "--bayesian.prior", "Lapalce"], "there is no bayesian.prior 'Lapalce'; known are Normal, Laplace, "),
        (["train", "--bayesian.posterior", "Mean"], "there is no bayesian.posterior 'Mean'; known are MeanField, "),
        (["train", "--bayesian.noise", "fliput"], "--bayesian.noise is 'fliput'; expected one of 'shared', 'local_"),
        (["train", "--bayesian.wher", "x"], "train: --bayesian: there is no option 'wher'; --bayesian.help lists them"),
        (["train", "--bayesian.prior.sclae", "2"], "--bayesian.prior: there is no option 'sclae'; --bayesian.prior"),
        (["train", "--optimizer", "Adamm"], "train: --optimizer: there is no 'Adamm'; give the path of a class"),
        (["train", "--lr", "1e-3"], "train: there is no option --lr; do you mean --optimizer.lr?"),
        (
            ["train", "--num_particles", "5"],
            "no option --num_particles; do you mean --estimator.num_particles?",
        ),
        (["train", "--z_dims", "[3]"], "there is no option --z_dims; do you mean --structure.z_dims?"),
        (["train", "--batch-size", "64"], "there is no option --batch-size; do you mean --batch_size?"),
        (["train", "--where", "x"], "there is no option --where; do you mean --bayesian.where?"),
        (["train", "--x_dim", "9"], "there is no option --x_dim; --help lists them"),
        (["evaluate", "run", "--lr", "1"], "there is no option --lr; --help lists them"),
        (["train", "--epoch", "1"], "train: there is no option --epoch; --help lists them"),  # not short for --epochs
        (["evaluate", "nowhere"], "holds no config.yaml"),
        (["train", "--resume"], "name its folder"),
    ],
)
def test_errors_are_one_sentence_and_leave_nothing_behind(argv, message, capsys, tmp_path):
    said = _fails(capsys, *argv)
    assert message in said
    assert "Union" not in said
    assert not list(tmp_path.rglob("*.*"))


def test_an_unknown_key_of_a_file_is_named(capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text("num-epochs: 3\n")
    said = _fails(capsys, "train", "--config", str(tmp_path / "mine.yaml"))
    assert "train has no option 'num-epochs'; pyro-lvae train --help lists them" in said


@pytest.mark.parametrize("command", [["-m", "pyro_lvae", "--help"], ["-m", "pyro_lvae", "train", "--help"]])
def test_help_runs_as_a_module(command):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120, check=True)
    assert "pyro-lvae" in done.stdout


def test_the_help_says_what_the_docstrings_say():
    said = {name: function.__doc__.split("\n")[0] for name, function in FUNCTIONS.items()}
    assert list(COMMANDS.items()) == list(said.items())


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_every_command(flag, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        main([flag])
    printed = " ".join(capsys.readouterr().out.split())
    for name, line in COMMANDS.items():
        assert f"{name} {line}" in printed


def test_version(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"pyro-lvae {__version__}\n"


def test_without_a_known_command_the_known_ones_are_named(capsys):
    assert "Train a structure" in _fails(capsys)
    for unknown in ("trian", "--seed"):
        assert f"there is no command '{unknown}'; known are train, evaluate, " in _fails(capsys, unknown, "--help")


COMPARE = ["--num_rows", "5", "--num_samples", "5", "--num_repeats", "2", "--num_temperatures", "3"]
COMPARE += ["--reference_particles", "3"]


def test_compare_estimators_on_a_run(run, capsys):
    main(["compare", "run", *COMPARE, "--estimators", "SampledELBO, IWAE(3), DReG(3, prior=True)"])
    main(["compare", "run", *COMPARE, "--estimators", "Trace_ELBO"])
    folder = run / "comparison-1"
    assert {p.name for p in folder.iterdir()} == {"comparison.json", "comparison.png", "draws.nc"}
    found = json.loads((folder / "comparison.json").read_text())
    assert [row["estimator"] for row in found["rows"]] == ["SampledELBO(1)", "IWAE(3)", "DReG(3, prior=True)"]
    assert (run / "comparison-2").exists()
    printed = capsys.readouterr().out
    for text in ("below AIS", "gradient of", "bias to own bound", "run/comparison-1"):
        assert text in printed


def test_compare_estimators_untrained_and_by_training(tmp_path, capsys):
    small = ["--structure", "HierarchicalVAE", *SMALL[:4], *COMPARE]
    main(["compare", *small])
    assert "left out: AnalyticELBO(1): " in capsys.readouterr().out
    assert (tmp_path / "runs" / "digits-HierarchicalVAE-comparison-1" / "comparison.json").exists()
    main(["compare", *small, "--train_seconds", "0.2", "--estimators", "IWAE(2), DReG(2)", "--out", "trained"])
    found = json.loads((tmp_path / "trained" / "comparison.json").read_text())
    assert set(found["histories"]) == {"IWAE(2)", "DReG(2)"}
    assert "name another folder" in _fails(capsys, "compare", *small, "--out", "trained")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["compare", "nowhere"], "holds no config.yaml"),
        (["compare", "--estimators", "IWEA(5)"], "there is no estimator 'IWEA'"),
        (["compare", "--num_rows", "0"], "num_rows is 0"),
        (["compare", "--num_repeats", "1"], "at least 2"),
        (["compare", "--train_seconds", "0"], "max_seconds is 0"),
    ],
)
def test_compare_refuses_in_one_sentence(argv, message, capsys, tmp_path):
    assert message in _fails(capsys, *argv)
    assert not list(tmp_path.rglob("*.*"))


# One of each kind by default; `pytest -m slow` goes over the rest.
TRAINS = ["SampledELBO", "DReG --estimator.prior true", "PIWAE", "RWS", "ConstrainedELBO --estimator.epsilon 3"]
TRAINS_TOO = [
    *("AnalyticELBO", "STL", "IWAE", "DReG", "Renyi --estimator.alpha -1", "Renyi --estimator.alpha=-.inf", "MIWAE"),
    *("CIWAE", "TVO", "BetaELBO", 'BetaELBO --estimator.beta {"z1":0.5}', "FreeBits", "KLBalanced"),
    *("GECO --estimator.distortion 30", "Trace_ELBO", "TraceGraph_ELBO"),
]


@pytest.mark.parametrize("estimator", [*TRAINS, *(pytest.param(e, marks=pytest.mark.slow) for e in TRAINS_TOO)])
def test_every_estimator_trains_the_digits_ladder(estimator, tmp_path):
    main(["train", *SMALL, "--estimator", *estimator.split(), "--out", "run", "--tensorboard", "false"])
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    learned = json.loads(lines[-1])["learned"]
    assert ("multiplier" in learned) is (estimator.split()[0] in ("ConstrainedELBO", "GECO"))


def test_a_structure_of_a_yaml_file_has_its_own_defaults(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "structure: {class_path: BidirectionalLadderVAE, init_args: {hidden_dim: 8}}\n"
        "epochs: 1\nbeta: 1\nnum_samples: 2\nnum_images: 4\ntensorboard: false\n"
    )
    main(["train", "--config", "mine.yaml", "--out", "run"])
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    own = signature(BidirectionalLadderVAE).parameters["z_dims"].default
    assert tuple(kept["structure"]["init_args"]["z_dims"]) == own != signature(LadderVAE).parameters["z_dims"].default


@pytest.mark.filterwarnings("default")
def test_a_warning_is_a_sentence(capsys):
    main(["train", *SMALL, "--beta.length", "9", "--out", "run"])
    error = " ".join(capsys.readouterr().err.split())
    assert "pyro-lvae train: beta is at the end of its schedule only after" in error
    assert "UserWarning" not in error
    assert ".py" not in error


def test_a_resumed_run_keeps_what_its_configuration_says(tmp_path, capsys):
    main(["train", *SMALL, "--out", "run", "--tensorboard", "false"])
    done = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["epochs"]
    before = (tmp_path / "run/config.yaml").read_text()
    assert "was begun with seed 0" in _fails(capsys, "train", "--out", "run", "--resume", "--seed", "3")
    assert "holds the weights of another structure" in _fails(
        capsys, "train", "--out", "run", "--resume", "--structure.hidden_dims", "[9, 9]", "--epochs", str(done + 1)
    )
    fewer = ["train", "--out", "run", "--resume", "--epochs", str(done - 1)]
    assert f"has {done} epochs, and --epochs {done - 1} asks for fewer" in _fails(capsys, *fewer)
    assert (tmp_path / "run/config.yaml").read_text() == before
    main(["train", "--out", "run", "--resume", "--epochs", str(done + 1), "--estimator", "IWAE"])
    assert "by SampledELBO, then IWAE" in capsys.readouterr().out
    main(["evaluate", "run", "--num_samples", "3"])
    assert "by SampledELBO, then IWAE" in capsys.readouterr().out
    (tmp_path / "run/summary.json").unlink()  # as of a run that was stopped
    main(["train", "--out", "run", "--resume", "--epochs", str(done + 2), "--estimator", "DReG"])
    assert "by SampledELBO, then IWAE, then DReG" in capsys.readouterr().out


def test_a_class_that_takes_no_size_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "sizeless.py").write_text(
        "from pyro_lvae import VAE\nclass Sizeless(VAE):\n"
        "    def __init__(self, z1: int = 5):\n        super().__init__(64, z1, 8)\n"
    )
    said = _fails(capsys, "train", "--structure", "sizeless.Sizeless")
    assert "Sizeless has 'z1', with a default, as its first argument, which is given the size D of the data" in said


def test_help_of_a_structure_is_its_options_alone(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--structure.help", "LadderVAE"])
    said = capsys.readouterr().out
    assert "--structure.activation" in said
    assert "Threshold" not in said  # one of the hundreds of modules that an activation could be


def test_global_sites_are_for_fit_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "globally.py").write_text(GLOBAL)
    said = _fails(capsys, "train", "--structure", "globally.Global")
    assert "'w' lie outside the data plate" in said
    assert said.endswith("train this one by pyro_lvae.fit")


def test_labels_that_are_missing_are_named(tmp_path, capsys):
    np.savez(tmp_path / "own.npz", x_train=np.ones((20, 12), "f4"), x_test=np.ones((5, 12), "f4"))
    assert "own has no labels for both train and test" in _fails(
        capsys, "train", "--data", "own.npz", "--structure", "ConditionalVAE"
    )


GLOBAL = """
import pyro
import pyro.distributions as dist
from pyro_lvae import VAE

class Global(VAE):
    def __init__(self, x_dim: int):
        super().__init__(x_dim, 3, 8)

    def model(self, x, y=None):
        pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        return super().model(x)

    def guide(self, x, y=None):
        pyro.sample("w", dist.Normal(x.new_zeros(()), 1.0))
        super().guide(x)
"""
