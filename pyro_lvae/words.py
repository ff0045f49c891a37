"""Word counts of documents, each of its own length: their distribution, and likelihoods that give it."""

from __future__ import annotations

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from .nets import BatchNorm, linear


class WordCounts(TorchDistribution):
    r"""The words of a document, drawn independently of each other; their order is not kept.

        log p(x) = sum_i x_i log p_i,  p = softmax(logits)

    The probability of the N = sum_i x_i words one after the other, given N (Miao et al. 2016, section 3).
    It is that of a multinomial without its coefficient N! / prod_i x_i!, which depends on no parameter, so it sums to
    one over sequences of N words, not over counts. `torch.distributions.Multinomial` has one N for a whole batch; here
    every document has its own.

    Args:
        logits: unnormalised log-probabilities of the V words, `[..., V]`.
        total_count: N of what is drawn, and of the mean: a number, or one a document, `[...]`. Log-densities do not
            depend on it.

    >>> WordCounts(torch.zeros(2, 4)).log_prob(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 3.0]]))
    tensor([-1.3863, -6.9315])
    """

    arg_constraints = {"logits": constraints.real_vector, "total_count": constraints.nonnegative_integer}  # noqa: RUF012
    support = constraints.independent(constraints.nonnegative_integer, 1)

    def __init__(self, logits: Tensor, total_count: int | Tensor = 1, validate_args: bool | None = None):
        if logits.ndim < 1:
            raise ValueError("logits is a scalar; expected one a word, [..., V]")
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # a softmax of many words needs the digits
        count = total_count if isinstance(total_count, Tensor) else logits.new_full((), total_count)
        shape = torch.broadcast_shapes(logits.shape[:-1], count.shape)
        self.logits = logits.log_softmax(-1).expand(*shape, -1)
        self.total_count = count.to(logits).expand(shape)
        super().__init__(shape, logits.shape[-1:], validate_args=validate_args)

    @property
    def probs(self) -> Tensor:
        """p, `[..., V]`."""
        return self.logits.exp()

    @property
    def mean(self) -> Tensor:
        """N p."""
        return self.total_count[..., None] * self.probs

    @property
    def variance(self) -> Tensor:
        """N p (1 - p)."""
        return self.mean * (1 - self.probs)

    def expand(self, batch_shape, _instance=None) -> WordCounts:
        """The same with the batch shape expanded."""
        new = self._get_checked_instance(WordCounts, _instance)
        shape = torch.Size(batch_shape)
        new.logits = self.logits.expand(*shape, -1)
        new.total_count = self.total_count.expand(shape)
        super(WordCounts, new).__init__(shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """sum_i x_i log p_i, in nats, `[...]`."""
        if self._validate_args:
            self._validate_sample(value)
        return (value * self.logits).sum(-1)

    def sample(self, sample_shape=torch.Size()) -> Tensor:  # noqa: B008, torch's own default
        """Counts of `total_count` words, `[*sample_shape, ..., V]`."""
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            p = self.probs.expand(shape).reshape(-1, shape[-1])
            lengths = self.total_count.expand(shape[:-1]).reshape(-1, 1)
            longest = int(lengths.max()) if lengths.numel() else 0
            words = torch.multinomial(p, longest, replacement=True) if longest else p.new_zeros(len(p), 0).long()
            is_there = torch.arange(longest, device=p.device) < lengths
            return torch.zeros_like(p).scatter_add_(-1, words, is_there.to(p)).reshape(shape)


class BagOfWords(nn.Module):
    r"""Word counts of documents: h -> p(x | h), a word i having the energy E(i; h) = -h^T R_i - b_i.

        log p(x|h) = sum_i x_i log softmax(R^T h + b)_i

    (Miao et al. 2016, section 3.) The probability of the words one after the other: there is no multinomial coefficient
    in it, see `WordCounts`. Documents of a batch may have any lengths.

    Args:
        in_dim: size K of the features `[..., K]`.
        out_dim: size V of the vocabulary; log-densities are nats per document.
        total_count: words in a document that is drawn; with 1 the mean of x is the words' probabilities.
    """

    def __init__(self, in_dim: int, out_dim: int, *, total_count: int = 1):
        super().__init__()
        self.words = linear(in_dim, out_dim)
        self.total_count = total_count

    @property
    def R(self) -> Tensor:
        """The words' embeddings, `[K, V]`, a column a word."""
        return self.words.weight.T

    def forward(self, h: Tensor) -> TorchDistribution:
        return WordCounts(self.words(h), self.total_count)


class ProductOfExperts(nn.Module):
    r"""Word counts of documents, topics mixed in the logits: h -> p(x | theta), theta = softmax(h).

        log p(x|h) = sum_i x_i log softmax(BN(dropout(theta)^T R))_i

    (Srivastava & Sutton 2017, section 4: ProdLDA. A product of the topics' distributions, each to the power of its
    proportion, where LDA has their sum.) The batch norm has a bias and no gain, and dropout acts on the proportions, as
    in the authors' published code. There is no multinomial coefficient, see `WordCounts`.

    Args:
        in_dim: number K of topics; features are `[..., K]`.
        out_dim: size V of the vocabulary; log-densities are nats per document.
        dropout: share of the proportions set to 0 while training.
        total_count: words in a document that is drawn; with 1 the mean of x is the words' probabilities.
    """

    def __init__(self, in_dim: int, out_dim: int, *, dropout: float = 0.6, total_count: int = 1):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.words = linear(in_dim, out_dim, bias=False)
        self.norm = BatchNorm(out_dim, gain=False)
        self.total_count = total_count

    @property
    def R(self) -> Tensor:
        """The topics' unnormalised log-weights of the words, `[K, V]` (beta in the paper)."""
        return self.words.weight.T

    @property
    def experts(self) -> Tensor:
        """R as it acts after batch norm, `[K, V]`: its distance from the average document's, in standard deviations."""
        return (self.R - self.norm.running_mean) * torch.rsqrt(self.norm.running_var + self.norm.eps)

    def forward(self, h: Tensor) -> TorchDistribution:
        return WordCounts(self.norm(self.words(self.dropout(h.softmax(-1)))), self.total_count)
