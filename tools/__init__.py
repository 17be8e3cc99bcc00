"""Programs that write what is committed from what people edit."""
