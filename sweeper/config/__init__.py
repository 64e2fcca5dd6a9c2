"""Reading the command line and the configuration, before any setting has a meaning."""
