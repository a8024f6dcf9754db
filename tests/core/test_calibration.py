import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from sae_core import Calibration, ConfigError, TopKBasis, calibrate

X = np.array([[3.0, 4.0], [0.0, 1.0]], dtype=np.float32)  # norms 5 and 1, mean [1.5, 2.5]


def test_calibration_of_two_tokens():
    calibration = calibrate(X)
    assert calibration.scale == pytest.approx(2**0.5 / 3)
    assert calibration.mean.tolist() == [1.5, 2.5]
    assert calibration.covariance.tolist() == [[2.25, 2.25], [2.25, 2.25]]
    assert calibration.n_tokens == 2 and calibration.d_in == 2
    assert calibration.mean_square_norm == pytest.approx(13)


def test_read_only_views_and_tensors_of_any_float_type_are_accepted_and_left_alone():
    frozen = X.copy()
    frozen.flags.writeable = False
    expected = calibrate(X)
    for given in (frozen, torch.from_numpy(X.copy()), torch.from_numpy(X).bfloat16(), X.astype(np.float16)):
        calibration = calibrate(given)
        assert torch.equal(calibration.mean, expected.mean) and calibration.scale == expected.scale
    assert np.array_equal(frozen, X)


def test_chunks_and_a_large_mean_lose_no_digits():
    generator = np.random.default_rng(0)
    x = (generator.standard_normal((20_001, 3)) + 1000).astype(np.float32)
    calibration = calibrate(x)
    np.testing.assert_allclose(calibration.covariance, np.cov(x.T.astype(np.float64), bias=True), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(calibration.mean, x.astype(np.float64).mean(0), rtol=1e-6)


def test_calibration_survives_safetensors():
    calibration = calibrate(X)
    again = Calibration.from_tensors(load(save(calibration.to_tensors())))
    assert again.scale == calibration.scale and again.n_tokens == 2
    assert torch.equal(again.mean, calibration.mean) and torch.equal(again.covariance, calibration.covariance)


@pytest.mark.parametrize("x", [np.zeros((4, 2)), np.zeros((0, 2)), np.full((2, 2), np.nan), np.zeros(3)])
def test_activations_without_content_are_refused(x):
    with pytest.raises(ConfigError):
        calibrate(x)


def test_neuron_basis_keeps_the_largest_deviations_with_their_sign():
    basis = TopKBasis.neurons(calibrate(X), k=1)
    x = torch.tensor([[3.0, 0.5], [1.0, 2.5]])  # deviations [1.5, -2], [-0.5, 0]
    assert basis.encode(x).tolist() == [[0.0, -2.0], [-0.5, 0.0]]
    assert basis(x).tolist() == [[1.5, 0.5], [1.0, 2.5]]


def test_pca_basis_restores_the_main_direction():
    basis = TopKBasis.pca(calibrate(X), k=1)  # all variance lies along [1, 1]
    torch.testing.assert_close(basis(torch.from_numpy(X)), torch.from_numpy(X))
    torch.testing.assert_close(basis.basis.T @ basis.basis, torch.eye(2))
    assert (basis.encode(torch.from_numpy(X)) != 0).sum(1).tolist() == [1, 1]


def test_all_coefficients_restore_everything(data):
    for basis in (TopKBasis.pca(data.calibration, 16), TopKBasis.neurons(data.calibration, 16)):
        torch.testing.assert_close(basis(data.x), data.x, rtol=1e-4, atol=1e-4)


def test_an_impossible_k_is_refused():
    with pytest.raises(ConfigError, match="1 to 2"):
        TopKBasis.pca(calibrate(X), 3)
