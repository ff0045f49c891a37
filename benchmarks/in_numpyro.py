"""The benchmark's two models in NumPyro: a step under jit, and a whole epoch under one jit."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpyro
import numpyro.distributions as dist
import numpyro.optim
from jax import numpy as jnp
from numpyro.infer import SVI, Trace_ELBO

Z_DIMS, HIDDEN = (64, 32, 16, 8, 4), (512, 256, 128, 64, 32)


def linear(name: str, x, out_dim: int, bias: bool = True):
    """W h, with the weights as parameters of the SVI state."""
    init = jax.nn.initializers.glorot_normal()
    w = numpyro.param(f"{name}.w", lambda key: init(key, (x.shape[-1], out_dim)))
    h = x @ w
    return h + numpyro.param(f"{name}.b", jnp.zeros(out_dim)) if bias else h


def batch_norm(name: str, h):
    """By the statistics of the batch; running ones are not kept."""
    scale = numpyro.param(f"{name}.scale", jnp.ones(h.shape[-1]))
    shift = numpyro.param(f"{name}.shift", jnp.zeros(h.shape[-1]))
    return (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-5) * scale + shift


def block(name: str, x, hidden: int):
    for i in (0, 1):
        x = jax.nn.leaky_relu(batch_norm(f"{name}.bn{i}", linear(f"{name}.{i}", x, hidden, bias=False)))
    return x


def gaussian(name: str, h, out_dim: int):
    mu, raw = jnp.split(batch_norm(f"{name}.bn", linear(name, h, 2 * out_dim, bias=False)), 2, axis=-1)
    return mu, jax.nn.softplus(raw) + 1e-5


def normal(mu, variance):
    return dist.Normal(mu, jnp.sqrt(variance)).to_event(1)


def vae() -> tuple[Callable, Callable]:
    """784-400-20-400-784."""

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(20), 1.0).to_event(1))
            h = jax.nn.leaky_relu(linear("decoder", z, 400))
            numpyro.sample("x", dist.Bernoulli(logits=linear("logits", h, 784)).to_event(1), obs=x)

    def guide(x):
        h = jax.nn.leaky_relu(linear("encoder", x, 400))
        mu, raw = jnp.split(linear("head", h, 40), 2, axis=-1)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", normal(mu, jax.nn.softplus(raw) + 1e-5))

    return model, guide


def ladder() -> tuple[Callable, Callable]:
    """The paper's five layers, top-down networks shared; XLA merges what both halves compute."""

    def top_down(i: int, z):
        return gaussian(f"down{i}.head", block(f"down{i}", z, HIDDEN[i + 1]), Z_DIMS[i])

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z5", dist.Normal(jnp.zeros(4), 1.0).to_event(1))
            for i in reversed(range(4)):
                z = numpyro.sample(f"z{i + 1}", normal(*top_down(i, z)))
            logits = linear("logits", block("decoder", z, 512), 784)
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x):
        d, evidence = x, []
        for i, (z_dim, hidden) in enumerate(zip(Z_DIMS, HIDDEN, strict=True)):
            d = block(f"up{i}", d, hidden)
            evidence.append(gaussian(f"evidence{i}", d, z_dim))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z5", normal(*evidence[-1]))
            for i in reversed(range(4)):
                (mu_1, var_1), (mu_2, var_2) = evidence[i], top_down(i, z)
                total = var_1 + var_2
                z = numpyro.sample(f"z{i + 1}", normal((mu_1 * var_2 + mu_2 * var_1) / total, var_1 * var_2 / total))

    return model, guide


MODELS = {"vae": vae, "ladder": ladder}


def _svi(name: str, x):
    svi = SVI(*MODELS[name](), numpyro.optim.Adam(1e-3), Trace_ELBO())
    return svi, svi.init(jax.random.PRNGKey(0), x)


def step(name: str, x) -> Callable[[int], None]:
    """Runs a number of jitted steps on the batch `x` (a numpy array), and waits for the last."""
    x = jnp.asarray(x)
    svi, state = _svi(name, x)
    update = jax.jit(svi.update, donate_argnums=0)

    def run(count: int) -> None:
        nonlocal state
        for _ in range(count):
            state, loss = update(state, x)
        loss.block_until_ready()

    return run


def epoch(name: str, rows, batch_size: int) -> Callable[[], None]:
    """Runs one epoch over `rows` (a numpy array), shuffled, under a single jit."""
    rows = jnp.asarray(rows)
    svi, state = _svi(name, rows[:batch_size])

    def whole(state, key):
        order = jax.random.permutation(key, len(rows))

        def body(i, state):
            batch = jax.lax.dynamic_slice_in_dim(order, i * batch_size, batch_size)
            return svi.update(state, rows[batch])[0]

        return jax.lax.fori_loop(0, len(rows) // batch_size, body, state)

    whole, key = jax.jit(whole, donate_argnums=0), jax.random.PRNGKey(1)

    def run() -> None:
        nonlocal state, key
        key, now = jax.random.split(key)
        state = whole(state, now)
        jax.block_until_ready(state)

    return run
