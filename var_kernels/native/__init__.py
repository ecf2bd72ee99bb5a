"""The native library: its build, its loading, and the raw operators that it implements."""
