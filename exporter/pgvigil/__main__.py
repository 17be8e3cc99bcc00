"""Run pgvigil as `python -m pgvigil`."""

from pgvigil.cli import main

raise SystemExit(main())
