"""What is shown of finished runs: tables, plots, comparisons."""
