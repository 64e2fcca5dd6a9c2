"""Words and files that every room shares: errors, outcomes, paths, signals."""
