"""``PYTHONPATH=. python tests/attention_rule.py``: how many random small cases of attention keep to the accuracy rule.

The rule of `accuracy.py`, at the size of each tensor and without the roundings that `attention_cases.check` allows
besides. It is a count, not a test: a kernel that adds in another order than eager misses the rule by luck now and then,
where eager happens to be nearly exact. README quotes it.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter

import torch
from accuracy import allowed_error, max_error
from attention_cases import Case, run


def random_case(rng: random.Random) -> Case:
    """Any shape up to 130 by 130 and head_dim 128, each feature once in a few cases."""
    heads_kv = rng.choice([1, 2])
    heads = heads_kv * rng.choice([1, 2, 3])
    case = Case(batch=rng.choice([1, 2]), heads=heads, heads_kv=heads_kv, seqlen_q=rng.randint(1, 130),
                seqlen_k=rng.randint(1, 130), head_dim=rng.randint(1, 128))  # fmt: skip
    options = {
        "is_causal": True,
        "window": (rng.randint(0, 40), rng.randint(0, 40)),
        "softcap": rng.uniform(1, 10),
        "dropout_p": rng.uniform(0.05, 0.5),
        "alignment": "bottom_right",
    }
    case.options = {name: value for name, value in options.items() if rng.random() < 0.25}
    sizes = [rng.choice([1, case.batch]), rng.choice([1, heads]), rng.choice([1, case.seqlen_q]), case.seqlen_k]
    tensors = {
        "attn_mask": lambda case: torch.randn(sizes) if sizes[0] == 1 else torch.rand(sizes) > 0.3,
        "alibi_slopes": lambda case: torch.rand(case.heads),
        "sinks": lambda case: torch.randn(case.heads),
    }
    case.tensors = {name: build for name, build in tensors.items() if rng.random() < 0.25}
    return case


def missed(case: Case, dtype: torch.dtype, backend: str) -> list[str]:
    """The results of ``case``, gradients among them, that miss the rule."""
    inputs = case.inputs(dtype)
    actual, eager = run(case, inputs, backend), run(case, inputs, "eager")
    return [
        name
        for name, reference in run(case, inputs, "eager", wide=True).items()
        # Not `error > allowed`: NaN misses it.
        if not max_error(actual[name], reference) <= allowed_error(eager[name], reference)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, names, kept = random.Random(options.seed), Counter[str](), 0
    for _ in range(options.cases):
        misses = missed(random_case(rng), getattr(torch, options.dtype), options.backend)
        names.update(misses)
        kept += not misses
    print(f"{options.dtype} on {options.backend}: {kept} of {options.cases} cases ({kept / options.cases:.1%}) keep to")
    print("the rule in every result; results that miss it:", dict(names.most_common()) or "none")


if __name__ == "__main__":
    main()
