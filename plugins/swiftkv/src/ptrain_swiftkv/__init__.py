"""SwiftKV for ptrain."""
