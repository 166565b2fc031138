"""Do the intervals of collapse/measures/statistics.py have the coverage they claim? Simulations.

How often an interval excludes zero although there is no difference, and which differences the data
sets can resolve. Seconds on one core; writes studies/results/statistics/simulation.json.
"""

import argparse
import math

import numpy as np
from scipy.special import stdtr, stdtrit
from scipy.stats import chi2

from collapse.measures.statistics import crossed_error, crossed_mean_squares
from collapse.utils.files import ROOT, read_json, write_json

OUTPUT = ROOT / "studies" / "results" / "statistics" / "simulation.json"
SEEDS, ROWS = (3, 5, 10, 20), 872  # as SST-2 has
DRAWS = 100_000  # of each false-positive rate: two standard errors are 0.14 points at 5%

# Shares of seeds, rows and residual in the variance of the mean difference.
BALANCES = {
    "seeds, rows and residual alike": (1, 1, 1),
    "seeds and rows alike": (1, 1, 0),
    "seeds and residual alike": (1, 0, 1),
    "rows and residual alike": (0, 1, 1),
    "a tenth from rows, the rest from seeds": (9, 1, 0),
    "seeds only": (1, 0, 0),
    "rows only": (0, 1, 0),
    "residual only": (0, 0, 1),
}

# Results whose variances over seeds and rows predict the resolution at other numbers of rows.
STUDIES = {
    "SST-2, SmolLM2-135M": "results_7b/smollm2-135m",
    "AG News, SmolLM2-135M": "results_agnews/smollm2-135m",
    "SST-2, from scratch": "results",
}
ROW_COUNTS = {"AG News": 7600, "CLINC150": 4500, "SST-2 by sentence": 3900}
ROW_COUNTS |= {"Banking77": 3080, "SST-2": 872}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()  # --help alone
    rng = np.random.default_rng(0)
    results = {
        "false_positives": false_positives(rng),
        "half_widths_in_points": half_widths(),
    }
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    write_json(OUTPUT, results)
    print(OUTPUT.read_text(), end="")


# How often a 95% interval excludes zero although there is no difference


def false_positives(rng: np.random.Generator) -> dict:
    """False-positive rates in per cent, by balance of variances and number of seeds."""
    return {
        name: {f"{n} seeds, {ROWS} rows": exclusion_rates(shares, n, rng) for n in SEEDS}
        for name, shares in BALANCES.items()
    }


def exclusion_rates(
    shares: tuple[int, ...], n_seeds: int, rng: np.random.Generator
) -> dict[str, float]:
    """Exclusion rates of the crossed interval, and of intervals over seeds or rows alone.

    Means are scaled by the root of S N. Under normal effects mean and mean squares are independent
    and the mean squares chi-squared, so nothing else needs to be drawn.
    """
    of_seeds, of_rows, residual = shares
    freedom = (n_seeds - 1, ROWS - 1, (n_seeds - 1) * (ROWS - 1))
    expected = (residual + of_seeds, residual + of_rows, residual)
    squares = [e * rng.chisquare(f, DRAWS) / f for e, f in zip(expected, freedom, strict=True)]
    mean = rng.standard_normal(DRAWS) * math.sqrt(sum(shares))  # (DRAWS,), no true difference
    se, df = crossed_error(*squares, n_seeds, ROWS)
    excluded = {
        "crossed": excludes_zero(mean, se * math.sqrt(n_seeds * ROWS), df),
        "seeds alone": excludes_zero(mean, np.sqrt(squares[0]), n_seeds - 1),
        "rows alone": excludes_zero(mean, np.sqrt(squares[1]), ROWS - 1),
    }
    return {name: round(100 * float(np.mean(which)), 2) for name, which in excluded.items()}


def excludes_zero(mean: np.ndarray, se: np.ndarray, df: np.ndarray | int) -> np.ndarray:
    with np.errstate(divide="ignore"):  # without any spread zero is excluded
        return 2 * stdtr(df, -np.abs(mean) / se) < 0.05


# Which differences the rows resolve


def half_widths(n_seeds: int = 10) -> dict:
    """Expected half-width of the crossed 95% interval in points, from variances of three seeds.

    `as seen`: with variances as estimated. `cautious`: with the mean square of seeds at the upper
    end of its one-sided 90% interval, because three seeds estimate it poorly.
    """
    by_comparison = {}
    for name, folder in STUDIES.items():
        models = read_json(ROOT / folder / "results.json")["models"]
        for model in ("model2", "model3"):
            differences = right_or_wrong(models[model]) - right_or_wrong(models["model1"])
            by_comparison[f"{name}, {model} - model1"] = expected_half_widths(differences, n_seeds)
    return by_comparison


def right_or_wrong(seeds: dict) -> np.ndarray:
    return np.array([[float(c) for c in run["correct"]["final_cold"]] for run in seeds.values()])


def expected_half_widths(differences: np.ndarray, n_seeds: int) -> dict:
    """Half-widths for n_seeds and each of ROW_COUNTS, from variances of differences (S, N)."""
    seen_seeds, seen_rows = differences.shape
    of_seeds, of_rows, residual = crossed_mean_squares(differences)
    upper = max(of_seeds, residual) * (seen_seeds - 1) / chi2.ppf(0.1, seen_seeds - 1)
    row_variance = max(of_rows - residual, 0.0) / seen_seeds
    results: dict[str, dict[str, float]] = {}
    for name, mean_square in (("as seen", of_seeds), ("cautious", upper)):
        seed_variance = max(mean_square - residual, 0.0) / seen_rows
        results[name] = {}
        for data, n_rows in ROW_COUNTS.items():
            squares = residual + n_rows * seed_variance, residual + n_seeds * row_variance, residual
            se, df = crossed_error(*squares, n_seeds, n_rows)
            half_width = round(100 * float(stdtrit(df, 0.975) * se), 2)
            results[name][f"{data}, {n_rows} rows"] = half_width
    return results


if __name__ == "__main__":
    main()
