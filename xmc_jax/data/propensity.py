"""Label propensities: how likely a relevant label is to have been observed, given its frequency."""

import numpy as np


def inverse_propensity(frequency: np.ndarray, num_documents: int, a: float, b: float) -> np.ndarray:
    """1 / p_l = 1 + C (N_l + b)^-a, with C = (ln N - 1) (b + 1)^a; largest for the rarest labels.

    With fewer than 3 documents C would be negative and a propensity above 1; it is 0 there, so that
    every propensity is 1.

    Args:
        frequency: i64[L], N_l, training documents of each label.
        a: exponent of the dataset, 0.6 for Amazon's.
        b: offset of the dataset, 2.6 for Amazon's.

    Returns:
        f64[L], each at least 1.

    Source: Jain, Prabhu, Varma, KDD 2016; pyxclib, compute_inv_propesity (natural logarithm).
    """
    c = max(np.log(num_documents) - 1.0, 0.0) * (b + 1.0) ** a
    return 1.0 + c * (np.asarray(frequency, np.float64) + b) ** -a
