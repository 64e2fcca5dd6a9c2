"""From the command line to frozen settings: composition, search spaces, validation."""
