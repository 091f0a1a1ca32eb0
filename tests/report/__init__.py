"""Reports over made-up runs."""
