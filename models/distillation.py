"""Knowledge distillation: a small student learns the probabilities that a larger teacher gives to every answer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from models.layers import at_least_float32


def distillation_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 2.0, alpha: float = 0.5
) -> Tensor:
    """``alpha`` times the divergence from the teacher at ``temperature``, the rest the cross-entropy of the labels.

    Args:
        student, teacher: (tokens, classes) logits.
        labels: (tokens,) int64; those below 0 are left out.
    Source: Hinton et al. 2015 (arXiv:1503.02531), section 2; the divergence times temperature² keeps the size of its
    gradient.
    """
    asked = labels >= 0
    student, teacher, labels = at_least_float32(student[asked]), at_least_float32(teacher[asked]), labels[asked]
    divergence = F.kl_div(
        (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1),
        reduction="batchmean", log_target=True,
    )  # fmt: skip
    return alpha * temperature**2 * divergence + (1 - alpha) * F.cross_entropy(student, labels)
