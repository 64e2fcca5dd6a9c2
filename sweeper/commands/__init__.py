"""One module for each thing a user can ask for."""
