"""Modules built on the ops."""
