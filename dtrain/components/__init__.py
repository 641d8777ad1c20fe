"""What a config file can name: plain torch parts, usable without dtrain."""
