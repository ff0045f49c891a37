"""WordCounts against torch's Multinomial, and the conditionals that return it."""

import math

import pytest
import torch
from pyro.distributions import Multinomial

from pyro_lvae.words import BagOfWords, ProductOfExperts, WordCounts

V = 6


def _coefficient(x):
    """log N! / prod x_i!"""
    return (x.sum(-1) + 1).lgamma() - (x + 1).lgamma().sum(-1)


@pytest.mark.parametrize("lead", [(4,), (3, 4)])
def test_the_density_is_a_multinomials_without_its_coefficient(lead):
    logits = torch.randn(*lead, V, dtype=torch.double)
    x = torch.randint(0, 5, (4, V)).double()
    found = WordCounts(logits).log_prob(x)
    assert found.shape == lead
    for d in range(4):  # torch's has one number of words a batch
        oracle = Multinomial(int(x[d].sum()), logits=logits[..., d, :]).log_prob(x[d]) - _coefficient(x[d])
        torch.testing.assert_close(found[..., d], oracle)


def test_it_sums_to_one_over_sequences_of_words():
    p = WordCounts(torch.randn(3, dtype=torch.double))
    sequences = torch.cartesian_prod(*[torch.arange(3)] * 4)
    counts = torch.nn.functional.one_hot(sequences, 3).sum(1).double()
    assert p.expand((81,)).log_prob(counts).exp().sum().item() == pytest.approx(1)


def test_draws_have_the_stated_lengths_and_the_multinomials_moments():
    lengths = torch.tensor([0, 1, 30])
    p = WordCounts(torch.randn(3, V), lengths)
    assert (p.batch_shape, p.event_shape) == ((3,), (V,))
    n = 4000
    draws = p.sample((n,))
    assert draws.shape == (n, 3, V)
    assert torch.equal(draws.sum(-1), lengths.float().expand(n, 3))
    assert p.log_prob(draws).shape == (n, 3)
    torch.testing.assert_close(p.variance[1:], Multinomial(1, p.probs[1:]).variance * lengths[1:, None])
    # 18 means of 4,000 draws: one strays by 5 standard errors with probability below 2e-5.
    assert ((draws.mean(0) - p.mean).abs() <= 5 * (p.variance / n).sqrt() + 1e-6).all()
    assert WordCounts(torch.randn(2, V), 0).sample().eq(0).all()


def test_it_expands_and_broadcasts_its_lengths():
    logits = torch.randn(4, V)
    p = WordCounts(logits, torch.tensor([[2], [3]]))
    assert p.batch_shape == (2, 4)
    assert p.sample().sum(-1).tolist() == [[2.0] * 4, [3.0] * 4]
    many = WordCounts(logits, 5).expand((3, 4))
    assert many.batch_shape == (3, 4)
    x = many.sample()
    assert x.shape == (3, 4, V)
    torch.testing.assert_close(many.log_prob(x), WordCounts(logits).log_prob(x))
    assert many.has_rsample is False


@pytest.mark.parametrize(
    "x", [torch.full((2, V), -1.0), torch.full((2, V), 0.5), torch.full((2, V), math.nan)], ids=str
)
def test_only_counts_are_admitted(x):
    p = WordCounts(torch.zeros(2, V), validate_args=True)
    p.log_prob(torch.ones(2, V))  # floating-point counts are counts
    with pytest.raises(ValueError, match="within the support"):
        p.log_prob(x)
    with pytest.raises(ValueError, match="within the support"):
        p.expand((3, 2)).log_prob(x)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="logits is a scalar"):
        WordCounts(torch.tensor(1.0))
    with pytest.raises(ValueError, match="total_count"):
        WordCounts(torch.zeros(2, V), -1, validate_args=True)


def test_a_bag_of_words_is_the_softmax_of_the_paper():
    """p(word i | h) = exp(-E(i)) / sum_j exp(-E(j)), E(i) = -h^T R_i - b_i."""
    head, h = BagOfWords(3, V).double(), torch.randn(2, 3, dtype=torch.double)
    assert head.R.shape == (3, V)
    for d in range(2):
        weight = torch.stack([(h[d] @ head.R[:, i] + head.words.bias[i]).exp() for i in range(V)])
        torch.testing.assert_close(head(h).probs[d], weight / weight.sum())


def test_a_product_of_experts_multiplies_the_topics():
    """In evaluation mode, p_i is proportional to prod_k beta_ki^theta_k, with beta as the batch norm leaves it."""
    head, h = ProductOfExperts(3, V, dropout=0.5).double(), torch.randn(50, 3, dtype=torch.double)
    for _ in range(3):
        head(h)  # moves the running statistics
    head.eval()
    scale = (head.norm.running_var + head.norm.eps).sqrt()
    beta = ((head.R - head.norm.running_mean) / scale).exp()  # theta sums to 1, so each topic takes the mean along
    torch.testing.assert_close(head.experts.exp(), beta)
    product = (beta ** h.softmax(-1)[..., None]).prod(-2)
    torch.testing.assert_close(head(h).probs, product / product.sum(-1, keepdim=True))


def test_its_batch_norm_has_no_gain_and_takes_particles():
    head = ProductOfExperts(3, V, dropout=0.0)
    assert {n for n, _ in head.named_parameters()} == {"words.weight", "norm.bias"}
    h = torch.randn(4, 5, 3)
    logits = head(h).logits
    flat = head(h.reshape(20, 3)).logits
    torch.testing.assert_close(logits.reshape(20, V), flat)
    before = head.norm(torch.randn(100, V))
    torch.testing.assert_close(before.std(0, correction=0), torch.ones(V), rtol=1e-3, atol=1e-3)


def test_dropout_acts_while_training_alone():
    head, h = ProductOfExperts(3, V, dropout=0.5), torch.randn(20, 3)
    assert not torch.equal(head(h).logits, head(h).logits)
    head.eval()
    assert torch.equal(head(h).logits, head(h).logits)
