"""The structures against ELBOs written out by hand, from the papers' equations and the bare weights."""

import pytest
import torch
from pyro.infer import Trace_ELBO
from torch.distributions import Bernoulli, Normal
from torch.nn import functional as F

from pyro_lvae import BetaVAE, HierarchicalVAE, LadderVAE

SIZES = dict(x_dim=12, z_dims=(5, 3, 2), hidden_dims=(16, 8, 6), batch_norm=False)


def mlp(w, name, h):
    """Two layers, leaky ReLU; `w` is a state dict."""
    for i in (0, 2):
        h = F.leaky_relu(h @ w[f"{name}.{i}.weight"].T + w[f"{name}.{i}.bias"])
    return h


def head(w, name, h):
    """Mean and variance."""
    out = h @ w[f"{name}.head.0.weight"].T + w[f"{name}.head.0.bias"]
    mu, raw = out[..., : out.shape[-1] // 2], out[..., out.shape[-1] // 2 :]
    return mu, F.softplus(raw) + 1e-5


def gaussian(w, name, h):
    return head(w, f"{name}.1", mlp(w, f"{name}.0", h))


def log_normal(z, mu, var):
    return Normal(mu, var.sqrt()).log_prob(z).sum(-1)


def log_px(w, x, z1):
    logits = mlp(w, "decoder", z1) @ w["likelihood.logits.weight"].T + w["likelihood.logits.bias"]
    return Bernoulli(logits=logits).log_prob(x).sum(-1)


def draw(mu, var):
    return mu + var.sqrt() * torch.normal(torch.zeros_like(mu), torch.ones_like(mu))


def ladder_elbo(w, x, top_down, mu_upwards, skip=False):
    d, evidence = x, []
    for i in range(3):
        d = mlp(w, f"bottom_up.{i}", d)
        evidence.append(head(w, f"evidence.{i}", d))
        d = evidence[-1][0] if mu_upwards else d
    mu, var = evidence[2]
    z = {3: draw(mu, var)}

    def seen(i):
        return torch.cat([z[j] for j in range(3, i - 1, -1)], -1) if skip else z[i]

    bound = log_normal(z[3], 0 * mu, 1 + 0 * var) - log_normal(z[3], mu, var)
    for i in (2, 1):
        p_mu, p_var = gaussian(w, f"top_down.{i - 1}" + (".net" if top_down == "top_down" else ""), seen(i + 1))
        m_mu, m_var = (p_mu, p_var) if top_down == "top_down" else gaussian(w, f"{top_down}.{i - 1}", seen(i + 1))
        e_mu, e_var = evidence[i - 1]
        var = 1 / (1 / e_var + 1 / m_var)
        mu = (e_mu / e_var + m_mu / m_var) * var
        z[i] = draw(mu, var)
        bound = bound + log_normal(z[i], p_mu, p_var) - log_normal(z[i], mu, var)
    return bound + log_px(w, x, seen(1))


def hierarchical_elbo(w, x):
    z, bound = {0: x}, 0
    for i in (1, 2, 3):
        mu, var = gaussian(w, f"bottom_up.{i - 1}", z[i - 1])
        z[i] = draw(mu, var)
        bound = bound - log_normal(z[i], mu, var)
    for i in (1, 2):
        bound = bound + log_normal(z[i], *gaussian(w, f"top_down.{i - 1}", z[i + 1]))
    return bound + log_normal(z[3], torch.zeros(2).double(), torch.ones(2).double()) + log_px(w, x, z[1])


def beta_vae_elbo(w, x):
    """Two layers of ReLU up, three of tanh down."""
    h = x
    for i in (0, 2):
        h = F.relu(h @ w[f"bottom_up.0.0.{i}.weight"].T + w[f"bottom_up.0.0.{i}.bias"])
    mu, var = head(w, "bottom_up.0.1", h)
    z = h = draw(mu, var)
    for i in (0, 2, 4):
        h = torch.tanh(h @ w[f"decoder.{i}.weight"].T + w[f"decoder.{i}.bias"])
    logits = h @ w["likelihood.logits.weight"].T + w["likelihood.logits.bias"]
    kl = log_normal(z, mu, var) - log_normal(z, 0 * mu, 1 + 0 * var)
    return Bernoulli(logits=logits).log_prob(x).sum(-1) - kl


CASES = {
    "ladder": (LadderVAE(**SIZES), lambda w, x: ladder_elbo(w, x, "top_down", False)),
    "ladder-mu-upwards": (LadderVAE(**SIZES, mu_upwards=True), lambda w, x: ladder_elbo(w, x, "top_down", True)),
    "ladder-unshared": (
        LadderVAE(**SIZES, share_top_down=False),
        lambda w, x: ladder_elbo(w, x, "guide_top_down", False),
    ),
    "ladder-skip": (LadderVAE(**SIZES, skip=True), lambda w, x: ladder_elbo(w, x, "top_down", False, skip=True)),
    "hierarchical": (HierarchicalVAE(**SIZES), hierarchical_elbo),
    "beta": (BetaVAE(12, 4, 9), beta_vae_elbo),
}


@pytest.mark.parametrize("case", CASES)
def test_elbo_and_gradient_equal_those_written_by_hand(case, x):
    structure, by_hand = CASES[case]
    structure.double().zero_grad()
    x = x.double()
    torch.manual_seed(1)
    loss = Trace_ELBO().differentiable_loss(structure.model, structure.guide, x)
    loss.backward()
    weights = {k: v.detach().clone().requires_grad_() for k, v in structure.state_dict().items()}
    torch.manual_seed(1)
    bound = by_hand(weights, x).sum()
    bound.backward()
    torch.testing.assert_close(-loss.detach(), bound.detach())
    for name, parameter in structure.named_parameters():
        torch.testing.assert_close(-parameter.grad, weights[name].grad, msg=name)
