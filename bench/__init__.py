"""Measures pgvigil beside postgres_exporter on real servers, as ratios within one run."""
