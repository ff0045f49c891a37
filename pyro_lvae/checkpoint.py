"""Checkpoints: written whole or not at all, read without unpickling, complete enough to go on bit for bit."""

from __future__ import annotations

import os
from pathlib import Path

import torch

FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged or of another structure."""


def save_checkpoint(path: Path, state: dict) -> None:
    """Write `state` (tensors, numbers, strings, lists, dicts) to `path`, atomically and on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        torch.save({"format": FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict:
    """Read a checkpoint with `weights_only=True`; raises `CheckpointError` with the remedy."""
    if not path.is_file():
        found = f"{path} is a folder; name the file within it" if path.is_dir() else f"there is no checkpoint at {path}"
        raise CheckpointError(f"{found}; check the path, or begin a new run")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # an unpickler's advice, to trust the file, is not passed on
        why = f" ({str(error).splitlines()[0]})" if isinstance(error, RuntimeError) and str(error) else ""
        raise CheckpointError(f"{path} is damaged or is no checkpoint{why}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of this version (format {FORMAT})")
    return state


def load_weights(structure: torch.nn.Module, path: str | Path) -> dict:
    """Put the weights of the checkpoint at `path` into `structure`; {"epoch", "step", "seconds" ...}: where it stands.

    Raises:
        CheckpointError: it is missing or damaged, or its weights do not fit.
    """
    path = Path(path)
    state = load_checkpoint(path, next(structure.parameters()).device)
    put_weights(structure, state, path)
    return {name: value for name, value in state.items() if isinstance(value, (int, float))}


def put_weights(structure: torch.nn.Module, state: dict, path: Path) -> None:
    """Put the weights of a checkpoint, already read from `path`, into `structure`."""
    try:
        structure.load_state_dict(state["structure"])
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} holds the weights of another structure than this {type(structure).__name__}; "
            f"build it with the same options as for training. {_in_short(str(error))}"
        ) from error


def _in_short(message: str, length: int = 300) -> str:
    """The beginning of a long list."""
    text = " ".join(message.split())
    return text if len(text) <= length else f"{text[:length]} ..."


def rng_state(device: torch.device) -> dict:
    """The state of torch's generators that training draws from."""
    state = {"cpu": torch.get_rng_state()}
    return {**state, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def set_rng_state(state: dict, device: torch.device) -> None:
    """Restore what `rng_state` returned."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
