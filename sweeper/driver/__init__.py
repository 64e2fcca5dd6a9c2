"""The run loop: jobs of every kind, the dispatcher that runs them, and what steers and records it."""
