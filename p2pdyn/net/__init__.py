"""Thin shells: sockets, timers, discovery. No decisions; those live in :mod:`p2pdyn.core`."""
