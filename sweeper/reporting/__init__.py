"""Live views, tables, figures, verdicts and report pages for people."""
