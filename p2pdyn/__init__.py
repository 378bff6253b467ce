"""p2pdyn: a brokerless peer-to-peer runtime for LLM inference.

Importing the package loads nothing heavy: a worker with the `sim` engine and a frontend each pay only for what they
run.  The composition root is :mod:`p2pdyn.node`; the command line lives in ``cli/``.
"""

__version__ = "0.1.0"
