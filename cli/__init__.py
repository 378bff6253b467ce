"""The `p2pdyn` command."""
