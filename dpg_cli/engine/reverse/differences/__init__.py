"""Second order by differences of ordinary passes: to either side, or to one beside what the inner run knows."""
