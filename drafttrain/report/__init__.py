"""What people read: tables, plots, pages, comparisons and the trace of a decoding, all made from result files."""
