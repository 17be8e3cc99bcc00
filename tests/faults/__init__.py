"""Proves alerts: something is broken, the alert arrives, it is mended, the alert resolves."""
