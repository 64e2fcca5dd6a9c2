"""What a person sees: during a study, at its end, and later."""
