"""Draws the dashboards with Grafana's own panels, to be looked at."""
