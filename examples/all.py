"""Every example, one after another.

    python -m examples.all --smoke              # minutes, on the embedded digits
    python -m examples.all --root FOLDER        # at full length: days on a few cores
    python -m examples.all --smoke --only iwae aevb

Stopped, most go on from where they were. Each runs in a process of its own, and what it prints goes to NAME.log in
--logs. One that fails does not stop the others; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from pyro_lvae.experiments import markdown

HERE = Path(__file__).parent
NAMES = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in ("all", "__init__"))


def command(name: str, args) -> list[str]:
    """What runs an example; `--root` is for those that read files."""
    path = HERE / f"{name}.py"
    options = ["--smoke"] * args.smoke
    if args.root is not None and '"--root"' in path.read_text(encoding="utf-8"):
        options += ["--root", args.root]
    return [sys.executable, str(path), *options]


def run(name: str, args) -> tuple[int, float]:
    """Exit status and seconds of one example."""
    started = time.perf_counter()
    with open(args.logs / f"{name}.log", "w", encoding="utf-8") as log:
        status = subprocess.run(command(name, args), stdout=log, stderr=subprocess.STDOUT).returncode
    return status, time.perf_counter() - started


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small models on the digits")
    parser.add_argument("--root", default=None, help="folder of the data")
    parser.add_argument("--only", nargs="+", default=NAMES, choices=NAMES, metavar="NAME", help="; ".join(NAMES))
    parser.add_argument("--logs", type=Path, default=Path("runs/logs"))
    args = parser.parse_args(argv)
    args.logs.mkdir(parents=True, exist_ok=True)
    rows, failed = [], 0
    for name in args.only:
        status, seconds = run(name, args)
        print(f"{name}: {'ok' if status == 0 else f'exit status {status}'}, {seconds:.0f} s", flush=True)
        rows.append([name, "ok" if status == 0 else f"**{status}**: {args.logs / name}.log", f"{seconds:.0f}"])
        failed += status != 0
    print("\n" + markdown(["example", "status", "seconds"], rows))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
