"""NVDM and ProdLDA, and the figures of topic models, against what is worked out by hand."""

import math
from functools import partial

import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import Dirichlet

from pyro_lvae import (
    NVDM,
    AnalyticELBO,
    Dataset,
    FusedAdam,
    ProdLDA,
    elbo,
    fit,
    kl_per_layer,
    log_likelihood,
    nearest_words,
    npmi,
    perplexity,
    sample_prior,
    topics,
)
from pyro_lvae.structures.prodlda import laplace_of_dirichlet

WORDS = ("ape", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", "ibis", "jay", "koi", "lark")
COUNTS = torch.tensor([[1.0, 2, 0, 0], [3, 1, 0, 0], [1, 0, 1, 0], [0, 0, 5, 2], [0, 0, 0, 1]])


@pytest.fixture
def counts():
    return torch.randint(0, 4, (7, 12)).float()


# ------------------------------------------------------------------ structures


def test_the_laplace_approximation_has_the_mode_and_curvature_of_the_dirichlet():
    """In the softmax basis p(h) is proportional to prod_k theta_k^alpha_k; its Newton step at mu is zero.

    The Hessian -(sum alpha) (diag theta - theta theta^T) is singular along (1 ... 1), as is the softmax. Its
    pseudo-inverse has the paper's diagonal where theta = alpha / sum alpha is uniform; the paper keeps that diagonal.
    """
    alpha = torch.tensor([0.3, 1.0, 2.0, 0.7], dtype=torch.double)
    mu, variance = laplace_of_dirichlet(alpha)

    def log_p(h):
        return (alpha * h.log_softmax(-1)).sum()

    torch.testing.assert_close(torch.autograd.functional.jacobian(log_p, mu), torch.zeros_like(mu), atol=1e-12, rtol=0)
    assert mu.sum().item() == pytest.approx(0, abs=1e-12)
    # (I - 11^T/K) diag(1/alpha) (I - 11^T/K): the covariance of centred independent h_k of variance 1/alpha_k
    centre = torch.eye(4, dtype=torch.double) - 0.25
    torch.testing.assert_close(variance, (centre @ alpha.reciprocal().diag() @ centre).diagonal())
    _, uniform = laplace_of_dirichlet(torch.full((4,), 0.5, dtype=torch.double))
    curvature = -torch.autograd.functional.hessian(
        lambda h: (0.5 * h.log_softmax(-1)).sum(), torch.zeros(4, dtype=torch.double)
    )
    torch.testing.assert_close(uniform, torch.linalg.pinv(curvature).diagonal())


def test_the_prior_of_prodlda_is_near_its_dirichlet():
    """At a large alpha theta has the Dirichlet's mean, and 1 - 1/K of its variance, for the diagonal alone is kept.

    50,000 draws: a standard error of 0.1 % in the means and 0.6 % in the variances.
    """
    prodlda = ProdLDA(12, 5, 8, alpha=50.0)
    h = prodlda._prior(torch.zeros(1, 12)).sample((50_000,))
    theta, exact = h.softmax(-1), Dirichlet(torch.full((5,), 50.0))
    torch.testing.assert_close(theta.mean(0), exact.mean, rtol=0.01, atol=0)
    torch.testing.assert_close(theta.var(0) / exact.variance, torch.full((5,), 0.8), rtol=0.05, atol=0)


@pytest.mark.parametrize("make", [lambda: NVDM(12, 3, 16), lambda: ProdLDA(12, 3, 16)], ids=["NVDM", "ProdLDA"])
def test_the_bound_is_pyros_and_its_kl_the_analytic_one(make, counts):
    structure = make().double().eval()
    x = counts.double()
    q, p = structure.encoder(x), structure._prior(x)
    (mu, var), (mu_1, var_1) = ((d.mean, d.variance) for d in (q, p))
    by_hand = 0.5 * (var / var_1 + (mu_1 - mu) ** 2 / var_1 - 1 + (var_1 / var).log()).sum(-1).mean()
    assert kl_per_layer(structure, x, 20_000)["z1"] == pytest.approx(by_hand.item(), rel=0.02)
    with torch.no_grad():
        losses = {}
        for name, estimator in (("ours", AnalyticELBO()), ("pyro", TraceMeanField_ELBO())):
            torch.manual_seed(5)
            losses[name] = estimator.loss(structure.model, structure.guide, x)
        many = Trace_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=1)
        sampled = many.loss(structure.model, structure.guide, x)
    assert losses["ours"] == pytest.approx(losses["pyro"])
    assert sampled == pytest.approx(-elbo(structure, x, 2000).sum().item(), rel=0.01)


def test_the_bound_by_hand_for_nvdm(counts):
    """E_q[sum_i x_i log softmax(R^T h + b)_i] - KL, with the paper's R and b, at one draw of h."""
    nvdm = NVDM(12, 3, 16).double()
    x = counts.double()
    torch.manual_seed(6)
    loss = AnalyticELBO().loss(nvdm.model, nvdm.guide, x)
    torch.manual_seed(6)
    with torch.no_grad():
        q = nvdm.encoder(x)
        h = q.mean + q.variance.sqrt() * torch.randn(7, 3, dtype=torch.double)
        logits = h @ nvdm.R + nvdm.likelihood.words.bias
        log_p = (x * (logits - logits.logsumexp(-1, keepdim=True))).sum(-1)
        kl = 0.5 * (q.variance + q.mean**2 - 1 - q.variance.log()).sum(-1)
    assert loss == pytest.approx(-(log_p - kl).sum().item())


def test_the_encoder_gets_what_the_transform_makes_of_the_counts(counts):
    nvdm = NVDM(12, 3, 16, transform=torch.log1p)
    seen = []
    nvdm.encoder.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    nvdm.guide(counts)
    torch.testing.assert_close(seen[0], counts.log1p())


def test_documents_are_generated_as_probabilities_or_as_words():
    nvdm = NVDM(12, 3, 16)
    p = sample_prior(nvdm, 5, torch.zeros(1, 12))
    torch.testing.assert_close(p.sum(-1), torch.ones(5))


def test_the_batch_norm_of_prodlda_holds_its_kl_up(counts):
    """1/2 sum_k mean(mu_k^2) / Sigma_kk >= K/2, for mu has variance 1 over the batch and Sigma_kk = 1 - 1/K."""
    prodlda = ProdLDA(12, 3, 16).double()
    optimizer = torch.optim.SGD(prodlda.encoder.parameters(), lr=0.05)

    def kl():
        q, p = prodlda.encoder(counts.double()), prodlda._prior(counts)
        return torch.distributions.kl_divergence(q.base_dist, p.base_dist).sum(-1).mean()

    for _ in range(300):  # even where nothing but the KL is minimised
        optimizer.zero_grad()
        kl().backward()
        optimizer.step()
    assert 1.5 < kl().item() < 3


@pytest.mark.parametrize("options", [dict(z_dim=1), dict(z_dim=3, alpha=0.0)])
def test_prodlda_wants_topics_and_a_positive_alpha(options):
    with pytest.raises(ValueError, match="at least 2 topics and alpha > 0"):
        ProdLDA(12, **options)


def _planted(documents: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Documents of 30 to 60 words, nine in ten from one of three topics of four words each; and their topics."""
    topic = torch.randint(3, (documents,), generator=generator)
    p = torch.full((documents, 12), 0.1 / 12)
    for d in range(documents):
        p[d, 4 * topic[d] : 4 * topic[d] + 4] += 0.9 / 4
    lengths = torch.randint(30, 61, (documents,), generator=generator)
    words = torch.multinomial(p, 60, replacement=True, generator=generator)
    is_there = (torch.arange(60) < lengths[:, None]).float()
    return torch.zeros(documents, 12).scatter_add_(1, words, is_there), topic


def _fit(structure, x: torch.Tensor, lr: float, **options) -> None:
    data, optimizer = Dataset("planted", x[:500], x[500:]), partial(FusedAdam, lr=lr)
    fit(structure, data, optimizer=optimizer, monitor_size=10, callbacks=(), compile=False, **options)


PLANTED = [set(WORDS[:4]), set(WORDS[4:8]), set(WORDS[8:])]


def test_prodlda_recovers_planted_topics():
    """Fails for none of 20 other seeds."""
    x, _ = _planted(600, torch.Generator().manual_seed(0))
    prodlda = ProdLDA(12, 3, 32, dropout=0.1)
    _fit(prodlda, x, epochs=30, lr=0.02, batch_size=100)
    found = topics(prodlda.experts, WORDS, 4)
    assert sorted(map(sorted, found)) == sorted(map(sorted, PLANTED))
    assert (npmi(found, x, WORDS) >= -1).all()


def test_nvdm_recovers_planted_topics():
    """The nearest words are those of the same topic, and the perplexity nears the truth's. None of 20 seeds fails."""
    x, topic = _planted(600, torch.Generator().manual_seed(0))
    nvdm = NVDM(12, 3, 32)
    unigram = math.exp(-((x[:500].sum(0) / x[:500].sum()).log() * x[500:]).sum(-1).div(x[500:].sum(-1)).mean())
    _fit(nvdm, x, epochs=15, lr=0.01, batch_size=50)
    for of_topic in PLANTED:
        for word in of_topic:
            assert set(nearest_words(nvdm.R, WORDS, word, 3)) == of_topic - {word}
    p = torch.full((3, 12), 0.1 / 12)
    for k in range(3):
        p[k, 4 * k : 4 * k + 4] += 0.9 / 4
    truth = math.exp(-(x * p[topic].log()).sum(-1)[500:].div(x[500:].sum(-1)).mean())
    found = perplexity(nvdm, x[500:])
    assert truth < found < 0.5 * (truth + unigram)


# ------------------------------------------------------------------ figures


def test_perplexity_by_hand(counts):
    counts[0, 0] += 1
    counts = counts[counts.sum(-1) > 0]
    nvdm = NVDM(12, 3, 16)
    torch.manual_seed(3)
    found = perplexity(nvdm, counts, 4)
    torch.manual_seed(3)
    per_word = [b / n for b, n in zip(elbo(nvdm, counts, 4).tolist(), counts.sum(-1).tolist(), strict=True)]
    assert found == pytest.approx(math.exp(-sum(per_word) / len(per_word)), rel=1e-5)


def test_perplexity_of_a_model_that_knows_nothing_is_the_size_of_the_vocabulary(counts):
    nvdm = NVDM(12, 3, 16)
    with torch.no_grad():
        for parameter in nvdm.parameters():
            parameter.zero_()
        nvdm.encoder[2].head[0].bias[3:] = math.log(math.e - 1)  # softplus of it is 1: q(h|X) = p(h)
    assert perplexity(nvdm, counts[counts.sum(-1) > 0]) == pytest.approx(12, rel=1e-3)


def test_importance_sampling_gives_a_tighter_perplexity(counts):
    counts = counts[counts.sum(-1) > 0]
    nvdm = NVDM(12, 3, 16)
    assert perplexity(nvdm, counts, 500, estimate=log_likelihood) < perplexity(nvdm, counts, 500)


def test_empty_documents_have_no_perplexity(counts):
    counts[2] = 0
    with pytest.raises(ValueError, match="1 of 7 documents have no words"):
        perplexity(NVDM(12, 3, 16), counts)


def test_topics_are_the_largest_weights():
    R = torch.tensor([[3.0, 1.0, 2.0, 0.0], [-5.0, -1.0, -2.0, -9.0]])
    assert topics(R, WORDS[:4], 2) == [["ape", "cat"], ["bee", "cat"]]
    assert topics(R, WORDS[:4], 10)[0] == ["ape", "cat", "bee", "dog"]
    with pytest.raises(ValueError, match=r"\(2, 4\) for 3 words; expected a column a word"):
        topics(R, WORDS[:3])


def test_nearest_words_are_those_of_largest_cosine():
    R = torch.tensor([[1.0, 10.0, 0.0, -1.0], [0.0, 1.0, 1.0, 0.0]])  # angles 0, 5.7, 90 and 180 degrees
    assert nearest_words(R, WORDS[:4], "ape", 3) == ["bee", "cat", "dog"]
    assert nearest_words(R, WORDS[:4], "cat", 1) == ["bee"]
    assert len(nearest_words(R, WORDS[:4], "dog")) == 3
    with pytest.raises(ValueError, match="'yak' is none of the 4 words"):
        nearest_words(R, WORDS[:4], "yak")


def test_npmi_by_hand():
    """Of 5 documents ape is in 3, bee in 2, cat in 2, dog in 2; ape+bee in 2, ape+cat in 1, cat+dog in 1."""
    ape_bee = math.log(0.4 / (0.6 * 0.4)) / -math.log(0.4)
    ape_cat = math.log(0.2 / (0.6 * 0.4)) / -math.log(0.2)
    found = npmi([["ape", "bee"], ["ape", "cat"], ["ape", "bee", "cat"], ["bee", "dog"]], COUNTS, WORDS[:4])
    expected = [ape_bee, ape_cat, (ape_bee + ape_cat + 0) / 3, 0]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.double))
    assert npmi([["bee", "dog"]], COUNTS, WORDS[:4], never=-1.0).item() == -1


def test_words_that_are_always_together_have_npmi_one():
    counts = torch.tensor([[1.0, 2, 0], [0, 0, 1], [4, 1, 0]])
    assert npmi([["ape", "bee"]], counts, WORDS[:3]).item() == pytest.approx(1)
    assert npmi([["ape", "bee"]], counts[:1], WORDS[:3]).item() == 1, "in every document"


@pytest.mark.parametrize(
    ("found", "message"), [([["ape", "yak"]], r"hold \['yak'\]"), ([["ape"]], "has no pair"), ([[]], "has no pair")]
)
def test_npmi_refuses_what_it_cannot_count(found, message):
    with pytest.raises(ValueError, match=message):
        npmi(found, COUNTS, WORDS[:4])
