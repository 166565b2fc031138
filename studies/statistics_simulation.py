"""Do the intervals of collapse/measures/statistics.py have the coverage they claim? Simulations.

How often an interval excludes zero although there is no difference, which differences the data sets
can resolve, and how often an interval over rows of a rank or of CDNV contains its estimand.
Five minutes on one core; writes studies/results/statistics/simulation.json.
"""

import math

import numpy as np
from scipy.special import expit, stdtr, stdtrit
from scipy.stats import chi2

from collapse.measures.neural_collapse import cdnv
from collapse.measures.rank import ranks_from_gram
from collapse.measures.statistics import (
    crossed_error,
    crossed_interval,
    crossed_mean_squares,
    jackknife_interval,
    pigeonhole_interval,
    seeds_and_rows_interval,
)
from collapse.utils.files import ROOT, read_json, write_json

OUTPUT = ROOT / "studies" / "results" / "statistics" / "simulation.json"
SEEDS, ROWS = (3, 5, 10, 20), (872, 4000)
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

TOTAL, SUBSETS, CLASSES, DIMENSIONS = 872, 50, 4, 32  # of the simulated features
MEASURES = ("stable_rank", "log_stable_rank", "effective_rank", "log_effective_rank")
MEASURES += ("cdnv", "log_cdnv")


def main() -> None:
    rng = np.random.default_rng(0)
    results = {
        "false_positives": false_positives(rng),
        "worst_balance": worst_balance(rng),
        "where_the_floor_is_reached": where_the_floor_is_reached(rng),
        "false_positives_of_the_pigeonhole_bootstrap": pigeonhole_false_positives(rng),
        "false_positives_of_right_or_wrong": false_positives_of_right_or_wrong(rng),
        "half_widths_in_points": half_widths(),
        "coverage_over_rows": coverage_over_rows(rng),
        "coverage_over_seeds_and_rows": coverage_over_seeds_and_rows(rng),
    }
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    write_json(OUTPUT, results)
    print(OUTPUT.read_text(), end="")


# How often a 95% interval excludes zero although there is no difference


def false_positives(rng: np.random.Generator) -> dict:
    """False-positive rates in per cent, by balance of variances and numbers of seeds and rows."""
    return {
        name: {
            f"{n_seeds} seeds, {n_rows} rows": exclusion_rates(shares, n_seeds, n_rows, rng)
            for n_seeds in SEEDS
            for n_rows in ROWS
        }
        for name, shares in BALANCES.items()
    }


def worst_balance(rng: np.random.Generator) -> dict:
    """The crossed interval's highest false-positive rate over a grid of balances, per cent."""
    exponents, residuals = np.linspace(-2, 1, 10), (0, 0.1, 1)
    grid = [(1, 10**exponent, residual) for exponent in exponents for residual in residuals]
    return {
        f"{n} seeds": max(exclusion_rates(shares, n, 872, rng)["crossed"] for shares in grid)
        for n in SEEDS
    }


def draw_mean_squares(
    shares: tuple, n_seeds: int, n_rows: int, rng: np.random.Generator
) -> tuple[np.ndarray, ...]:
    """Means (DRAWS,) without a true difference, and mean squares of seeds, rows and residual.

    Means are scaled by the root of S N. Under normal effects all are independent and the mean
    squares chi-squared, so nothing else needs to be drawn.
    """
    of_seeds, of_rows, residual = shares
    freedom = (n_seeds - 1, n_rows - 1, (n_seeds - 1) * (n_rows - 1))
    expected = (residual + of_seeds, residual + of_rows, residual)
    squares = (e * rng.chisquare(f, DRAWS) / f for e, f in zip(expected, freedom, strict=True))
    return rng.standard_normal(DRAWS) * math.sqrt(sum(shares)), *squares


def exclusion_rates(
    shares: tuple, n_seeds: int, n_rows: int, rng: np.random.Generator
) -> dict[str, float]:
    """Exclusion rates of the crossed interval, of seeds or rows alone, and of both at once."""
    mean, *squares = draw_mean_squares(shares, n_seeds, n_rows, rng)
    se, df = crossed_error(*squares, n_seeds, n_rows)
    crossed = excludes_zero(mean, se * math.sqrt(n_seeds * n_rows), df)
    seeds = excludes_zero(mean, np.sqrt(squares[0]), n_seeds - 1)
    rows = excludes_zero(mean, np.sqrt(squares[1]), n_rows - 1)
    rates = {"crossed": crossed, "seeds alone": seeds, "rows alone": rows, "both": seeds & rows}
    return {name: per_cent(rate) for name, rate in rates.items()}


def where_the_floor_is_reached(rng: np.random.Generator) -> dict:
    """Exclusion rates among draws whose mean square of seeds is below that of the residual.

    Seeds and residual have equal variance. `as seen` computes degrees of freedom from the observed
    mean square of seeds, `as floored` from the residual's.
    """
    rates = {}
    for n in SEEDS:
        mean, *squares = draw_mean_squares(BALANCES["seeds and residual alike"], n, 872, rng)
        below = squares[0] < squares[2]
        freedom = (n - 1, 871, (n - 1) * 871)
        se, df = crossed_error(*squares, n, 872)
        se = se * math.sqrt(n * 872)
        scatter = sum(s**2 / f for s, f in zip(squares, freedom, strict=True))
        rates[f"{n} seeds"] = {
            "share of draws": per_cent(below),
            "as floored": per_cent(excludes_zero(mean, se, df)[below]),
            "as seen": per_cent(excludes_zero(mean, se, se**4 / scatter)[below]),
        }
    return rates


def pigeonhole_false_positives(
    rng: np.random.Generator, runs: int = 500, n_rows: int = 200
) -> dict:
    """Per cent. Few rows suffice: only the shares of variance matter."""
    rates = {}
    for name in ("seeds, rows and residual alike", "seeds and rows alike", "residual only"):
        of_seeds, of_rows, residual = BALANCES[name]
        for n in SEEDS[2:]:
            sizes = np.sqrt([n * of_seeds, n_rows * of_rows, n * n_rows * residual])
            shapes = ((n, 1), (1, n_rows), (n, n_rows))
            excluded = 0
            for _ in range(runs):
                parts = zip(sizes, shapes, strict=True)
                differences = sum(size * rng.standard_normal(shape) for size, shape in parts)
                interval = pigeonhole_interval(differences, draws=500)
                excluded += interval["low"] > 0 or interval["high"] < 0
            rates[f"{name}: {n} seeds"] = round(100 * excluded / runs, 2)
    return rates


def false_positives_of_right_or_wrong(
    rng: np.random.Generator, runs: int = 1000, n_rows: int = 872
) -> dict:
    """The crossed interval's false-positive rate for differences of -1, 0 and 1, per cent.

    The logit that a model is right is a sum: of the row (mean 3, standard deviation 3, shared by
    all), of the model on this row (standard deviation 0.5), of the training (0.1). Both models have
    the same distribution.
    """
    rates = {}
    for n_seeds in SEEDS:
        excluded = 0
        for _ in range(runs):
            rows = 3 + 3 * rng.standard_normal(n_rows)
            logits = rows + 0.5 * rng.standard_normal((2, 1, n_rows))
            logits = logits + 0.1 * rng.standard_normal((2, n_seeds, 1))  # (2, S, N)
            right = rng.random(logits.shape) < expit(logits)
            interval = crossed_interval(right[1].astype(float) - right[0])
            excluded += interval["p"] < 0.05
        rates[f"{n_seeds} seeds, {n_rows} rows"] = round(100 * excluded / runs, 2)
    return rates


def excludes_zero(mean: np.ndarray, se: np.ndarray, df: np.ndarray | int) -> np.ndarray:
    with np.errstate(divide="ignore"):  # without any spread zero is excluded
        return 2 * stdtr(df, -np.abs(mean) / se) < 0.05


def per_cent(which: np.ndarray) -> float:
    return round(100 * float(np.mean(which)), 2)


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
    results = {"variance of rows": round(row_variance, 4), "of the residual": round(residual, 4)}
    for name, mean_square in (("as seen", of_seeds), ("cautious", upper)):
        seed_variance = max(mean_square - residual, 0.0) / seen_rows
        widths = {}
        for data, n_rows in ROW_COUNTS.items():
            squares = (
                residual + n_rows * seed_variance,
                residual + n_seeds * row_variance,
                residual,
            )
            se, df = crossed_error(*squares, n_seeds, n_rows)
            widths[f"{data}, {n_rows} rows"] = round(100 * float(stdtrit(df, 0.975) * se), 2)
        results[name] = {
            "standard deviation of seeds": round(math.sqrt(seed_variance), 5),
            **widths,
        }
    return results


# How often an interval over rows contains the statistic's mean over samples of the same size


def coverage_over_rows(rng: np.random.Generator, runs: int = 1000) -> dict:
    """Coverage of the 95% delete-half jackknife interval in per cent, for near and far classes."""
    coverage = {}
    for name, separation in (("classes near", 0.5), ("classes far", 3.0)):
        classes = separation * rng.standard_normal((CLASSES, DIMENSIONS)) * spectrum()
        samples = [draw_rows(classes, rng) for _ in range(runs)]
        at_all = [measure(x[None], labels[None]) for x, labels in samples]
        draws = [measure_halves(x, labels, rng) for x, labels in samples]
        coverage[name] = {}
        for i, key in enumerate(MEASURES):
            target = np.mean([values[0, i] for values in at_all])
            intervals = (
                jackknife_interval(values[0, i], halves[:, i], TOTAL // 2, TOTAL)
                for values, halves in zip(at_all, draws, strict=True)
            )
            coverage[name][key] = per_cent([x["low"] <= target <= x["high"] for x in intervals])
    return coverage


def coverage_over_seeds_and_rows(rng: np.random.Generator, runs: int = 300) -> dict:
    """The same for seeds_and_rows_interval; each seed transforms the rows by its own linear map."""
    coverage = {}
    classes = rng.standard_normal((CLASSES, DIMENSIONS)) * spectrum()
    for n_seeds in (3, 5, 10):
        at_all = np.empty((runs, n_seeds, len(MEASURES)))
        draws = np.empty((runs, n_seeds, SUBSETS, len(MEASURES)))
        for run in range(runs):
            x, labels = draw_rows(classes, rng)
            subsets = draw_halves(rng)
            for seed in range(n_seeds):
                map_of_seed = np.eye(DIMENSIONS) + 0.05 * rng.standard_normal((DIMENSIONS,) * 2)
                seen = x @ map_of_seed  # (N, D)
                at_all[run, seed] = measure(seen[None], labels[None])[0]
                draws[run, seed] = measure(seen[subsets], labels[subsets])
        target = at_all.mean((0, 1))
        coverage[f"{n_seeds} seeds"] = {}
        for i, key in enumerate(MEASURES):
            intervals = (
                seeds_and_rows_interval(at_all[run, :, i], draws[run, :, :, i], TOTAL // 2, TOTAL)
                for run in range(runs)
            )
            covered = [x["low"] <= target[i] <= x["high"] for x in intervals]
            coverage[f"{n_seeds} seeds"][key] = per_cent(covered)
    return coverage


def spectrum() -> np.ndarray:
    """Standard deviation of each dimension: a power law, as features of trained models have."""
    return np.arange(1, DIMENSIONS + 1) ** -0.7


def draw_rows(classes: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian features (N, D) around class means (C, D), with labels (N,)."""
    labels = rng.integers(CLASSES, size=TOTAL)
    return classes[labels] + rng.standard_normal((TOTAL, DIMENSIONS)) * spectrum(), labels


def draw_halves(rng: np.random.Generator) -> np.ndarray:
    """Indices of random halves of the rows (B, N / 2)."""
    return rng.permuted(np.tile(np.arange(TOTAL), (SUBSETS, 1)), axis=1)[:, : TOTAL // 2]


def measure_halves(x: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    subsets = draw_halves(rng)
    return measure(x[subsets], labels[subsets])


def measure(x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """MEASURES (B, 6) of B sets of features (B, n, D) with labels (B, n)."""
    measures = np.empty((len(x), len(MEASURES)))
    for number, (features, of_features) in enumerate(zip(x, labels, strict=True)):
        ranks = ranks_from_gram(features)
        values = ranks["stable_rank"], ranks["effective_rank"], cdnv(features, of_features)
        measures[number, ::2], measures[number, 1::2] = values, np.log(values)
    return measures


if __name__ == "__main__":
    main()
