"""Inference engines behind one small protocol (:mod:`p2pdyn.engines.base`)."""
