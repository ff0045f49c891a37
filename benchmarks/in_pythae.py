"""The benchmark's VAE in pythae, trained by its own trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from tempfile import TemporaryDirectory

import torch
from pythae.data.datasets import BaseDataset
from pythae.models import VAE, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.trainers import BaseTrainer, BaseTrainerConfig
from pythae.trainers.training_callbacks import CallbackHandler, TrainingCallback
from torch import nn


class Encoder(BaseEncoder):
    def __init__(self, x_dim: int, hidden: int, z_dim: int):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(x_dim, hidden), nn.LeakyReLU(), nn.Linear(hidden, 2 * z_dim))

    def forward(self, x):
        mu, log_variance = self.net(x).chunk(2, -1)
        return ModelOutput(embedding=mu, log_covariance=log_variance)


class Decoder(BaseDecoder):
    def __init__(self, x_dim: int, hidden: int, z_dim: int):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(z_dim, hidden), nn.LeakyReLU(), nn.Linear(hidden, x_dim), nn.Sigmoid())

    def forward(self, z):
        return ModelOutput(reconstruction=self.net(z))


class LightTrainer(BaseTrainer):
    """Without progress bar and console."""

    def _setup_callbacks(self):
        self.callback_handler = CallbackHandler(callbacks=[TrainingCallback()], model=self.model)


def epoch(rows: torch.Tensor, batch_size: int) -> Callable[[], None]:
    """Runs one epoch of training over `rows`: no checkpoint, no evaluation, no log."""
    for name in [n for n in logging.root.manager.loggerDict if n.startswith("pythae")]:
        logging.getLogger(name).setLevel(logging.WARNING)
    sizes = dict(x_dim=784, hidden=400, z_dim=20)
    config = VAEConfig(input_dim=(784,), latent_dim=20, reconstruction_loss="bce")
    data = BaseDataset(rows, torch.zeros(len(rows)))
    with TemporaryDirectory() as folder:  # insisted on, and left empty
        options = BaseTrainerConfig(
            output_dir=folder, per_device_train_batch_size=batch_size, learning_rate=1e-3, no_cuda=True
        )
        trainer = LightTrainer(VAE(config, Encoder(**sizes), Decoder(**sizes)), data, training_config=options)
        trainer.prepare_training()
    done = 0

    def run() -> None:
        nonlocal done
        done += 1
        trainer.train_step(done)

    return run
