"""The process that owns a study: hand out jobs, listen, obey commands, record results."""
