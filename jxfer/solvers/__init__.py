"""Exact solvers as heads: from stored features straight to every head of a path of settings, without steps."""
