import os
import re
import subprocess
import sys

import pytest
import torch

from pyro_lvae import NVDM, BetaVAE, HierarchicalVAE, LadderVAE, fit, load, plots, to_inference_data, traverse
from pyro_lvae.data import Dataset
from pyro_lvae.report import write_report
from pyro_lvae.runs import Run, RunFiles, claim_folder

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(0)
    folder, data = tmp_path_factory.mktemp("run"), load("digits")
    structure = LadderVAE(64, (8, 2), (32, 16))
    history = fit(structure, data, epochs=2, out=folder, callbacks=())
    (folder / "config.yaml").write_text("data: <digits> & more\n")
    return Run(folder, structure, data, history)


def test_a_run_is_drawn_and_reported_on_one_page(run):
    run.evaluate(num_samples=5, num_images=20)
    path = run.report()
    page = path.read_text()
    names = {p.stem for p in (run.folder / "figures").iterdir()}
    expected = {"elbo", "kl_per_layer", "samples", "reconstructions", "interpolations", "manifold", "pca"}
    assert names == expected | {"active_units"}
    assert page.count("<figure") == len(names)
    assert not re.search(r"(src|href)='(?!data:)", page), "self-contained"
    assert "http" not in page
    assert f"{run.summary.test_log_likelihood:.2f}" in page
    assert "&lt;digits&gt; &amp; more" in page
    assert not list(run.folder.rglob("*.partial"))


def test_no_report_without_results(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no summary.json; run `pyro-lvae evaluate"):
        write_report(tmp_path)


def test_pictures_of_data_that_are_no_images(tiny):
    data = Dataset("rows", tiny.x_train, tiny.x_test)
    structure = HierarchicalVAE(12, (3, 2), (8, 8))
    history = fit(structure, data, epochs=1, callbacks=())
    assert set(plots.draw(structure, data, history)) == {"elbo", "kl_per_layer", "active_units", "pca"}
    assert set(plots.draw(structure, data, [])) == {"active_units", "pca"}


def test_factors_of_variation_are_labels_without_colours(tiny, tmp_path):
    """Labels `[N, F]`: trained, evaluated and reported; the codes are not coloured by class."""
    factors = [
        torch.stack([torch.arange(len(x)) % 2, torch.arange(len(x)) % 3], 1) for x in (tiny.x_train, tiny.x_test)
    ]
    data = Dataset("factors", tiny.x_train, tiny.x_test, *factors, shape=(3, 4))
    structure = BetaVAE(12, 3, 8)
    run = Run(tmp_path, structure, data, fit(structure, data, epochs=1, out=tmp_path, callbacks=()))
    run.evaluate(num_samples=2, num_images=5)
    assert "first two principal components" in run.report().read_text()
    x, y = next(data.batches(10, torch.arange(45)))
    assert (x.shape, y.shape) == ((10, 12), (10, 2))
    assert torch.equal(y, factors[0][:10])
    assert len(plots.draw(structure, data, [])["pca"].axes) == 1
    assert len(plots.draw(structure, tiny, [])["pca"].axes) == 2, "with the bar of classes"


def test_traversals_show_a_unit_a_row():
    structure = BetaVAE(6, 3, 8)
    x = (torch.rand(2, 6) > 0.5).float()
    figure = plots.traversals(structure, x, (2, 3), steps=5, units=[2, 0])
    canvas = torch.from_numpy(figure.axes[0].images[0].get_array().copy())
    assert canvas.shape == (2 * 2 * 3, 5 * 4)
    path = traverse(structure, x, steps=5, units=[2, 0])
    torch.testing.assert_close(canvas[9 + 1 : 9 + 3, 16 + 1 : 16 + 4].flatten(), path[1, 1, 4])


def test_documents_are_drawn_without_pictures_and_reported(tmp_path):
    """Counts of 12 words, 20 classes of them."""
    x = torch.randint(0, 4, (60, 12)).float()
    data = Dataset("documents", x[:40], x[40:], torch.arange(40) % 20, torch.arange(20))
    run = Run(tmp_path, NVDM(12, 3, 8), data, [])
    run.history.extend(fit(run.structure, data, epochs=2, out=tmp_path, callbacks=()))
    run.evaluate(5, None)
    page = run.report().read_text()
    assert {p.stem for p in (tmp_path / "figures").iterdir()} == {"elbo", "kl_per_layer", "active_units", "pca"}
    assert "NVDM on documents" in page
    colours = plots.pca({"z1": torch.randn(20, 3)}, torch.arange(20)).axes[0].collections[0].to_rgba(range(20))
    assert len({tuple(c) for c in colours}) == 20, "a colour a class"


def test_image_grid_shows_each_image_in_its_place():
    images = torch.stack([torch.full((6,), i / 4) for i in range(5)])
    figure = plots.image_grid(images, (2, 3), columns=3)
    canvas = figure.axes[0].images[0].get_array()
    assert canvas.shape == (2 * 3, 3 * 4)
    assert [canvas[1 + 3 * (i // 3), 1 + 4 * (i % 3)].item() for i in range(5)] == [i / 4 for i in range(5)]


def test_pca_of_a_line_is_the_line():
    z = torch.linspace(-1, 1, 9)[:, None] * torch.tensor([[3.0, 4.0]])
    points = plots.pca({"z1": z}).axes[0].collections[0].get_offsets()
    assert abs(points[:, 0]).max() == pytest.approx(5, rel=1e-5)
    assert abs(points[:, 1]).max() == pytest.approx(0, abs=1e-5)


def test_a_free_folder_is_claimed_and_a_used_one_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(claim_folder(None, "runs/digits-VAE")) == "runs/digits-VAE-1"
    assert str(claim_folder(None, "runs/digits-VAE")) == "runs/digits-VAE-2", "the first is claimed"
    used = tmp_path / "used"
    (used / "figures").mkdir(parents=True)
    for name in ("notes.txt", "checkpoint.pt", "figures/elbo.png", "figures/thesis.pdf"):
        (used / name).write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        claim_folder(used, "x")
    assert claim_folder(used, "x", resume=True) == used
    with pytest.raises(ValueError, match="one of the two"):
        claim_folder(used, "x", resume=True, overwrite=True)
    with pytest.raises(ValueError, match="name its folder"):
        claim_folder(None, "x", resume=True)
    assert claim_folder(used, "x", overwrite=True) == used
    assert len(list(used.rglob("*"))) == 5, "nothing is touched yet"
    RunFiles(used, "data: x").on_start(0, 1, 1)
    left = {p.name for p in used.rglob("*.*")}
    assert left == {"notes.txt", "checkpoint.pt", "config.yaml", "thesis.pdf"}, "only a run's results are removed"
    (tmp_path / "mine" / "figures").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="no run that could be replaced"):
        claim_folder(tmp_path / "mine", "x", overwrite=True)
    with pytest.raises(FileExistsError, match="is a file"):
        claim_folder(used / "notes.txt", "x")


def test_arviz_refuses_what_it_could_not_hold(x):
    from test_enumeration import Mixture

    with pytest.raises(ValueError, match="'c': neither global nor enumerated"):
        to_inference_data(Mixture(), torch.randn(3, 4).double(), 2)


def test_the_first_import_of_arviz_on_a_day_tells_nothing(tmp_path):
    """It announces its plans once a day; where warnings are errors, nothing would work on that day."""
    code = """
import warnings
import torch
from pyro_lvae import VAE
from pyro_lvae.inference_data import to_inference_data
warnings.simplefilter("error", FutureWarning)
to_inference_data(VAE(12, 3, 8).eval(), torch.ones(2, 12), 2)
"""
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=env, timeout=300, check=True)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_arviz_reads_the_draws(x):
    import arviz

    structure = LadderVAE(12, (5, 3), (16, 8)).eval()
    data = to_inference_data(structure, x, num_samples=9)
    assert data.posterior["z1"].shape == (1, 9, 7, 5)
    assert data.log_likelihood["x"].shape == data.sample_stats["log_weight"].shape == (1, 9, 7)
    assert (data.observed_data["x"].values == x.numpy()).all()
    assert len(arviz.summary(data, var_names=["z2"], kind="stats")) == 7 * 3
