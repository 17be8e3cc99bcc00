"""The demo runs a PostgreSQL with bad habits and shows what the exporter sees of them."""
