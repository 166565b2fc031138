"""RESULTS.md, FINDINGS.md and README.md from results."""
