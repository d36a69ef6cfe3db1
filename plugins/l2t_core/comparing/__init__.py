"""The specification and the statistics of a fair comparison."""
