"""The search: what is asked, of whom, when to stop it, and what is told."""
