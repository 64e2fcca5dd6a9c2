"""The embedded base model and data set, and stand-ins for models and data that need a download."""
