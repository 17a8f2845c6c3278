"""Inverse propensities against published arithmetic."""

import numpy as np

from xmc_jax.data.propensity import inverse_propensity


def test_values_of_131k():
    values = inverse_propensity(np.array([1, 5, 50]), 294_805, 0.6, 2.6)
    np.testing.assert_allclose(values, [12.59, 8.41, 3.32], atol=0.005)
    assert values.dtype == np.float64


def test_definition():
    n, a, b = 1000, 0.5, 0.4
    expected = [
        1 + (np.log(n) - 1) * (b + 1) ** a * np.exp(-a * np.log(f + b)) for f in (0, 3, 999)
    ]
    np.testing.assert_allclose(inverse_propensity([0, 3, 999], n, a, b), expected, rtol=1e-14)


def test_of_two_documents_every_propensity_is_1():
    np.testing.assert_array_equal(inverse_propensity([1, 2], 2, 0.6, 2.6), [1, 1])
