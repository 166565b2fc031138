"""From results to comparisons, tables and figures."""
