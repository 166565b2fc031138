"""Studies beyond the experiments, each a script of its own."""
