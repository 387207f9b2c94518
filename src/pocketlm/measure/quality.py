"""What a compressed model still knows of the original: perplexity, KL divergence, agreement, with intervals."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pocketlm.measure.interval import Interval
from pocketlm.tensors.divergence import kl_divergence, negative_log_likelihood

Logits = Callable[[list[int]], Tensor]
"""From one window of token ids to logits, (tokens, vocabulary)."""

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Quality:
    """How one model does on a text, and how it compares with the reference on the very same windows.

    Attributes:
        perplexity: exp of the mean negative log-likelihood per token; of the reference's tokens, whose number is the
            same for all, where the vocabularies differ.
        ratio: Perplexity over the reference's, paired window by window.
        kl: Mean KL(reference ‖ model) in nats per token; None for the reference itself, and where vocabularies differ.
        agreement: Share of positions with the reference's most likely token; None where `kl` is.
        bits_per_byte: Negative log-likelihood per byte of text, which no tokenizer changes; None where all models have
            the same vocabulary, so that perplexities can be compared.
    """

    perplexity: Interval
    ratio: Interval
    kl: Interval | None
    agreement: Interval | None
    bits_per_byte: Interval | None = None


@dataclass(frozen=True)
class Comparison:
    """Qualities by name, the reference first, and any pair's perplexity ratio."""

    qualities: dict[str, Quality]
    losses: dict[str, Tensor]  # per name, (windows,) mean negative log-likelihood in nats

    def ratio(self, name: str, to: str) -> Interval:
        """Return the perplexity of `name` over that of `to`, paired window by window."""
        return bootstrap(self.losses[name] - self.losses[to], torch.exp)


@torch.no_grad()
def compare(
    models: Mapping[str, Logits],
    windows: Tensor,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Measure several models on the same windows; the first one is the reference.

    Args:
        models: By name, each a function from token ids to logits.
        windows: (windows, length) token ids; each window starts from an empty context.
        progress: Called after each window with how many are done and how many there are.
    """
    reference = next(iter(models))
    sums: dict[str, list[tuple[float, float, float]]] = {name: [] for name in models}
    for done, window in enumerate(windows, 1):
        ids = window.tolist()
        truth = models[reference](ids)[:-1]
        for name, model in models.items():
            logits = truth if name == reference else model(ids)[:-1]
            loss = negative_log_likelihood(logits, window[1:]).mean().item()
            kl = 0.0 if name == reference else kl_divergence(truth, logits).mean().item()
            agree = (logits.argmax(-1) == truth.argmax(-1)).double().mean().item()
            sums[name].append((loss, kl, agree))
        progress(done, len(windows))
    columns = {name: torch.tensor(rows, dtype=torch.float64).T for name, rows in sums.items()}
    base = columns[reference][0]
    qualities = {
        name: Quality(
            perplexity=bootstrap(loss, torch.exp),
            ratio=bootstrap(loss - base, torch.exp),
            kl=None if name == reference else bootstrap(kl),
            agreement=None if name == reference else bootstrap(agree),
        )
        for name, (loss, kl, agree) in columns.items()
    }
    return Comparison(qualities, {name: column[0] for name, column in columns.items()})


@dataclass(frozen=True)
class Reader:
    """A model and its own tokenizer: `encode` puts a token in front, so that every byte of a text is predicted."""

    encode: Callable[[str], list[int]]
    logits: Logits


@torch.no_grad()
def compare_on_text(
    readers: Mapping[str, Reader],
    texts: Sequence[str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Measure models of different vocabularies on the same texts, each as its own tokenizer cuts them.

    KL and agreement are there only for models that cut every text as the reference does, into as many choices.

    Args:
        readers: By name; the first one is the reference.
        texts: Each starts from an empty context.
        progress: Called after each text with how many are done and how many there are.
    """
    reference = next(iter(readers))
    rows: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in readers}
    for done, text in enumerate(texts, 1):
        known = readers[reference].encode(text)
        truth = readers[reference].logits(known)[:-1]
        for name, reader in readers.items():
            ids = known if name == reference else reader.encode(text)
            logits = truth if name == reference else reader.logits(ids)[:-1]
            nats = negative_log_likelihood(logits, torch.tensor(ids[1:])).sum().item()
            alike = ids == known and logits.shape == truth.shape
            kl = kl_divergence(truth, logits).mean().item() if alike else math.nan
            agree = (logits.argmax(-1) == truth.argmax(-1)).double().mean().item() if alike else math.nan
            bits = nats / math.log(2) / len(text.encode())
            rows[name].append((nats / (len(known) - 1), kl, agree, bits))
        progress(done, len(texts))
    columns = {name: torch.tensor(each, dtype=torch.float64).T for name, each in rows.items()}
    base = columns[reference][0]
    qualities = {}
    for name, (loss, kl, agree, bits) in columns.items():
        comparable = name != reference and not kl.isnan().any()
        qualities[name] = Quality(
            perplexity=bootstrap(loss, torch.exp),
            ratio=bootstrap(loss - base, torch.exp),
            kl=bootstrap(kl) if comparable else None,
            agreement=bootstrap(agree) if comparable else None,
            bits_per_byte=bootstrap(bits),
        )
    return Comparison(qualities, {name: column[0] for name, column in columns.items()})


def bootstrap(values: Tensor, then: Callable[[Tensor], Tensor] = lambda mean: mean) -> Interval:
    """Return `then` of the mean of values of windows or items, with its percentile bootstrap interval over them.

    Every figure resamples in the same way (a fixed seed), so figures of two models stay paired.

    Args:
        values: (windows,) float64.
        then: Rising, applied to each mean.
    """
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    means = then(values[draws].mean(1))
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = means.quantile(tails).tolist()
    return Interval(then(values.mean()).item(), low, high)
