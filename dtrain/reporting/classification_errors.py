"""What a classification got wrong: counts of (truth, guess) and the worst errors, of one rank's batches or of all."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

_MOST_CLASSES = 30  # of a confusion matrix that can be read


class Error(NamedTuple):
    """A sample that was taken for one of another class. They sort by their loss, the largest first."""

    minus_loss: float
    sample: int
    place: int  # which of several objects in the sample; -1: the sample is one
    truth: int
    guess: int
    probability: float  # given to the guess


class Errors(NamedTuple):
    """What is wrong in some batches, in plain types."""

    pairs: Mapping[tuple[int, int], int]  # (truth, guess) -> how often
    worst: Sequence[Error]
    ignored: int


def read(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one batch (truth, guess) and (minus the loss, the guess's probability): each (2, N, K) on the device.

    The output is logits (N, C) or (N, C, K), the target integers (N,), (N, 1), (N, K) or (N, 1, K).
    """
    scores = output.detach().float().reshape(len(output), output.shape[1], -1).log_softmax(1)
    truth = target.reshape(len(target), -1).long()
    highest, guess = scores.max(1)
    of_truth = scores.gather(1, truth.clamp(0, output.shape[1] - 1)[:, None])[:, 0]
    minus_loss = of_truth.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    return torch.stack((truth, guess)), torch.stack((minus_loss, highest.exp()))


def errors_of(batch: tuple[torch.Tensor, torch.Tensor], first: int, classes: int, most: int) -> Errors:
    """The errors of one batch from `read`, whose first sample has this number; of the worst so many are kept."""
    truth, guess = batch[0].cpu().numpy()
    minus_loss, probability = batch[1].cpu().double().numpy()
    known = (truth >= 0) & (truth < classes)
    found, counts = np.unique(np.stack((truth[known], guess[known])), axis=1, return_counts=True)
    pairs = dict(zip(map(tuple, found.T.tolist()), counts.tolist(), strict=True))
    wrong = np.argwhere(known & (truth != guess))
    worst_first = np.argsort(minus_loss[tuple(wrong.T)], kind="stable")
    errors = []
    for sample, place in wrong[worst_first[:most]].tolist():
        at = sample, place
        object_number = place if truth.shape[1] > 1 else -1
        labels = int(truth[at]), int(guess[at])
        errors.append(Error(float(minus_loss[at]), first + sample, object_number, *labels, float(probability[at])))
    return Errors(pairs, errors, int((~known).sum()))


def together(found: Sequence[Errors], most: int) -> Errors:
    """The errors of several batches or ranks, with so many of the worst."""
    pairs: Counter[tuple[int, int]] = Counter()
    for part in found:
        pairs.update(part.pairs)
    worst = sorted(error for part in found for error in part.worst)[:most]
    return Errors(pairs, worst, sum(part.ignored for part in found))


def confusion_matrix(pairs: Mapping[tuple[int, int], int], classes: int) -> tuple[np.ndarray, list[str], str]:
    """A matrix (K, K) of counts, names of its rows, and a note.

    Of more classes than can be read, those with the most errors have a row of their own, the others one together.
    """
    shown, note = list(range(classes)), ""
    if classes > _MOST_CLASSES:
        errors: Counter[int] = Counter(shown)  # each class once, so that all are there
        for labels, times in pairs.items():
            if labels[0] != labels[1]:
                errors.update(dict.fromkeys(labels, times))
        shown = sorted(number for number, _ in errors.most_common(_MOST_CLASSES - 1))
        note = f"the {len(shown)} classes with the most errors; the other {classes - len(shown)} as one class"
    names = [*map(str, shown), *(["other"] if note else [])]
    rows = {number: row for row, number in enumerate(shown)}
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    for (truth, guess), count in pairs.items():
        counts[rows.get(truth, len(shown)), rows.get(guess, len(shown))] += count
    return counts, names, note
