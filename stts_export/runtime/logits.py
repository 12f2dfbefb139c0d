"""From logits to the next token.

Rules and their order are those of `generate` in transformers (`GenerationMixin._sample` and
`generation/logits_process.py`): repetition penalty, temperature, top-k, top-p, draw. Sums and
exponentials are fp64, so that nothing overflows. V is the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stts_export.errors import InputError

Scores = NDArray[np.float64]
"""(V,) unnormalised log-probabilities; -inf for tokens that are out."""

_LARGEST = np.finfo(np.float64).max


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the most likely one, unless there is a temperature.

    Raises:
        InputError: a value is not a number, or outside its range.
    """

    temperature: float = 0.0
    """0 takes the most likely token, whatever `top_k`, `top_p` and `seed` are; 1 draws from the
    model's own distribution."""
    top_k: int = 0
    """Draw from this many most likely tokens, and those as likely as the last of them; 0: all."""
    top_p: float = 1.0
    """Draw from the fewest most likely tokens that reach this probability together; 1: all."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens of the prompt and of the answer less likely; 1 changes nothing."""
    seed: int | None = None
    """The same seed draws the same numbers, one a token; another each time when None."""

    def __post_init__(self) -> None:
        temperature, top_p, penalty = self.temperature, self.top_p, self.repetition_penalty
        self._demand("temperature", _is_finite(temperature) and temperature >= 0, "0 or more")
        self._demand("top_k", _is_integer(self.top_k), "an integer, 0 (all tokens) or more")
        self._demand("top_p", _is_finite(top_p) and 0 < top_p <= 1, "0 < top_p <= 1")
        self._demand(
            "repetition_penalty",
            _is_finite(penalty) and penalty > 0,
            "a number above 0; above 1 discourages repetition",
        )
        self._demand("seed", self.seed is None or _is_integer(self.seed), "an integer, 0 or more")

    def _demand(self, name: str, fits: bool, allowed: str) -> None:
        if not fits:
            raise InputError(f"{name} is {getattr(self, name)!r}", where=name, allowed=allowed)


def check_sampling(given: object) -> Sampling:
    """Return how tokens are chosen: as given, or the most likely ones when None.

    Raises:
        InputError: it is something else.
    """
    if given is None:
        return Sampling()
    if not isinstance(given, Sampling):
        raise InputError(
            f"sampling is {given!r}",
            where="sampling",
            allowed="a stts_export.Sampling, or None",
            fix="Sampling(temperature=0.7), for example",
        )
    return given


def _is_finite(value: object) -> bool:
    is_number = isinstance(value, (int, float, np.integer, np.floating))
    return is_number and not isinstance(value, bool) and math.isfinite(value)  # type: ignore[arg-type]


def _is_integer(value: object) -> bool:
    """An integer, 0 or more."""
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return is_integer and value >= 0  # type: ignore[operator]


@dataclass(frozen=True)
class Candidate:
    """A token that could have come next."""

    token_id: int
    logprob: float
    """Natural logarithm of the probability that the model gives it."""
    text: str | None = None
    """The token alone: "" for a special one, with U+FFFD for parts of characters; None when the
    bundle has no tokenizer."""


@dataclass(frozen=True)
class TokenLogprob(Candidate):
    """A token of an answer, and what else was likely there."""

    top: tuple[Candidate, ...] = ()
    """Most likely tokens, best first, the chosen one among them if it is one of the best."""


def with_text(entry: TokenLogprob, decode: Callable[[Sequence[int]], str]) -> TokenLogprob:
    """Fill in what the tokens say."""
    top = tuple(replace(other, text=decode([other.token_id])) for other in entry.top)
    return replace(entry, text=decode([entry.token_id]), top=top)


class TokenChooser:
    """Chooses the tokens of one answer.

    Args:
        sampling: how.
        prompt_ids: (L,) the prompt that the decoder gets, for the repetition penalty: without the
            tokens of removed windows. Ids that have no logit, as `<im_patch>`, do not count.
    """

    def __init__(self, sampling: Sampling, prompt_ids: NDArray[np.integer[Any]]) -> None:
        self._sampling = sampling
        self._seen = set(np.unique(prompt_ids).tolist())
        self._random = np.random.Generator(np.random.PCG64(sampling.seed))

    def __call__(self, logits: NDArray[np.float32]) -> int:
        """Choose from (V,) finite logits, and count the token as seen."""
        scores = logits.astype(np.float64)
        if self._sampling.repetition_penalty != 1:
            scores = penalise(scores, list(self._seen), self._sampling.repetition_penalty)
        if self._sampling.temperature == 0:
            token = int(scores.argmax())
        else:
            token = draw(narrow(scores, self._sampling), self._random.random())
        self._seen.add(token)
        return token


def penalise(scores: Scores, seen: Sequence[int], penalty: float) -> Scores:
    """Make tokens that were seen less likely, each once: `RepetitionPenaltyLogitsProcessor`.

    Args:
        scores: (V,).
        seen: token ids; those of V and above are ignored.
        penalty: positive scores are divided by it, negative ones multiplied.
    """
    ids = np.array([token for token in seen if token < len(scores)], dtype=np.int64)
    penalised: Scores = scores.copy()
    old = scores[ids]
    with np.errstate(over="ignore"):
        changed = np.where(old < 0, old * penalty, old / penalty)
    penalised[ids] = np.clip(changed, -_LARGEST, _LARGEST)
    return penalised


def narrow(scores: Scores, sampling: Sampling) -> Scores:
    """Apply temperature, top-k and top-p.

    Sources: `TemperatureLogitsWarper`, `TopKLogitsWarper`, `TopPLogitsWarper`. Top-k, which only
    compares scores, comes first here: a shift in fp64 can make small scores equal.

    Args:
        scores: (V,) finite.
        sampling: with a temperature above 0.

    Returns:
        (V,) shifted so that the best is 0.
    """
    out = np.zeros(scores.shape, dtype=np.bool_)
    if 0 < sampling.top_k < len(scores):
        out = scores < np.partition(scores, -sampling.top_k)[-sampling.top_k]
    # Shifted before it is divided, so that a tiny temperature does not overflow.
    with np.errstate(over="ignore"):
        scores = (scores - scores.max()) / float(sampling.temperature)
    scores[out] = -np.inf
    if sampling.top_p < 1:
        scores = _top_p(scores, sampling.top_p)
    return scores


def _top_p(scores: Scores, top_p: float) -> Scores:
    """Take out the least likely tokens that have at most 1 - top_p together; never the best.

    Of equal tokens lower ids stay, as with the most likely one; transformers leaves that open.
    """
    probabilities = np.exp(scores)
    probabilities /= probabilities.sum()
    # So unlikely that even V of them would go: they need no sorting.
    sorts = probabilities >= min((1 - top_p) / len(scores), probabilities.max())
    rest = np.flatnonzero(sorts)
    order = rest[np.argsort(-scores[rest], kind="stable")][::-1]
    below = probabilities[~sorts].sum() + np.cumsum(probabilities[order])
    stays = order[below > 1 - top_p] if below[-1] > 1 - top_p else order[-1:]
    narrowed = np.full_like(scores, -np.inf)
    narrowed[stays] = scores[stays]
    return narrowed


def draw(scores: Scores, uniform: float) -> int:
    """Take the token at `uniform`, in [0, 1), of the summed probabilities in order of ids."""
    weights = np.exp(scores - scores.max())
    possible = np.flatnonzero(weights)
    reached = np.cumsum(weights[possible])
    index = int(np.searchsorted(reached, uniform * reached[-1], side="right"))
    return int(possible[min(index, len(possible) - 1)])


def log_probabilities(logits: NDArray[np.float32], token: int, top: int) -> TokenLogprob:
    """Log-probabilities of the model's own distribution, before penalty and temperature.

    Args:
        logits: (V,) finite, as the decoder gave them.
        token: the chosen token.
        top: how many of the most likely tokens to name; lower ids first among equals.
    """
    scores = logits.astype(np.float64)
    scores -= scores.max()
    scores -= np.log(np.exp(scores).sum())
    top = min(top, len(scores))
    near = np.flatnonzero(scores >= np.partition(scores, -top)[-top])
    best = near[np.argsort(-scores[near], kind="stable")][:top]
    return TokenLogprob(
        token,
        float(scores[token]),
        top=tuple(Candidate(int(other), float(scores[other])) for other in best),
    )
