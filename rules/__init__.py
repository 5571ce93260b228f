"""The rule packs that come with moe-surgery: TOML files, read as data."""
