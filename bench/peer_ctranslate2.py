"""CTranslate2, the strongest INT8 peer on CPUs for whole encoders: MiniLM's very weights, quantised by it.

Optional (requirements-peers.txt); bench_models says so in a note where it is missing.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.minilm import SentenceEncoder, find_weights, mean_pool

NAME = "CTranslate2 int8"
MIN_COSINE = 0.95  # to float32, of any sentence


def why_missing() -> str | None:
    """The reason that there is no such peer here, or None."""
    for package in ("ctranslate2", "yaml", "transformers"):
        if importlib.util.find_spec(package) is None:
            return f"without {NAME}: {package} is not installed (pip install -r requirements-peers.txt)"
    return None


@cache
def converted() -> tempfile.TemporaryDirectory[str]:
    """A folder with the model as CTranslate2 stores it, in float32."""
    import transformers
    from ctranslate2.converters import TransformersConverter

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    folder = tempfile.TemporaryDirectory()
    TransformersConverter(str(find_weights())).convert(folder.name, force=True)
    return folder


@cache
def encoder(threads: int) -> Any:
    import ctranslate2

    return ctranslate2.Encoder(
        converted().name, device="cpu", compute_type="int8", inter_threads=1, intra_threads=threads
    )


def minilm(ids: Tensor, mask: Tensor) -> Callable[[], Tensor]:
    """Unit vectors of the sentences, (batch, hidden_size), by as many threads as torch has at each call.

    Raises: AssertionError if they are not those of the float32 model.
    """
    import ctranslate2
    import numpy as np

    arrays = ids.int().numpy(), mask.sum(1).int().numpy()
    visible = None if mask.all() else mask

    def call() -> Tensor:
        # Views of arrays, not lists: nothing is copied on the way in or out.
        tokens, lengths = map(ctranslate2.StorageView.from_array, arrays)
        states = encoder(torch.get_num_threads()).forward_batch(tokens, lengths).last_hidden_state
        return mean_pool(torch.from_numpy(np.asarray(states)), visible)

    reference = SentenceEncoder.from_pretrained()
    with torch.no_grad():
        least = F.cosine_similarity(call(), reference(ids, mask), dim=-1).min().item()
    assert least >= MIN_COSINE, f"{NAME} computes another model: cosine similarity {least:.4f}, below {MIN_COSINE}"
    return call
