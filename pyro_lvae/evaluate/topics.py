"""Models of documents: perplexity, the nearest words, the topics and how coherent they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .chunks import check_rows
from .likelihood import elbo


def perplexity(
    structure: nn.Module, x: Tensor, num_samples: int = 20, *, estimate: Callable[..., Tensor] = elbo
) -> float:
    r"""How many words each next word is as uncertain as, on average over the documents:

        exp(-1/D sum_d 1/N_d log p(x_d))

    with N_d the number of words in document d, and its evidence lower bound in place of log p(x_d), so this is an upper
    bound in expectation (Miao et al. 2016, section 5; Mnih & Gregor 2014). Every document counts alike, however long.

    Args:
        structure: with a likelihood of words, such as `BagOfWords`, which has no multinomial coefficient.
        x: counts `[D, V]`.
        num_samples: draws for each bound.
        estimate: `(structure, x, num_samples) -> nats [D]`; `log_likelihood` takes importance sampling, a tighter
            bound, instead.

    Raises:
        ValueError: a document is empty.
    """
    x, _ = check_rows(structure, x)
    lengths = x.sum(-1)
    if not (lengths > 0).all():
        raise ValueError(
            f"{int((lengths <= 0).sum())} of {len(x)} documents have no words, and so no perplexity; leave them out "
            "with x[x.sum(-1) > 0]"
        )
    return math.exp(-(estimate(structure, x, num_samples).double() / lengths).mean().item())


def nearest_words(R: Tensor, vocabulary: Sequence[str], word: str, count: int = 5) -> list[str]:
    """The words whose embeddings are nearest to that of `word`, by their cosine (Miao et al. 2016, section 5).

    Args:
        R: embeddings `[K, V]`, a column a word, such as `NVDM.R`.
        vocabulary: the words of the columns.

    Returns:
        The nearest first, `word` itself left out.
    """
    _check_words(R, vocabulary)
    if word not in vocabulary:
        raise ValueError(f"{word!r} is none of the {len(vocabulary)} words of the vocabulary")
    columns, at = F.normalize(R.detach(), dim=0), vocabulary.index(word)
    cosines = columns.T @ columns[:, at]
    cosines[at] = -math.inf
    return [vocabulary[i] for i in cosines.topk(min(count, len(vocabulary) - 1)).indices.tolist()]


def topics(R: Tensor, vocabulary: Sequence[str], count: int = 10) -> list[list[str]]:
    """The words of largest weight in each row of `R` `[K, V]`, the largest first: one list a topic."""
    _check_words(R, vocabulary)
    largest = R.detach().topk(min(count, len(vocabulary)), dim=1).indices
    return [[vocabulary[i] for i in row] for row in largest.tolist()]


def npmi(topics: Sequence[Sequence[str]], counts: Tensor, vocabulary: Sequence[str], *, never: float = 0.0) -> Tensor:
    r"""Coherence of topics: the normalised pointwise mutual information of their words, mean over the pairs.

        NPMI(i, j) = log(p(i, j) / (p(i) p(j))) / -log p(i, j)

    from -1 to 1, with p the share of documents that hold a word, or both (Bouma 2009; Lau et al. 2014). Figures depend
    on the corpus, and on whether words are counted together in a document, as here, or in a window.

    Args:
        topics: lists of words, such as those of `topics`.
        counts: the reference corpus `[D, V]`.
        vocabulary: the words of its columns.
        never: what a pair counts that is in no document together: 0 as in the published code of Lau et al., while the
            limit of the formula is -1.

    Returns:
        One figure a topic, `[T]`.
    """
    _check_words(counts, vocabulary)
    column = {word: i for i, word in enumerate(vocabulary)}
    if unknown := sorted({word for topic in topics for word in topic} - column.keys()):
        raise ValueError(f"topics hold {unknown[:5]}, which are none of the {len(vocabulary)} words of the corpus")
    if short := [list(topic) for topic in topics if len(topic) < 2]:
        raise ValueError(f"the topic {short[0]} has no pair of words; give at least 2")
    used = sorted({column[word] for topic in topics for word in topic})
    row = {at: i for i, at in enumerate(used)}
    pairs = _pairwise_npmi((counts[:, used] > 0).double(), never)
    found = []
    for topic in topics:
        rows = torch.tensor([row[column[word]] for word in topic], device=pairs.device)
        i, j = torch.combinations(rows).unbind(1)
        found.append(pairs[i, j].mean())
    return torch.stack(found)


def _pairwise_npmi(is_in: Tensor, never: float) -> Tensor:
    """NPMI of every two columns of `[D, W]` zeros and ones."""
    together = is_in.T @ is_in / len(is_in)
    alone = together.diagonal()
    value = (together / (alone[:, None] * alone)).log() / -together.log()
    value = torch.where(together == 1, 1.0, value)  # always together: the limit
    return torch.where(together == 0, never, value)


def _check_words(columns: Tensor, vocabulary: Sequence[str]) -> None:
    if columns.ndim != 2 or columns.shape[1] != len(vocabulary):
        raise ValueError(f"{tuple(columns.shape)} for {len(vocabulary)} words; expected a column a word, [..., V]")
