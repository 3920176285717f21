"DAAT's section 4 on numbers: Theorem 1, both propositions and Fig. 2's toy."
import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import multivariate_normal, norm

from adaptive_at.theory import (EXAMPLE, RHO, Gaussians, ascent, calibrated, covariance, fig2, fit, fixed, linear, multiplicative, natural_overstep, nll,
                                norm_roots, normal_points, penalty_covariance, perturbation, robust_covariance, robust_loss)

LONG, SHORT = np.array([1, 1]) / 2**0.5, np.array([1, -1]) / 2**0.5  # the axes of the example, variances 9 and 1
V = EXAMPLE.folded(512)


def wide(d=10, seed=2):
    "Two classes in d dimensions with a covariance of no special shape."
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(d, d))
    return Gaussians(rng.normal(size=d), A @ A.T / d + 0.2 * np.eye(d))


def centred(data, n, seed=0):
    "Random z = x - y mu."
    x, y = data.sample(n, np.random.default_rng(seed))
    return x - y[:, None] * data.mu


def quadratic(z, delta, Sigma): return nll(z + delta, 0., Sigma) - nll(np.zeros((1, len(Sigma))), 0., Sigma)


def ratio(Sigma): s = np.linalg.eigvalsh(Sigma); return s[-1] / s[0]
def error(Sigma): return 100 * EXAMPLE.error(np.linalg.solve(Sigma, EXAMPLE.mu))


# The setting

def test_the_points_have_the_moments_of_the_population():
    for data in (EXAMPLE, Gaussians(np.ones(3), wide(3).Sigma)):
        v = data.folded(256)
        assert np.allclose(v.mean(0), data.mu) and np.allclose(np.cov(v.T, bias=True), data.Sigma)
    z = normal_points(2048, 1)[:, 0]
    assert np.abs(np.sort(z) - norm.ppf(0.5 + (np.arange(2048) + 0.5) / 4096)).max() < 0.01  # the half-normal, not only its variance


def test_nll_is_the_gaussian_density():
    z = centred(wide(3), 5)
    assert np.allclose(nll(z + 1, np.ones(3), wide(3).Sigma) + 1.5 * np.log(2 * np.pi), -multivariate_normal(np.zeros(3), wide(3).Sigma).logpdf(z))


def test_eq_7_is_an_arg_min():
    x, y = EXAMPLE.sample(2000, np.random.default_rng(0))
    mu, Sigma = np.array([2., 1.]), covariance((4, 2), 10)  # for any parameters, not only the true ones
    losses = np.stack([nll(x, label * mu, Sigma) for label in (-1, 1)])
    assert (np.array([-1, 1])[losses.argmin(0)] == np.sign(x @ np.linalg.solve(Sigma, mu))).all()


# Theorem 1

@pytest.mark.parametrize("data", [EXAMPLE, wide(5)], ids=["example", "d=5"])
def test_theorem_1_is_the_error_of_any_linear_rule(data):
    n, rng = 200_000, np.random.default_rng(1)
    x, y = data.sample(n, rng)
    for w in (data.w, data.mu, -data.mu, rng.normal(size=len(data.mu))):
        e = data.error(w)
        assert abs((x @ w * y < 0).mean() - e) <= 4 * np.sqrt(e * (1 - e) / n)
    assert np.isclose(data.error(data.w), norm.cdf(-np.sqrt(data.mu @ np.linalg.inv(data.Sigma) @ data.mu)))


@given(st.integers(0, 10**6), st.integers(2, 6))
@settings(max_examples=50)
def test_no_rule_beats_the_bayes_error(seed, d):
    data = wide(d, seed)
    for w in (data.mu, np.random.default_rng(seed).normal(size=d)): assert data.error(w) >= data.error(data.w) - 1e-12


def test_eq_9_is_worse_unless_the_mean_is_an_eigenvector():
    assert round(100 * EXAMPLE.error(EXAMPLE.w), 3) == 1.267 and round(100 * EXAMPLE.error(EXAMPLE.mu), 3) == 8.986
    for angle in (0, 90):  # Sigma is not I, and yet nothing is lost
        turned = Gaussians(EXAMPLE.mu, covariance((9, 1), angle))
        assert np.isclose(turned.error(turned.mu), turned.error(turned.w))
    assert round(100 * Gaussians(EXAMPLE.mu, covariance((9, 1), 0)).error(EXAMPLE.mu), 2) == 15.87
    for angle in (5, 85):
        turned = Gaussians(EXAMPLE.mu, covariance((9, 1), angle))
        assert turned.error(turned.mu) > turned.error(turned.w) + 1e-4


# Proposition 1

@pytest.mark.parametrize("eps", [0.1, 1., 5.])
@pytest.mark.parametrize("data", [EXAMPLE, wide(10)], ids=["d=2", "d=10"])
def test_proposition_1_beside_ascent(data, eps):
    z = centred(data, 40)
    delta, found = perturbation(z, data.Sigma, eps), ascent(z, data.Sigma, eps)
    assert np.allclose(np.linalg.norm(delta, axis=1), eps, rtol=1e-12)
    assert np.allclose(quadratic(z, delta, data.Sigma), quadratic(z, found, data.Sigma), rtol=1e-6)
    v = np.linalg.solve(data.Sigma, (z + delta).T).T            # Sigma^-1 (z + delta) = lambda delta
    lam = (v * delta).sum(1) / eps**2
    assert np.allclose(v, lam[:, None] * delta, rtol=1e-6, atol=1e-6 * np.abs(v).max())
    assert (lam > 1 / np.linalg.eigvalsh(data.Sigma)[0]).all() and np.ptp(lam) > 1e-3


@given(st.integers(0, 10**6), st.integers(1, 8), st.floats(0.01, 50))
@settings(max_examples=60)
def test_the_perturbation_is_the_largest_root(seed, d, eps):
    data = wide(d, seed)
    z = centred(data, 1, seed)
    delta, roots = perturbation(z, data.Sigma, eps), norm_roots(z[0], data.Sigma, eps)
    assert np.isclose(np.linalg.norm(delta), eps)
    assert np.allclose(delta[0], np.linalg.solve(roots[-1] * data.Sigma - np.eye(d), z[0]), rtol=1e-4, atol=1e-4 * eps)
    assert 2 <= len(roots) <= 2 * d


def test_the_norm_equation_has_other_roots():
    z = 0.95 * LONG + 2.18 * SHORT
    roots = norm_roots(z, EXAMPLE.Sigma, 5.)
    deltas = np.stack([np.linalg.solve(root * EXAMPLE.Sigma - np.eye(2), z) for root in roots])
    assert np.allclose(np.linalg.norm(deltas, axis=1), 5)
    assert np.allclose(quadratic(z, deltas, EXAMPLE.Sigma), [0.68, 1.60, 4.04, 25.83], atol=0.01)
    assert roots[2] < 1 < roots[3]


def test_one_radius_per_example():
    z, eps = centred(EXAMPLE, 6), np.array([0., 0.3, 0., 2., 5., 0.1])
    delta = perturbation(z, EXAMPLE.Sigma, eps)
    assert np.allclose(np.linalg.norm(delta, axis=1), eps) and (delta[[0, 2]] == 0).all()
    for i in range(6): assert np.allclose(delta[i], perturbation(z[[i]], EXAMPLE.Sigma, eps[i])[0])


def test_the_hard_case():
    z = 4 * LONG[None]
    for eps, across in ((0.4, 0.), (0.5, 0.), (0.6, 0.11**0.5), (2., 3.75**0.5)):  # along the axis: 4 / (9 - 1) = 0.5 at most
        delta = perturbation(z, EXAMPLE.Sigma, eps)
        assert np.allclose([delta[0] @ LONG, abs(delta[0] @ SHORT)], [min(eps, 0.5), across], atol=2e-5)  # at 0.5 exactly, rounding enters by a square root
        assert np.isclose(quadratic(z, delta, EXAMPLE.Sigma), quadratic(z, ascent(z, EXAMPLE.Sigma, eps, steps=3000), EXAMPLE.Sigma), rtol=1e-6)
    assert np.allclose(np.abs(perturbation(np.zeros((1, 2)), EXAMPLE.Sigma, 2.) @ SHORT), 2)
    assert np.allclose(perturbation(z, 5 * np.eye(2), 2.), z / 2) and np.isclose(np.linalg.norm(perturbation(0 * z, np.eye(2), 2.)), 2)
    nearly = perturbation(z + 1e-13 * SHORT, EXAMPLE.Sigma, 2.)
    assert np.isclose(nearly[0] @ SHORT, 3.75**0.5)


def test_the_adversary_leaves_its_own_mean():
    z = V - EXAMPLE.mu
    delta = perturbation(z, EXAMPLE.Sigma, 1.)
    for axis in (LONG, SHORT): assert ((z @ axis) * (delta @ axis) > 0).all()
    assert np.allclose(perturbation(-z, EXAMPLE.Sigma, 1.), -delta)
    assert (delta @ EXAMPLE.w < 0).mean() == 0.5                 # half of them away from the boundary
    assert ((delta @ SHORT)**2).mean() > 10 * ((delta @ LONG)**2).mean()


# Proposition 2

@pytest.mark.parametrize("Sigma", [EXAMPLE.Sigma, 20 * np.eye(2), covariance((3, 7), 20)], ids=["natural", "isotropic", "skew"])
def test_the_robust_mean_is_the_true_mean(Sigma):
    for direction in (LONG, SHORT, np.array([1., 0.])):
        losses = [robust_loss(V, EXAMPLE.mu + m * direction, Sigma, 3.) for m in (-1, -0.5, -0.1, 0, 0.1, 0.5, 1)]
        assert np.argmin(losses) == 3 and np.allclose(losses, losses[::-1])


@pytest.mark.parametrize("eps", [0.5, 1., 5.])
def test_the_robust_covariance_is_the_optimum(eps):
    Sigma, n = robust_covariance(EXAMPLE.Sigma, eps), 200_000
    z = centred(EXAMPLE, n, seed=5)
    moments = (z + perturbation(z, Sigma, eps)).T @ (z + perturbation(z, Sigma, eps)) / n
    assert np.allclose(moments, Sigma, rtol=0, atol=4 * np.sqrt(2 / n) * Sigma.max())     # stationary, on examples it has not seen
    assert abs(LONG @ Sigma @ SHORT) < 1e-9 and np.linalg.eigvalsh(Sigma - EXAMPLE.Sigma).min() > 0
    best, rng = robust_loss(V, EXAMPLE.mu, Sigma, eps), np.random.default_rng(0)
    for _ in range(20):
        D = rng.normal(size=(2, 2)) * 0.05 * Sigma.max()
        assert robust_loss(V, EXAMPLE.mu + 0.3 * rng.normal(size=2), Sigma + (D + D.T) / 2, eps) > best
    assert best < min(robust_loss(V, EXAMPLE.mu, c * np.eye(2), eps) for c in np.geomspace(2, 60, 40)) - 0.01  # (k/d) I = 5 I and all its multiples


def test_objective_8_at_eps_5():
    losses = [robust_loss(V, EXAMPLE.mu, S, 5.) for S in (robust_covariance(EXAMPLE.Sigma, 5.), 30 * np.eye(2), 5 * np.eye(2))]
    assert np.allclose(losses, [4.36, 4.43, 7.78], atol=0.01)


def test_no_multiple_of_the_identity_is_stationary():
    z = V - EXAMPLE.mu
    for eps in (0.5, 5., 100.):
        adversaries = z + perturbation(z, 5 * np.eye(2), eps)
        assert ((adversaries @ LONG)**2).mean() > 2.9 * ((adversaries @ SHORT)**2).mean()


def test_the_error_rises_from_bayes_to_eq_9():
    radii = [0., 0.5, 1., 2., 3., 5., 10., 30., 100.]
    found = [robust_covariance(EXAMPLE.Sigma, eps) for eps in radii]
    errors, ratios = [error(S) for S in found], [ratio(S) for S in found]
    assert (np.diff(errors) > 0).all() and (np.diff(ratios) < 0).all() and (np.diff([np.trace(S) for S in found]) > 0).all()
    assert np.isclose(errors[0], 1.267, atol=1e-3) and 8.8 < errors[-1] < 8.986
    assert np.allclose(errors[1:6], [1.40, 1.80, 2.95, 4.06, 5.59], atol=0.01) and np.allclose(ratios[1:6], [5.36, 3.75, 2.45, 1.93, 1.52], atol=0.02)
    assert np.isclose(np.trace(found[-1]) / 100**2, 1, atol=0.06)   # Sigma_r ~ eps^2 / d I


def test_more_points_give_the_same_covariance():
    assert np.allclose(robust_covariance(EXAMPLE.Sigma, 1.), robust_covariance(EXAMPLE.Sigma, 1., n=2**14), rtol=2e-3, atol=2e-3)


def test_the_printed_form_is_the_limit_at_a_fixed_trace():
    radii = [0.5, 1., 3., 10., 30., 300.]
    held = [robust_covariance(EXAMPLE.Sigma, eps, trace=10.) for eps in radii]
    assert np.allclose([np.trace(S) for S in held], 10)
    ratios = [ratio(S) for S in held]
    assert (np.diff(ratios) < 0).all() and ratios[0] > 4 and 1 < ratios[-1] < 1.01
    assert np.allclose(held[-1], 5 * np.eye(2), atol=0.02)
    losses = [robust_loss(V, EXAMPLE.mu, covariance((t, 10 - t), 45), 1.) for t in np.arange(0.5, 10, 0.25)]   # one minimum, and it is this one
    assert (np.diff(np.sign(np.diff(losses))) != 0).sum() == 1 and robust_loss(V, EXAMPLE.mu, held[1], 1.) < min(losses) + 1e-3


def test_isotropic_data_give_the_printed_form_up_to_scale():
    Sigma = robust_covariance(5 * np.eye(3), 2., n=512)
    assert np.allclose(Sigma, Sigma[0, 0] * np.eye(3), rtol=0.01, atol=0.01) and Sigma[0, 0] > 5


@pytest.mark.parametrize("eps", [0.5, 5., 50.])
def test_the_penalty_adversary_in_closed_form(eps):
    Sigma = penalty_covariance(EXAMPLE.Sigma, eps)
    sigma, sigma_r = np.array([9., 1.]), np.array([LONG @ Sigma @ LONG, SHORT @ Sigma @ SHORT])
    lam = 1 / (sigma_r - np.sqrt(sigma * sigma_r))                        # from sigma_r = sigma (lambda sigma_r / (lambda sigma_r - 1))^2: one lambda for both axes
    assert np.isclose(lam[0], lam[1])
    assert np.isclose((sigma / (lam * sigma_r - 1)**2).sum(), eps**2)     # E ||delta||^2, delta = z / (lambda sigma_r - 1)
    assert penalty_covariance(EXAMPLE.Sigma, 0) is EXAMPLE.Sigma


def test_the_penalty_adversary_is_close_to_the_hard_ball():
    errors = [(error(penalty_covariance(EXAMPLE.Sigma, eps)), error(robust_covariance(EXAMPLE.Sigma, eps))) for eps in (1., 5.)]
    assert np.allclose(errors, [(1.97, 1.80), (5.41, 5.59)], atol=0.01)


def test_the_excess_loss_of_natural_parameters_is_least_for_isotropic_data():
    losses, excess = [], []
    for sigma in ((9, 1), (7, 3), (5, 5)):
        data = Gaussians(EXAMPLE.mu, covariance(sigma, 45))
        v = data.folded(512)
        losses.append(robust_loss(v, data.mu, data.Sigma, 0.5))
        excess.append(losses[-1] - nll(v, data.mu, data.Sigma).mean())
    assert np.allclose(losses, [2.65, 2.86, 2.91], atol=0.01) and np.allclose(excess, [0.551, 0.336, 0.305], atol=0.005)


# Fig. 2

@pytest.fixture(scope="module")
def fits():
    v = EXAMPLE.folded(256)
    return {(eps, name): fit(EXAMPLE, v, eps, rule) for eps in (1., 3., 5.) for name, rule in (("AT", fixed), ("calibrated ball", calibrated))}


def test_overstep_is_the_posterior_of_the_wrong_class():
    v = V + perturbation(V - EXAMPLE.mu, EXAMPLE.Sigma, 3.)
    q = np.exp(np.stack([-nll(v, label * EXAMPLE.mu, EXAMPLE.Sigma) for label in (1, -1)]))
    q /= q.sum(0)
    assert np.allclose(natural_overstep(v, EXAMPLE), q.max(0) - q[0])  # eq. 13, y = 1


def test_the_rules_by_hand():
    s = lambda radii: np.array([0., 0.1, 0.5])
    assert np.allclose(fixed(2., np.array([2., 2., 2.]), s), 2)
    assert np.allclose(multiplicative(2., np.array([1., 1., 1.]), s), [2, 0.5, 0.1])  # 0.05 / s, and the reset
    assert np.allclose(linear(2., np.array([1., 1., 1.]), s), [2, 1.9, 1.1])          # (1 - s + 0.05) 2


@pytest.mark.parametrize("eps", [1., 5.])
def test_the_calibrated_ball_is_the_largest_that_does_not_overstep(eps):
    v, Sigma = EXAMPLE.folded(64), robust_covariance(EXAMPLE.Sigma, eps)
    s = lambda radii, rows=slice(None): natural_overstep(v[rows] + perturbation(v[rows] - EXAMPLE.mu, Sigma, radii), EXAMPLE)
    radii = calibrated(eps, np.full(len(v), eps), s)
    assert (radii >= 0).all() and (radii <= eps).all() and (s(radii)[radii > 0] <= RHO + 1e-9).all()
    assert (radii < eps).any() and (radii == eps).any()
    for share in np.linspace(0.005, 1, 200):
        beyond = share * eps > radii + 1e-3 * eps
        assert (s(np.full(len(v), share * eps))[beyond] > RHO).all()
    assert (s(0 * radii)[radii == 0] > RHO - 1e-9).all()  # only natural examples on the wrong side are left where they are


def test_at_settles_at_the_robust_optimum(fits):
    for eps in (1., 3., 5.):
        assert np.allclose(fits[eps, "AT"].mu, EXAMPLE.mu) and np.allclose(fits[eps, "AT"].Sigma, robust_covariance(EXAMPLE.Sigma, eps), rtol=0.03)


def test_adaptive_radii_lose_less_natural_accuracy(fits):
    errors = {key: 100 * EXAMPLE.error(f.w) for key, f in fits.items()}
    assert 0 < errors[1., "AT"] - errors[1., "calibrated ball"] < 0.1                  # hardly visible
    assert np.allclose([errors[3., "calibrated ball"], errors[5., "calibrated ball"]], [3.15, 3.81], atol=0.05)
    assert errors[3., "AT"] > 4 and errors[5., "AT"] > 5.5
    assert all(fits[eps, "calibrated ball"].mu[0] > 3.01 for eps in (1., 3., 5.))      # the mean moves outwards


def test_fig_2_has_six_panels_and_repeats(fits):
    drawn = []
    for _ in range(2):
        figure = fig2(fits)
        figure.canvas.draw()
        drawn.append(np.asarray(figure.canvas.buffer_rgba()).copy())
        plt.close(figure)
    assert np.array_equal(*drawn)
    axes = figure.axes
    assert [ax.get_title()[:8].split(",")[0] for ax in axes] == ["(a) AT", "(b) AT", "(c) AT", "(d) DAAT", "(e) DAAT", "(f) DAAT"]
    for ax, key in zip(axes, [(eps, name) for name in ("AT", "calibrated ball") for eps in (1., 3., 5.)]):
        labels = [c.get_label() for c in ax.collections]
        assert ("adjusted" in labels) == (key[1] != "AT")
        lines = {line.get_label(): line for line in ax.lines}
        for label, w in (("natural boundary", EXAMPLE.w), ("robust boundary", fits[key].w)):
            assert np.isclose(np.dot(lines[label].get_xy2(), w), 0)
        overstepping = next(c for c in ax.collections if c.get_label().startswith("overstepping")).get_offsets()
        assert len(overstepping) > 0
    assert [round(100 * EXAMPLE.error(fits[eps, "AT"].w), 1) for eps in (1., 3., 5.)] == [1.8, 4.1, 5.6]
