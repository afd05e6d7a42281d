"""The IsoFLOP fit on losses whose optimum is known, and the study's page and figure from finished runs."""

import dataclasses
import json
import math

import numpy as np
import pytest
import tiny_run

from dev.runner import plan
from dev.scaling_laws import describe, fit_isoflops, fit_parabola, fit_power_law, to_points
from nanochat import recipe

BUDGETS = (1e15, 4e15, 2e16, 1e17)


def law_points(alpha, beta, spread=4.0, noise=0.0, off=1.0):
    """L = E + A/N^α + B/D^β with D = C/6N, at sizes around `off` times the optimum (arXiv 2203.15556)."""
    rng = np.random.default_rng(0)
    E, A, B = 1.7, 400.0, 410.0
    points = []
    for C in BUDGETS:
        best = (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * (C / 6) ** (beta / (alpha + beta))
        for N in off * best * np.geomspace(1 / spread, spread, 7):
            D = C / (6 * N)
            loss = E + A / N**alpha + B / D**beta + noise * rng.normal()
            points.append({"budget": C, "depth": 2, "parameters": N, "tokens": D, "loss": loss, "runs": 1})
    return points


@pytest.mark.parametrize(("alpha", "beta"), [(0.34, 0.28), (0.5, 0.5), (0.3, 0.45)])
def test_exponents_of_a_known_law(alpha, beta):
    """N_opt ~ C^(β/(α+β)), D_opt ~ C^(α/(α+β)): what the minimum of L at fixed C = 6ND has in closed form."""
    fit = fit_isoflops(law_points(alpha, beta))
    assert math.isclose(fit.size_law.exponent, beta / (alpha + beta), abs_tol=1e-3)
    assert math.isclose(fit.token_law.exponent, alpha / (alpha + beta), abs_tol=1e-3)
    for budget, (size, tokens) in fit.best.items():
        assert size.inside and tokens.inside
        assert math.isclose(6 * size.at * tokens.at, budget, rel_tol=1e-6), "both parabolas mean one model"
        assert math.isclose(fit.size_law(budget), size.at, rel_tol=0.01)


def test_exponents_under_noise_and_off_centre():
    fit = fit_isoflops(law_points(0.34, 0.28, noise=0.002, off=1.5))
    error = abs(fit.size_law.exponent - 0.28 / 0.62)
    assert error < 0.03 and error < 4 * fit.size_law.stderr


def test_parabola_is_found_exactly():
    x = np.array([1e6, 3e6, 2e7, 9e7])
    found = fit_parabola(x, 0.03 * np.log(x / 5e6) ** 2 + 2.5)
    assert math.isclose(found.at, 5e6, rel_tol=1e-6) and math.isclose(found.least, 2.5) and found.inside
    assert math.isclose(found.curvature, 0.03, rel_tol=1e-6)
    assert not fit_parabola(x, 0.03 * np.log(x / 5e5) ** 2).inside
    assert fit_parabola(x, -(np.log(x / 5e6) ** 2)) is None


def test_power_law_and_its_error():
    x = np.array([1.0, 10.0, 100.0, 1000.0])
    exact = fit_power_law(x, 3 * x**0.5)
    assert math.isclose(exact.exponent, 0.5) and math.isclose(exact.factor, 3) and exact.stderr < 1e-12
    assert fit_power_law(x[:2], x[:2]).stderr is None
    y = 3 * x**0.5 * np.array([1.1, 0.9, 1.2, 0.95])
    _, covariance = np.polyfit(np.log(x), np.log(y), 1, cov=True)
    assert math.isclose(fit_power_law(x, y).stderr, covariance[0, 0] ** 0.5, rel_tol=1e-9)


def test_curves_without_their_minimum_give_no_law():
    points = law_points(0.34, 0.28, spread=1.3, off=30.0)
    fit = fit_isoflops(points)
    assert fit.size_law is None and fit.token_law is None
    assert "no: widen --depths" in describe(points, fit)


def finished_run(run, depth, loss):
    config = recipe.model_config(depth, 600, 64, 16, 16)
    return {
        "point": run.point,
        "seed": run.seed,
        "tokens": int(float(run.point["target-flops"]) / 6 / recipe.scaling_parameters(config)),
        "val_bpb": loss,
        "model_config": dataclasses.asdict(config),
    }


def test_study_of_finished_runs(tiny_world):
    """`main` on results that are all there: seeds averaged, laws, record, page and figure."""
    budgets, depths = (1e10, 1e11), (2, 4, 8)
    points = [{"target-flops": f"{C:g}", "depth": str(depth)} for C in budgets for depth in depths]
    results = tiny_world / "sweeps" / "scaling" / "results"
    results.mkdir(parents=True)
    for run in plan("scripts.base_train", points, 2, []):
        C, depth = float(run.point["target-flops"]), int(run.point["depth"])
        best = 3 if C == 1e10 else 6
        loss = 2 + 0.1 * math.log(depth / best) ** 2 + (0.01 if run.seed else -0.01)
        (results / f"{run.id}.json").write_text(json.dumps(finished_run(run, depth, loss)))
    arguments = ["--budgets", "1e10,1e11", "--depths", "2,4,8", "--seeds", "2"]
    out = tiny_run.run("dev.scaling_laws", *arguments).out
    assert "0 of 12 runs to do" in out and "N_opt = " in out
    folder = results.parent
    made = json.loads((folder / "scaling_laws.json").read_text())
    assert [point["runs"] for point in made["points"]] == [2] * 6
    assert math.isclose(made["points"][0]["loss"], 2 + 0.1 * math.log(2 / 3) ** 2)
    assert made["size_law"]["exponent"] > 0 and "commit" in made
    assert (folder / "scaling_laws.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_failed_runs_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    runs = plan("scripts.base_train", [{"target-flops": "1e10", "depth": "2"}], 2, [])
    good, bad = (finished_run(run, 2, 1.5) for run in runs)
    assert to_points([good, {**bad, "error": "loss is nan"}])[0]["runs"] == 1


@pytest.mark.parametrize("flags", [["--depths", "2,4"], ["--depths", "2,4,x"], ["--budgets", "0,1"], ["--jobs", "0"]])
def test_wrong_flags(flags, tiny_world):
    assert flags[0] in tiny_run.script("dev.scaling_laws", *flags).error_line
