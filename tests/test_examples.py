"""Every example runs: --smoke of each file in examples/."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyro_lvae import ConditionalVAE, LadderVAE, log_likelihood
from pyro_lvae.checkpoint import load_checkpoint

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
    kept.write_text(json.dumps(whole | {"log_p": whole["log_p"][:200]}))
    results = tmp_path / "same" / "results.json"
    found = json.loads(results.read_text())
    del found["results"]["skip:1"]
    results.write_text(json.dumps(found))
    assert main(options) == rows


@pytest.mark.parametrize(
    "options",
    [["--members", "wide:0"], ["--members", "gated"], ["--members", "skip:0", "skip:0"], ["--runs", "one"]],
)
def test_a_mixture_of_unknown_ladders_is_refused(options, capsys):
    main = runpy.run_path(str(ROOT / "examples" / "ladder_mixture.py"))["main"]
    with pytest.raises(SystemExit):
        main(["--smoke", *options])
    message = capsys.readouterr().err
    assert any(word in message for word in ("DESIGN:SEED", "twice", "one run a member"))


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
