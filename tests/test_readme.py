"""The README's script runs as printed, in small."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
IN_SMALL = {
    '"mnist"': '"digits"',
    "x_dim=784": "x_dim=64",
    "(64, 32, 16, 8, 4)": "(4, 2)",
    "(512, 256, 128, 64, 32)": "(16, 8)",
    "epochs=200": "epochs=2, callbacks=()",
    "epochs=50": "epochs=1",
    "num_samples=5000": "num_samples=5",
}


def test_the_script_runs(capsys):
    script = re.search(r"```python\n(from pyro_lvae import.*?)```", README, re.DOTALL)[1]
    assert len(script.splitlines()) <= 10
    for printed, small in IN_SMALL.items():
        assert printed in script
        script = script.replace(printed, small)
    exec(script, {})
    assert "tensor(-" in capsys.readouterr().out


def test_every_link_into_the_repository_leads_somewhere():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
