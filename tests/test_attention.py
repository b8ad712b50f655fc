"""Every feature of attention, forward and backward, on every backend that does not refuse it."""

from __future__ import annotations

import pytest
from attention_cases import DTYPES, FEATURES, KERNEL_BACKENDS, check, dtype_id


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("feature", FEATURES)
def test_feature_matches_eager(feature, dtype, backend):
    check(FEATURES[feature], dtype, backend)
