"""Every example runs: --smoke of each file in examples/."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyro_lvae import ConditionalVAE, LadderVAE, log_likelihood
from pyro_lvae.checkpoint import CheckpointError, load_checkpoint

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if path.stem != "all")


WITHOUT_PICTURES = ("bayes_by_backprop", "bayesian_decoder", "your_own_structure")


@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), "--smoke"])
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out
    if path.stem not in WITHOUT_PICTURES:
        assert list(tmp_path.rglob("*.png"))


def test_parts_of_an_experiment_go_on_by_themselves(tmp_path):
    main = runpy.run_path(str(ROOT / "examples" / "aevb.py"))["main"]
    options = ["--smoke", "--depths", "1", "--out", str(tmp_path), "--parts"]
    both = main([*options, "manifolds", "depth"])
    assert main([*options, "depth"])["depth"] == both["depth"]


def test_the_ladder_at_length_with_gated_units(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ladder_finetuned.py", "--smoke", "--gated", "--estimators", "IWAE"])
    runpy.run_path(str(ROOT / "examples" / "ladder_finetuned.py"), run_name="__main__")
    first = tmp_path / "runs" / "ladder_finetuned-smoke" / "first"
    assert load_checkpoint(first / "checkpoint.pt")["structure"]["decoder.0.weight"].shape == (32, 4)  # and gates
    wider = ["--smoke", "--gated", "--estimators", "IWAE", "--start", str(first), "--out", "wide"]
    wider += ["--start_hidden_dims", "16", "8", "8", "--hidden_dims", "20", "8", "9"]
    monkeypatch.setattr(sys, "argv", ["ladder_finetuned.py", *wider])
    runpy.run_path(str(ROOT / "examples" / "ladder_finetuned.py"), run_name="__main__")
    weights = load_checkpoint(tmp_path / "wide" / "IWAE-2" / "checkpoint.pt")["structure"]
    assert weights["decoder.0.weight"].shape == (40, 4)


@pytest.mark.parametrize("activation", [torch.nn.LeakyReLU, torch.nn.GLU])
def test_a_widened_ladder_computes_the_same(activation):
    example = runpy.run_path(str(ROOT / "examples" / "ladder_finetuned.py"))
    narrow = LadderVAE(12, (4, 3, 2), (8, 6, 5), activation=activation).double()
    for name, t in narrow.named_buffers():
        t.copy_(torch.rand(t.shape) + 0.5 if "running" in name else t)
    wide = LadderVAE(12, (4, 3, 2), (20, 6, 7), activation=activation).double()
    example["widen"](narrow, wide, halves=1 + (activation is torch.nn.GLU))
    x, found = (torch.rand(5, 12) > 0.5).double(), []
    for ladder in (narrow, wide):
        torch.manual_seed(0)
        found.append(log_likelihood(ladder, x, 10))
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


def test_a_mixture_of_a_ladder_with_itself_is_the_ladder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(ROOT / "examples" / "ladder_mixture.py"))["main"]
    main.__globals__["ROWS"] = 100
    main(["--smoke", "--members", "skip:0", "vamp:0"])
    run = str(tmp_path / "runs" / "ladder_mixture-smoke" / "skip-0" / "fine")
    options = ["--smoke", "--members", "skip:0", "skip:1", "--runs", run, run, "--num_images", "360", "--out", "same"]
    rows = main(options)
    mixture = rows["mixture of the first 2"]
    assert mixture["log p(x)"] == pytest.approx(rows["skip:0"]["log p(x)"], abs=1e-12)
    assert mixture["over the best"] == pytest.approx(0, abs=1e-12)

    kept = tmp_path / "same" / "skip-1" / "log_p.json"  # stopped while it scored the second
    whole = json.loads(kept.read_text())
    kept.write_text(json.dumps(whole | {"results": {"log_p": whole["results"]["log_p"][:200]}}))
    assert main(options) == rows
    more = [*options, "--members", "skip:0", "skip:1", "skip:2", "--runs", run, run, run]
    assert main(more)["mixture of the first 3"]["over the best"] == pytest.approx(0, abs=1e-12)

    with pytest.raises(ValueError, match="other settings"):
        main([*options, "--num_samples", "6"])
    before = kept.read_text()
    with pytest.raises(CheckpointError, match="another structure"):
        main([*options, "--members", "skip:0", "leaky:1", "--out", "wrong"])
    assert kept.read_text() == before
    assert not (tmp_path / "wrong").exists()


def test_a_mixture_of_ladders_is_the_mean_of_their_densities():
    table = runpy.run_path(str(ROOT / "examples" / "ladder_mixture.py"))["table"]
    p = torch.tensor([[0.5, 0.1, 0.2], [0.4, 0.3, 0.1], [0.9, 0.1, 0.1]]).double()
    rows = table(["a", "b", "c"], p.log())
    assert rows["b"]["log p(x)"] == pytest.approx(p[1].log().mean().item())
    two, three = rows["mixture of the first 2"], rows["mixture of the first 3"]
    assert two["log p(x)"] == pytest.approx(p[:2].mean(0).log().mean().item())
    assert three["log p(x)"] == pytest.approx(p.mean(0).log().mean().item())
    gains = (p[:2].mean(0) / p[1]).log()  # b is the better of the first two
    assert two["over the best"] == pytest.approx(gains.mean().item())
    assert two["its standard error"] == pytest.approx(gains.std().item() / 3**0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--members", "wide:0"], "DESIGN:SEED"),
        (["--members", "gated"], "DESIGN:SEED"),
        (["--members", "skip:0", "skip:00"], "twice"),
        (["--runs", "one"], "one run a member"),
        (["--z_dims", "4"], "two layers"),
        (["--particles", "0"], "--particles is 0; give 1 or more"),
        (["--num_images", "1"], "--num_images is 1; give 2 or more"),
    ],
)
def test_a_mixture_of_unknown_ladders_is_refused(options, message, capsys):
    main = runpy.run_path(str(ROOT / "examples" / "ladder_mixture.py"))["main"]
    with pytest.raises(SystemExit):
        main(["--smoke", *options])
    assert message in capsys.readouterr().err


def test_rows_that_a_ladder_was_trained_on_are_not_held_out(tmp_path):
    main = runpy.run_path(str(ROOT / "examples" / "ladder_finetuned.py"))["main"]
    options = ["--smoke", "--particles", "1", "--estimators", "IWAE"]
    main([*options, "--out", str(tmp_path / "all")])
    main([*options, "--out", str(tmp_path / "fewer"), "--held_out", "100"])
    again = [*options, "--held_out", "100", "--out", str(tmp_path / "again"), "--start"]
    with pytest.raises(ValueError, match="trained on other rows"):
        main([*again, str(tmp_path / "all" / "first")])
    assert main([*again, str(tmp_path / "fewer" / "first")])


def test_style_goes_through_a_learned_prior(tiny):
    """E[x|z, y] at z = mu_p(y) + 2 sigma_p(y)."""
    decoded = runpy.run_path(str(ROOT / "examples" / "conditional.py"))["decoded"]
    vae, y = ConditionalVAE(12, 3, 2, 16, learn_prior=True).eval(), torch.arange(3)
    p = vae.prior(torch.eye(3))
    features = vae.decoder(torch.cat([p.mean + 2 * p.stddev, torch.eye(3)], -1))
    with torch.no_grad():
        torch.testing.assert_close(decoded(vae, tiny, torch.full((3, 2), 2.0), y), vae.likelihood(features).mean)


def test_all_runs_what_it_is_asked_for_and_tells_what_failed(tmp_path):
    script = (
        "import sys; from pathlib import Path; from examples import all; "
        f"assert all.NAMES == {[path.stem for path in EXAMPLES]}; "
        "all.HERE = logs = Path(sys.argv[1]); "
        "sys.exit(all.main(['--smoke', '--only', 'iwae', 'topics', '--logs', str(logs)]))"
    )
    (tmp_path / "iwae.py").write_text("import sys; print(sys.argv[1:])")
    (tmp_path / "topics.py").write_text("raise SystemExit(3)")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "iwae: ok" in done.stdout
    assert "topics: exit status 3" in done.stdout
    assert (tmp_path / "iwae.log").read_text() == "['--smoke']\n"


def test_a_new_structure_takes_fewer_than_forty_lines():
    import ast

    tree = ast.parse((Path(__file__).parents[1] / "examples" / "your_own_structure.py").read_text())
    (node,) = (n for n in tree.body if isinstance(n, ast.ClassDef))
    assert node.end_lineno - node.lineno + 1 < 40
