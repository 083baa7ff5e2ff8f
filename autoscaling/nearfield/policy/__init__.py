"""Decisions as plain functions of plain data: no I/O, no clock, no Ray."""
