"""Speed, each against a named rival in the same run; ``python -m benchmarks`` prints and writes the ratios."""
