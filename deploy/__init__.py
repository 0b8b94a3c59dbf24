"""Binding, command line and operations: the only package that knows all the others."""
