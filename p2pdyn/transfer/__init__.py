"""KV-block transfer between workers."""
