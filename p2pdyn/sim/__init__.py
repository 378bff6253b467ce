"""Virtual clock and network that drive the cores of :mod:`p2pdyn.core` at thousands of nodes."""
