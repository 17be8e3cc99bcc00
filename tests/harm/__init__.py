"""Does harm to servers and networks, and sees how an exporter bears it."""
