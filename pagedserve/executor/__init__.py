"""Executors: how a Step reaches the worker or workers that compute it."""
