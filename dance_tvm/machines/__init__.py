"""Facts about machines: targets (TOML), this host, GPUs."""
