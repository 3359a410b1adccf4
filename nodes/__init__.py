"""People's command line."""
