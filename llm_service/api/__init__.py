"""The HTTP surface: no model code, no Ray."""
