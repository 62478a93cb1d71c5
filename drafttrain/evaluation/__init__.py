"""The instrument claims are read from: suites, interleaved runs, result rows, tables."""
