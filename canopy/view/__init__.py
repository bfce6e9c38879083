"""A finished map in the browser: a local web server of tiles, values and statistics, and its page."""
