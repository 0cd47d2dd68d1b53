"""Tuning: search the fastest tiles on a real device, and keep what was learned in logs that survive anything."""
