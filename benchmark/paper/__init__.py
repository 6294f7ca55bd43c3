"""The paper's tables and figures, and docs/findings.md, as one command each: python -m benchmark.paper --help."""
